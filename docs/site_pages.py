"""Pages of the site that are made of the code and of other files: settings, commands, results, worked examples, changelog,
contributing.

MkDocs calls `on_config`, `on_files`, `on_page_markdown` (hooks of mkdocs.yml). The rest knows no MkDocs, so that tests can call it.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from prune_opd_hf import PruneOPDConfig
from prune_opd_hf.cli import COMMANDS
from prune_opd_hf.cli.train import ScriptArguments
from prune_opd_hf.training.setting_rules import ACTS_WITH

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "results"
NOTEBOOKS = ROOT / "examples" / "notebooks"

UNITS: Mapping[str, str] = {
    **dict.fromkeys(("max_prompt_length", "max_completion_length", "eval_max_completion_length"), "tokens"),
    **dict.fromkeys(("max_tokens_per_micro_batch", "check_every", "pruning_length", "drift_min_length"), "tokens"),
    **dict.fromkeys(("budget_initial", "budget_minimum", "budget_step", "budget_margin"), "tokens"),
    **dict.fromkeys(("eos_token_id",), "token ids"),
    **dict.fromkeys(("top_k", "eval_top_k", "drift_top_k", "loss_top_k"), "tokens of the vocabulary"),
    **dict.fromkeys(("teacher_model_server_timeout", "vllm_server_timeout"), "seconds"),
    **dict.fromkeys(("logging_steps", "teacher_sync_steps", "save_rollouts_steps", "max_skipped_steps"), "steps"),
    **dict.fromkeys(("num_iterations", "budget_patience"), "steps"),
    **dict.fromkeys(("num_generations", "generation_batch_size"), "rollouts"),
    **dict.fromkeys(("num_generations_eval", "num_completions_to_print"), "completions"),
    **dict.fromkeys(("top_p", "eval_top_p", "min_p"), "probability"),
    **dict.fromkeys(("teacher_update_rate", "vllm_gpu_memory_utilization", "budget_hit_ratio"), "share, 0 to 1"),
    **dict.fromkeys(("drift_threshold", "drift_weight_drop"), "share, 0 to 1"),
    **dict.fromkeys(("temperature", "eval_temperature", "loss_temperature", "repetition_penalty"), "divisor of logits"),
    **dict.fromkeys(("clip_low", "clip_high", "dual_clip"), "ratio of probabilities"),
    **dict.fromkeys(("drift_weight_base", "weight_decay", "learning_rate", "beta"), "number"),
}
"""Of every setting that is a number; the help of a setting does not repeat it."""


def sections() -> Iterator[tuple[str, list[Field]]]:
    """The settings of `PruneOPDConfig` that are not Transformers' alone, under the comments that part them in its source."""
    known = {item.name: item for item in fields(PruneOPDConfig)}
    title, found = "", []
    for line in inspect.getsource(PruneOPDConfig).splitlines():
        if line.startswith("    def "):
            break
        if comment := re.fullmatch(r"    # (.+)", line):
            if found:
                yield title, found
            title, found = comment[1], []
        elif (named := re.match(r"    (\w+): ", line)) and named[1] in known:
            found.append(known[named[1]])
    yield title, found


def settings_page() -> str:
    """Every setting with its default, unit and effect, from the help of the setting."""
    lines = [
        "# Settings of training",
        "",
        "Every field of `PruneOPDConfig`. The same names are options of `prune-opd train` and keys of its YAML file.",
        "This page is made of the help texts in the code.",
        "",
        "Every field of Transformers' `TrainingArguments` is there as well; those of them with another default come first.",
    ]
    for title, found in sections():
        lines += [
            "",
            f"## {title[0].upper()}{title[1:]}",
            "",
            "| setting | default, unit | effect |",
            "|---|---|---|",
        ]
        lines += [
            f"| `{item.name}` | {default(item)} {UNITS.get(item.name, '')} | {effect(item)}{companions(item.name)} |"
            for item in found
        ]
    lines += [
        "",
        "## Of the command alone",
        "",
        "`prune-opd train` and `examples/train_prune_opd.py` take these as well.",
        "",
    ]
    return "\n".join([*lines, *options(ScriptArguments), ""])


def default(item: Field) -> str:
    """The default as it would be written."""
    value = item.default if item.default_factory is MISSING else item.default_factory()
    return "needed" if value is MISSING else f"`{value!r}`" if isinstance(value, str) else f"`{value}`"


