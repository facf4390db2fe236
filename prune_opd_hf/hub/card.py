"""The model card of a student, from records alone: no model is loaded, no network is asked, nothing is guessed.

What is not known is left out and, where a reader would miss it, said to be unknown. The text stands in
`templates/model_card.md.j2`; every value that it prints is escaped (see `markdown`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import jinja2
from huggingface_hub import ModelCard, ModelCardData

import prune_opd_hf
from prune_opd_hf.errors import ConfigError
from prune_opd_hf.hub.client import is_hub_id
from prune_opd_hf.hub.markdown import Markdown, clean_line, code, duration, fence, link, shell, table, to_markdown
from prune_opd_hf.hub.results import (
    STUDENT_COLUMN,
    Comparisons,
    conditions,
    measurements_table,
    model_index_results,
    repeat_commands,
    results_table,
    unrepeatable,
)
from prune_opd_hf.records.evaluation_report import EvaluationReport
from prune_opd_hf.records.training_summary import TrainingSummary


@dataclass(frozen=True)
class License:
    """The licence of the published weights.

    Attributes:
        id: the Hub's short name, such as "apache-2.0", or "other".
        name, link: of a licence that the Hub has no short name for; both are needed with "other" and only there.

    Raises:
        ConfigError: "other" without name or link, name or link without "other", or an id that no licence can have.

    Example:
        >>> License("other", name="qwen-research", link="https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE").id
        'other'
        >>> License("other")
        Traceback (most recent call last):
            ...
        prune_opd_hf.errors.ConfigError: license 'other' needs a name and a link, got name None and link None
    """

    id: str
    name: str | None = None
    link: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.id):
            raise ConfigError(
                f"license must be one of the Hub's short names in lower case, such as 'apache-2.0', got {self.id!r}"
            )
        if self.id == "other" and not (clean_line(self.name or "") and clean_line(self.link or "")):
            raise ConfigError(f"license 'other' needs a name and a link, got name {self.name!r} and link {self.link!r}")
        if self.id != "other" and (self.name or self.link):
            raise ConfigError(f"a name and a link go with license 'other' only, got license {self.id!r}")


@dataclass(frozen=True)
class ModelFacts:
    """What the student's own files say about it.

    Attributes:
        architecture: class name, such as "Qwen3ForCausalLM".
        parameters: their number; of an adapter, of the adapter alone.
        dtype: of the stored weights.
        context_length: in tokens; None where the config does not say.
        chat: whether the tokenizer has a chat template.
        adapter: the repository holds a PEFT adapter instead of whole weights.
    """

    architecture: str
    parameters: int
    dtype: str
    context_length: int | None = None
    chat: bool = False
    adapter: bool = False


def build_card(
    training: TrainingSummary | None,
    reports: Sequence[EvaluationReport],
    *,
    name: str,
    repo_id: str | None = None,
    license: License | None = None,
    facts: ModelFacts | None = None,
    comparisons: Comparisons | None = None,
    figures: Mapping[str, str] | None = None,
    preflight: Mapping[str, Any] | None = None,
    example_prompt: str | None = None,
    max_new_tokens: int | None = None,
    limitations: Sequence[str] = (),
    language: str | None = None,
) -> ModelCard:
    """The card of a student; equal records give the same text.

    Args:
        training: how it was trained; None where that is not known.
        reports: evaluations of this student.
        name: what to call it, the last part of the repository's id.
        repo_id: where it will be; None makes the snippets load it from the current folder.
        license: of the weights; None leaves the field out and says so.
        facts: what its files say.
        comparisons: other models' reports by column name in the order wanted, for example "base student", "OPD", "teacher".
        figures: path in the repository by caption.
        preflight: findings of the compatibility check, by name.
        example_prompt: what the usage snippet asks; by default that of the training summary.
        max_new_tokens: what the usage snippet allows; by default that of the first report, at most 1024.
        limitations: sentences to add to the general ones.
        language: of prompts and answers, such as "en".

    Raises:
        ConfigError: `name` is empty, `repo_id` is not of the form owner/name, or a comparison has the student's own column.

    Example:
        >>> summary = TrainingSummary(dataset="org/prompts", loss="topk_policy_gradient", pruning="drift", steps=10,
        ...     rollouts=40, generated_tokens=4000, kept_tokens=3000, saved_tokens=9000, wall_seconds=60.0,
        ...     student_base="Qwen/Qwen3-0.6B", teacher="Qwen/Qwen3-4B")
        >>> card = build_card(summary, [], name="my-student", license=License("apache-2.0"))
        >>> card.data.base_model, card.data.base_model_relation, card.data.tags
        ('Qwen/Qwen3-0.6B', 'finetune', ['on-policy-distillation', 'prune-opd'])
    """
    if not clean_line(name):
        raise ConfigError(f"a card needs the model's name, got {name!r}")
    if repo_id is not None and not is_hub_id(repo_id):
        raise ConfigError(f"repo_id must have the form owner/name, got {repo_id!r}")
    comparisons = comparisons or {}
    if STUDENT_COLUMN in comparisons:
        raise ConfigError(f"{STUDENT_COLUMN!r} is the column of the student itself: name the compared model otherwise")
    if max_new_tokens is None:
        max_new_tokens = min(1024, reports[0].sampling.max_completion_length) if reports else 512
    if example_prompt is None and training is not None:
        example_prompt = training.example_prompt
    data = _metadata(training, reports, name=name, license=license, facts=facts, language=language)
    body = (
        _environment()
        .get_template("model_card.md.j2")
        .render(
            name=name,
            repo_id=repo_id,
            training=training,
            facts=facts,
            license=license,
            base_on_hub=training is not None and is_hub_id(training.student_base),
            results=results_table(reports, comparisons),
            conditions=conditions(reports, comparisons),
            measurements=measurements_table(reports, comparisons),
            repeat=repeat_commands(reports, repo_id, comparisons),
            unrepeatable=unrepeatable(reports, comparisons),
            snippet=_snippet(repo_id, example_prompt, max_new_tokens, chat=facts is not None and facts.chat),
            figures=figures or {},
            preflight=preflight or {},
            limitations=limitations,
            package_version=prune_opd_hf.__version__,
        )
    )
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _metadata(
    training: TrainingSummary | None,
    reports: Sequence[EvaluationReport],
    *,
    name: str,
    license: License | None,
    facts: ModelFacts | None,
    language: str | None,
) -> ModelCardData:
    base = training.student_base if training is not None and is_hub_id(training.student_base) else None
    adapter = facts is not None and facts.adapter
    tags = ["on-policy-distillation"]
    if training is None or training.pruning != "none":
        tags.append("prune-opd")
    return ModelCardData(
        language=clean_line(language) if language else None,
        license=license.id if license else None,
        license_name=clean_line(license.name) if license and license.name else None,
        license_link=clean_line(license.link) if license and license.link else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation=("adapter" if adapter else "finetune") if base else None,
        datasets=[training.dataset] if training is not None and is_hub_id(training.dataset) else None,
        tags=tags,
        model_name=clean_line(name) if reports else None,
        eval_results=model_index_results(reports) or None,
    )


def _snippet(repo_id: str | None, prompt: str | None, max_new_tokens: int, *, chat: bool) -> Markdown:
    """Code that loads the student with plain Transformers and asks it one thing; names enter as Python literals."""
    if chat:
        encode = """messages = [{"role": "user", "content": prompt}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
    else:
        encode = 'inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)'
    program = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

name = {_literal(repo_id or ".")}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")

prompt = {_literal(prompt or "What is 12 * 34?")}
{encode}
output = model.generate(**inputs, max_new_tokens={max_new_tokens})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
    return fence(program, "python")


def _literal(value: str) -> str:
    """A string literal that Python reads back as `value`, on one line and without invisible characters."""
    return json.dumps(value) if value.isascii() and value.isprintable() else repr(value)


# ---------------------------------------------------------------------- how the template prints


def _environment() -> jinja2.Environment:
    """The templates of this folder; every value is escaped unless it is Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prune_opd_hf.hub"),
        finalize=to_markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # HTML escaping is not enough for Markdown: `finalize` does it
    )
    environment.filters.update(
        code=code,
        count=lambda value: f"{value:,.0f}",
        duration=duration,
        figure=lambda caption, path: Markdown(f"![{to_markdown(caption)}]({quote(path)})"),
        link=link,
        percent_of=lambda part, whole: f"{100 * part / whole:.0f}%" if whole else "-",
        ref=_reference,
        settings_table=_settings_table,
        shell=shell,
    )
    return environment


def _reference(name: str | None) -> Markdown:
    """A Hub id as a link, any other name as code."""
    if name is not None and is_hub_id(name):
        return Markdown(f"[{code(name)}](https://huggingface.co/{name})")
    return code(name or "unknown")


def _settings_table(settings: Mapping[str, Any]) -> Markdown:
    values = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in settings.items()
    }
    return table(["setting", "value"], [[code(name), code(value)] for name, value in values.items()])
