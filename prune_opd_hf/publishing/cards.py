"""The model card of a student, from records alone: no model is loaded, no network is asked, nothing is guessed.

What is not known is left out and, where a reader would miss it, said to be unknown. The text stands in
`templates/model_card.md.j2`; every value that it prints is escaped (see `markdown`).
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import jinja2
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import prune_opd_hf
from prune_opd_hf.errors import ConfigError
from prune_opd_hf.evaluation.report import EvaluationReport
from prune_opd_hf.publishing.markdown import Markdown, clean_line, code, fence, link, table, to_markdown
from prune_opd_hf.publishing.results import each_result, model_index_results
from prune_opd_hf.training.summary import TrainingSummary

STUDENT_COLUMN = "this student"


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
        if self.id == "other" and not (self.name and self.link):
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


def is_hub_id(name: str | None) -> bool:
    """Whether `name` has the form owner/name that the Hub gives to repositories.

    Example:
        >>> is_hub_id("Qwen/Qwen3-1.7B"), is_hub_id("qwen (local)"), is_hub_id("gpt2"), is_hub_id(None)
        (True, False, False, False)
    """
    if not name or name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def build_card(
    training: TrainingSummary | None,
    reports: Sequence[EvaluationReport],
    *,
    name: str,
    repo_id: str | None = None,
    license: License | None = None,
    facts: ModelFacts | None = None,
    comparisons: Mapping[str, Sequence[EvaluationReport]] | None = None,
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
        ConfigError: `name` is empty or `repo_id` is not of the form owner/name.

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
    prompt = example_prompt or (training.example_prompt if training is not None else None)
    data = _metadata(training, reports, name=name, license=license, facts=facts, language=language)
    body = (
        card_environment()
        .get_template("model_card.md.j2")
        .render(
            name=name,
            repo_id=repo_id,
            training=training,
            facts=facts,
            license=license,
            base_on_hub=training is not None and is_hub_id(training.student_base),
            results=_results_table(reports, comparisons or {}),
            conditions=_conditions(reports, comparisons or {}),
            measurements=_measurements_table(reports, comparisons or {}),
            repeat=_repeat_commands(reports, repo_id),
            snippet=_snippet(repo_id, facts, prompt, max_new_tokens or _snippet_length(reports)),
            figures=figures or {},
            preflight=preflight or {},
            limitations=limitations,
            package_version=prune_opd_hf.__version__,
        )
    )
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def card_environment() -> jinja2.Environment:
    """Where the templates are found and how they print: every value escaped unless it is Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prune_opd_hf.publishing"),
        finalize=to_markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # HTML escaping is not enough for Markdown: `finalize` does it
    )
    environment.filters.update(
        code=code,
        count=_count,
        duration=_duration,
        figure=_figure,
        link=link,
        percent_of=_percent_of,
        ref=_reference,
        settings_table=_settings_table,
        shell=_shell,
    )
    return environment


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


def _reference(name: str | None) -> Markdown:
    """A Hub id as a link, any other name as code."""
    if name is not None and is_hub_id(name):
        return Markdown(f"[{code(name)}](https://huggingface.co/{name})")
    return code(name or "unknown")


def _figure(caption: str, path: str) -> Markdown:
    return Markdown(f"![{to_markdown(caption)}]({quote(path)})")


def _columns(
    reports: Sequence[EvaluationReport], comparisons: Mapping[str, Sequence[EvaluationReport]]
) -> dict[str, Sequence[EvaluationReport]]:
    return {STUDENT_COLUMN: reports, **comparisons}


def _results_table(
    reports: Sequence[EvaluationReport], comparisons: Mapping[str, Sequence[EvaluationReport]]
) -> Markdown | None:
    """One row for each metric of this student, one column for each model; copies of a benchmark are told apart."""
    columns = _columns(reports, comparisons)
    keys = dict.fromkeys(
        (result.name, result.content_hash, metric) for _, result in each_result(reports) for metric in result.metrics
    )
    rows = [[key[0], code(key[2]), *[_cell(others, *key) for others in columns.values()]] for key in keys]
    return table(["benchmark", "metric", *columns], rows) if rows else None