def effect(item: Field) -> str:
    """The help of a field, with its choices."""
    text = cell(str(item.metadata.get("help", "")))
    choices = [str(one) for one in item.metadata.get("choices") or ()]
    if choices and not all(f"'{one}'" in text for one in choices):
        text += f" One of {', '.join(f'`{one}`' for one in choices)}."
    return text


def companions(name: str) -> str:
    """Beside which choices of another setting one has an effect."""
    if name not in ACTS_WITH:
        return ""
    other, values = ACTS_WITH[name]
    return f" Acts with `{other}` {' or '.join(f'`{value}`' for value in values)}."


def cell(text: str) -> str:
    """Text for a table's cell: what stands between quotes is code."""
    quoted = re.sub(r"(?<![\w`])'(\{.*?\}|[^'\s]+|[^']*[{}][^']*)'(?!\w)", r"`\1`", text.replace("|", "\\|"))
    return quoted if quoted.endswith((".", "!", "?")) or not quoted else f"{quoted}."


def options(record: type) -> list[str]:
    """A table of the fields of a dataclass of arguments."""
    rows = [f"| `--{item.name}` | {default(item)} | {effect(item)} |" for item in fields(record) if item.init]
    return ["| option | default | effect |", "|---|---|---|", *rows]


def commands_page() -> str:
    """Every command with its options, from the records that the parser reads."""
    lines = [
        "# Commands",
        "",
        "Options are written with hyphens or underscores. `prune-opd COMMAND --help` shows the same text.",
    ]
    for name, command in COMMANDS.items():
        lines += ["", f"## {name}", "", cell(command.help[0].upper() + command.help[1:]), ""]
        record = arguments_of(name)
        if record is None:
            lines += ["Its options are the [settings of training](settings.md)."]
            continue
        if command.positional:
            lines += [f"May stand first, without a name: {', '.join(f'`{one}`' for one in command.positional)}.", ""]
        lines += options(record) if fields(record) else ["It takes no options."]
    return "\n".join([*lines, ""])


def arguments_of(command: str) -> type | None:
    """The record of a command's arguments; None for the one that parses its own."""
    module, _, function = COMMANDS[command].function.partition(":")
    run = getattr(import_module(f"prune_opd_hf.{module}"), function)
    record = signature(run).parameters["arguments"].annotation
    return record if isinstance(record, type) and is_dataclass(record) else None


def result_pages() -> dict[str, str]:
    """The title of each folder of results that has a page."""
    return {
        page.parent.name: page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        for page in sorted(RESULTS.glob("*/README.md"))
    }


def results_page() -> str:
    """What was found, and what was measured, folder by folder."""
    lines = [
        (RESULTS / "README.md").read_text(encoding="utf-8"),
        "## Pages",
        "",
        *(f"- [{title}]({name}/README.md)" for name, title in result_pages().items()),
    ]
    return "\n".join([*lines, ""])


def script_page(path: Path) -> str:
    """A script in cells as a page."""
    parts = []
    for cell in re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        kind, _, body = cell.partition("\n")
        body = body.strip("\n")
        is_text = kind.strip() == "[markdown]"
        parts.append(re.sub(r"^# ?", "", body, flags=re.MULTILINE) if is_text else f"```python\n{body}\n```")
    parts.append(f"*This page is the script `examples/notebooks/{path.name}`, which the tests run.*\n")
    return "\n\n".join(parts)


def pages() -> dict[str, str]:
    """Every page that is made here, by its place."""
    return {
        "reference/settings.md": settings_page(),
        "reference/commands.md": commands_page(),
        "results/README.md": results_page(),
        **{f"notebooks/{path.stem}.md": script_page(path) for path in sorted(NOTEBOOKS.glob("*.py"))},
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    }


def copied_files() -> dict[str, Path]:
    """Pages and pictures of the results, by their place."""
    patterns = ("*/README.md", "*/plan.md", "**/*.png")
    found = (path for pattern in patterns for path in sorted(RESULTS.glob(pattern)))
    return {path.relative_to(RESULTS.parent).as_posix(): path for path in found}


def linked_on_site(text: str) -> str:
    """A page of `docs/` links to the results where they lie in the repository; on the site they lie beside it."""
    return text.replace("../examples/results/", "results/")


# ---------------------------------------------------------------------- what MkDocs calls


def on_config(config: Any) -> Any:
    """Put the pages of results into the navigation."""
    for entry in config.nav:
        if "Results" in entry:
            entry["Results"] += [f"results/{name}/README.md" for name in result_pages()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, and the pictures of the results."""
    from mkdocs.structure.files import File

    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))
    for place, source in copied_files().items():
        files.append(File.generated(config, place, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to the results."""
    return linked_on_site(markdown)
