"""The model card of a student, from records alone: no model is loaded, no network is asked, nothing is guessed.

What is not known is left out and, where a reader would miss it, said to be unknown. The text stands in
`templates/model_card.md.j2`; every value that it prints is escaped (see `markdown`).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import jinja2
from huggingface_hub import ModelCard, ModelCardData

import prune_opd_hf
from prune_opd_hf.errors import ConfigError
from prune_opd_hf.hub.client import is_hub_id
from prune_opd_hf.hub.markdown import Markdown, clean_line, code, fence, link, shell, table, to_markdown
from prune_opd_hf.hub.results import (
    STUDENT_COLUMN,
    conditions,
    measurements_table,
    model_index_results,
    repeat_commands,
    results_table,
    unrepeatable,
)
from prune_opd_hf.records.student_records import StudentRecords
from prune_opd_hf.records.training_figures import duration


@dataclass(frozen=True)
class License:
    """The licence of the published weights.

    Attributes:
        id: the Hub's short name, such as "apache-2.0", or "other".
        name, link: of a licence that the Hub has no short name for; both are needed with "other" and only there.

    Raises:
        ConfigError: "other" without name or link, or name or link without "other". The Hub knows which names there are.
    """

    id: str
    name: str | None = None
    link: str | None = None

    def __post_init__(self) -> None:
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


@dataclass(frozen=True)
class CardOptions:
    """What a card says beyond the records.

    Attributes:
        license: of the weights; None leaves the field out and says so.
        example_prompt: what the usage snippet asks; by default that of the training summary.
        limitations: sentences to add to the general ones.
        language: of prompts and answers, such as "en".
        preflight: findings of the compatibility check, by name.
    """

    license: License | None = None
    example_prompt: str | None = None
    limitations: tuple[str, ...] = ()
    language: str | None = None
    preflight: Mapping[str, Any] | None = None


def build_card(
    records: StudentRecords,
    *,
    name: str,
    repo_id: str | None = None,
    facts: ModelFacts | None = None,
    figures: Mapping[str, str] | None = None,
    options: CardOptions | None = None,
) -> ModelCard:
    """The card of a student; equal records give the same text.

    Args:
        records: how it was trained, and evaluations of it and of the models that it is compared with.
        name: what to call it, the last part of the repository's id.
        repo_id: where it will be; None makes the snippets load it from the current folder.
        facts: what its files say.
        figures: path in the repository by caption.
        options: what the card says beyond the records.

    Raises:
        ConfigError: `name` is empty, or a comparison has the student's own column.

    Example:
        >>> from prune_opd_hf.records.training_summary import TrainingSummary
        >>> summary = TrainingSummary(dataset="org/prompts", loss="topk_policy_gradient", pruning="drift", steps=10,
        ...     rollouts=40, generated_tokens=4000, kept_tokens=3000, saved_tokens=9000, wall_seconds=60.0,
        ...     student_base="Qwen/Qwen3-0.6B", teacher="Qwen/Qwen3-4B")
        >>> card = build_card(StudentRecords(summary), name="my-student", options=CardOptions(License("apache-2.0")))
        >>> card.data.base_model, card.data.base_model_relation, card.data.tags
        ('Qwen/Qwen3-0.6B', 'finetune', ['on-policy-distillation', 'prune-opd'])
    """
    training, reports, comparisons = records.training, records.reports, records.comparisons
    options = options or CardOptions()
    if not clean_line(name):
        raise ConfigError(f"a card needs the model's name, got {name!r}")
    if STUDENT_COLUMN in comparisons:
        raise ConfigError(f"{STUDENT_COLUMN!r} is the column of the student itself: name the compared model otherwise")
    prompt = options.example_prompt or (training.example_prompt if training is not None else None)
    max_new_tokens = min(1024, reports[0].sampling.max_completion_length) if reports else 512
    template = _environment().get_template("model_card.md.j2")
    body = template.render(
        name=name,
        repo_id=repo_id,
        training=training,
        facts=facts,
        license=options.license,
        base_on_hub=training is not None and is_hub_id(training.student_base),
        results=results_table(reports, comparisons),
        conditions=conditions(reports, comparisons),
        measurements=measurements_table(reports, comparisons),
        repeat=repeat_commands(reports, repo_id, comparisons),
        unrepeatable=unrepeatable(reports, comparisons),
        snippet=_snippet(repo_id, prompt, max_new_tokens, chat=facts is not None and facts.chat),
        figures=figures or {},
        preflight=options.preflight or {},
        limitations=options.limitations,
        package_version=prune_opd_hf.__version__,
    )
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return ModelCard(f"---\n{_metadata(records, name, facts, options).to_yaml()}\n---\n\n{body}\n")


def _metadata(records: StudentRecords, name: str, facts: ModelFacts | None, options: CardOptions) -> ModelCardData:
    training, license = records.training, options.license
    base = training.student_base if training is not None and is_hub_id(training.student_base) else None
    adapter = facts is not None and facts.adapter
    return ModelCardData(
        language=clean_line(options.language) if options.language else None,
        license=clean_line(license.id) if license else None,
        license_name=clean_line(license.name) if license and license.name else None,
        license_link=clean_line(license.link) if license and license.link else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation=("adapter" if adapter else "finetune") if base else None,
        datasets=[training.dataset] if training is not None and is_hub_id(training.dataset) else None,
        tags=["on-policy-distillation", *(["prune-opd"] if training is None or training.pruning != "none" else [])],
        model_name=clean_line(name) if records.reports else None,
        eval_results=model_index_results(records.reports) or None,
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
        teaching=_teaching,
        settings_table=_settings_table,
        shell=shell,
    )
    return environment


def _reference(name: str | None) -> Markdown:
    """A Hub id as a link, any other name as code."""
    if name is not None and is_hub_id(name):
        return Markdown(f"[{code(name)}](https://huggingface.co/{name})")
    return code(name or "unknown")


def _teaching(teacher: Mapping[str, Any]) -> str:
    """Which model a teacher is, where it ran and what it read, in one phrase."""
    revision = f" at revision {teacher['revision']}" if teacher.get("revision") else ""
    model, where, read = (teacher.get(name) or "unknown" for name in ("model", "where", "read"))
    return f"{model}{revision}, {where}; read {read}"


def _settings_table(settings: Mapping[str, Any]) -> Markdown:
    values = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in settings.items()
    }
    return table(["setting", "value"], [[code(name), code(value)] for name, value in values.items()])