def _cell(reports: Sequence[EvaluationReport], benchmark: str, content_hash: str, metric: str) -> Markdown:
    for _, result in each_result(reports):
        if result.name == benchmark and result.content_hash == content_hash and metric in result.metrics:
            return Markdown(result.metrics[metric])
    return Markdown("not measured")


def _conditions(
    reports: Sequence[EvaluationReport], comparisons: Mapping[str, Sequence[EvaluationReport]]
) -> list[dict[str, Any]]:
    """What was asked and how, once for all models that share it."""
    found: dict[Any, dict[str, Any]] = {}
    for column, others in _columns(reports, comparisons).items():
        for report, result in each_result(others):
            key = (result.name, result.source, result.content_hash, result.grader, report.sampling)
            entry = found.setdefault(key, {"columns": [], "result": result, "sampling": report.sampling.describe()})
            entry["columns"].append(column)
    return list(found.values())


def _measurements_table(
    reports: Sequence[EvaluationReport], comparisons: Mapping[str, Sequence[EvaluationReport]]
) -> Markdown:
    rows = [
        [
            column,
            result.name,
            code(report.model_hash.removeprefix("sha256:")[:12]),
            f"{100 * result.truncated_share:.1f}%",
            f"{result.mean_response_tokens:.0f}",
            _duration(result.wall_seconds),
            f"{report.hardware}, {report.dtype}",
            report.date,
        ]
        for column, others in _columns(reports, comparisons).items()
        for report, result in each_result(others)
    ]
    header = ["model", "benchmark", "weights", "cut at the limit", "tokens a response", "time", "ran on", "date"]
    return table(header, rows)


def _repeat_commands(reports: Sequence[EvaluationReport], repo_id: str | None) -> Markdown | None:
    """The commands that measure this student's scores again."""
    commands = []
    for report in reports:
        sampling = report.sampling
        words = ["prune-opd", "evaluate", repo_id or ".", "--benchmarks"]
        words += [clean_line(result.name) for result in report.benchmarks]
        words += ["--samples", str(sampling.samples), "--temperature", str(sampling.temperature)]
        words += ["--top-p", str(sampling.top_p)]
        words += ["--top-k", str(sampling.top_k)] if sampling.top_k else []
        words += ["--max-new-tokens", str(sampling.max_new_tokens), "--seed", str(sampling.seed)]
        commands.append(shlex.join(words))
    return _shell("\n".join(commands)) if commands else None


def _shell(command: str) -> Markdown:
    return fence("\n".join(map(clean_line, command.splitlines())), "bash")


def _snippet_length(reports: Sequence[EvaluationReport]) -> int:
    return min(1024, reports[0].sampling.max_new_tokens) if reports else 512


def _snippet(repo_id: str | None, facts: ModelFacts | None, prompt: str | None, max_new_tokens: int) -> Markdown:
    """Code that loads the student with plain Transformers and asks it one thing; names enter as Python literals."""
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"name = {_literal(repo_id or '.')}",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")',
        "",
    ]
    question = _literal(prompt or "What is 12 * 34?")
    if facts is not None and facts.chat:
        lines += [
            f'messages = [{{"role": "user", "content": {question}}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        lines += [f'inputs = tokenizer({question}, return_tensors="pt", return_token_type_ids=False)']
    lines += [
        f"output = model.generate(**inputs, max_new_tokens={max_new_tokens})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return fence("\n".join(lines), "python")


def _literal(value: str) -> str:
    """A string literal that Python reads back as `value`, on one line and without invisible characters."""
    return json.dumps(value) if value.isascii() and value.isprintable() else repr(value)


def _settings_table(settings: Mapping[str, Any]) -> Markdown:
    return table(["setting", "value"], [[code(key), code(_plain(value))] for key, value in settings.items()])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _count(value: int | float) -> str:
    return f"{value:,.0f}"


def _percent_of(part: int | float, whole: int | float) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "-"


def _duration(seconds: int | float) -> str:
    """A duration in the largest unit that it fills.

    Example:
        >>> _duration(42.0), _duration(600.0), _duration(18000.0)
        ('42.0 s', '10.0 min', '5.0 h')
    """
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
