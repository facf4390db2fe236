"""The documentation speaks of the package as it is: its code runs, and every option, setting and page that it names is there."""

import ast
import posixpath
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from site_pages import UNITS, arguments_of, commands_page, copied_files, linked_on_site, pages, settings_page
from transformers import TrainingArguments

import prune_opd_hf
from prune_opd_hf import PruneOPDConfig
from prune_opd_hf.cli import COMMANDS
from prune_opd_hf.cli.train import ScriptArguments
from prune_opd_hf.training.evaluate_student import METRICS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WRITTEN = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
WRITTEN["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = sorted(WRITTEN)

RUNS = "<!-- runs -->\n"
BLOCK = re.compile(rf"({re.escape(RUNS)})?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://)([^)\s]+)\)")
SETTINGS = {item.name for item in fields(PruneOPDConfig)}
OF_TRAINING = SETTINGS | {item.name for item in fields(ScriptArguments)} | {"config"}
OF_OTHERS = {  # of vllm, accelerate, torchrun and make
    *("enable_scale_out", "max_logprobs", "max_model_len", "host", "port", "enable_lora", "max_lora_rank"),
    *("max_num_seqs", "max_num_batched_tokens", "no_enable_chunked_prefill", "no_enable_prefix_caching", "block_size"),
    "skip_tokenizer_init",
    *("config_file", "num_processes", "nproc_per_node"),
}
FROM_TRL = "docs/guides/from_trl.md"  # names settings of TRL, which tests/training/test_training_settings.py compares
SOURCES = [*ROOT.glob("prune_opd_hf/**/*.py"), *ROOT.glob("examples/generate_repository/**/*.py")]
SOURCES += [*ROOT.glob("examples/configs/**/*.yaml")]
WORDS = set(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)))
WORDS |= {item.name for item in fields(TrainingArguments)} | {f"eval_{name}" for name in METRICS}


def blocks(name, language):
    return [(bool(mark), code) for mark, of, code in BLOCK.findall(WRITTEN[name]) if of == language]


def options_of(command):
    record = arguments_of(command)
    return OF_TRAINING if record is None else {item.name for item in fields(record)} | {"config"}


EVERY_OPTION = OF_OTHERS.union(*map(options_of, COMMANDS))


@pytest.mark.parametrize("name", [name for name in NAMES if any(runs for runs, _ in blocks(name, "python"))])
def test_the_code_of_a_page_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for runs, code in blocks(name, "python"):
        if runs:
            exec(compile(code, name, "exec"), names)


@pytest.mark.parametrize("name", NAMES)
def test_python_parses_and_gives_the_config_settings_that_it_has(name):
    for _, code in blocks(name, "python"):
        for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
            if getattr(call.func, "id", None) == "PruneOPDConfig":
                assert {keyword.arg for keyword in call.keywords} <= SETTINGS


@pytest.mark.parametrize("name", NAMES)
def test_yaml_has_settings_of_training_alone(name):
    for _, code in blocks(name, "yaml"):
        assert set(yaml.safe_load(code)) <= OF_TRAINING


def options_in(text):
    return {option.replace("-", "_") for option in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_there_and_in_a_command_is_one_of_that_command(name):
    assert options_in(WRITTEN[name]) - EVERY_OPTION == set()
    for code in (code for language in ("", "bash") for _, code in blocks(name, language)):
        for command, rest in re.findall(r"^prune-opd (\w+)(.*)$", code.replace("\\\n", " "), flags=re.MULTILINE):
            assert options_in(rest) - options_of(command) == set(), command


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("docs/tracker_reports.md", FROM_TRL)])
def test_every_name_in_code_stands_in_the_package(name):
    named = re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)(?=[`=:/. ])", BLOCK.sub("", WRITTEN[name]))
    assert {each for each in named if not each.startswith("test_")} - WORDS == set()


COPIED = copied_files()
ON_SITE = {place.removeprefix("docs/"): linked_on_site(text) for place, text in WRITTEN.items() if place != "README.md"}
ON_SITE |= {place: path.read_text(encoding="utf-8") for place, path in COPIED.items() if path.suffix == ".md"} | pages()
MADE = {DOCS / place for place in pages()}


@pytest.mark.parametrize("name", NAMES)
def test_every_link_within_the_project_leads_somewhere(name):
    for target in LINK.findall(BLOCK.sub("", WRITTEN[name])):
        path = ((ROOT / name).parent / target.partition("#")[0]).resolve()
        assert path.exists() or path in MADE, target


def anchors(text):
    """The anchors of a page's headings, as MkDocs and GitHub make them: "4. Watch it" is at #4-watch-it."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("place", sorted(ON_SITE))
def test_every_link_and_picture_of_the_site_is_there(place):
    for link in LINK.findall(BLOCK.sub("", ON_SITE[place])):
        target, _, anchor = link.partition("#")
        found = posixpath.normpath(posixpath.join(posixpath.dirname(place), target)) if target else place
        assert found in ON_SITE or found in COPIED, link
        assert not anchor or anchor in anchors(ON_SITE[found]), link


def test_the_site_is_built_strictly():
    """MkDocs counts the warnings that it logs: with --quiet it logs none, and --strict means nothing."""
    command = re.search(r"mkdocs build.*", (ROOT / "Makefile").read_text(encoding="utf-8"))[0]
    assert "--strict" in command
    assert "-q" not in command


def test_the_page_of_settings_has_each_once_with_its_default_its_help_and_where_it_is_a_number_its_unit():
    page = settings_page()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, flags=re.MULTILINE))
    ours = set(PruneOPDConfig.__annotations__)
    assert set(rows) == ours
    assert len(re.findall(r"^\| `\w+` \|", page, flags=re.MULTILINE)) == len(ours)
    numbers = {
        item.name
        for item in fields(PruneOPDConfig)
        if item.name in ours and re.search(r"\b(int|float)\b", str(item.type))
    }
    assert numbers == set(UNITS)
    assert rows["budget_patience"] == "`3` steps | Misses in a row before the cap shrinks. Acts with `pruning` `drift`."


def test_the_page_of_commands_has_every_command_and_option():
    page = commands_page()
    for name in COMMANDS:
        part = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        record = arguments_of(name)
        assert set(re.findall(r"^\| `--(\w+)` \|", part, flags=re.MULTILINE)) == (
            set() if record is None else {item.name for item in fields(record) if item.init}
        )


def test_the_page_of_the_api_has_every_public_name():
    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    of_modules = {"overlap": r"\w*overlap|\w+_accepts", "errors": "PruneOPDError"}
    named = set(re.findall(r"^::: [\w.]*\.(\w+)$", page, flags=re.MULTILINE)) | {"Teacher"}
    missing = set(prune_opd_hf.__all__) - named
    assert of_modules.keys() <= named
    assert {name for name in missing if not any(re.fullmatch(of, name) for of in of_modules.values())} == set()


def test_the_readme_is_short():
    assert len(WRITTEN["README.md"].splitlines()) < 150
