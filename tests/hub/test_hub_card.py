"""Cards: metadata by the Hub's rules, every number beside its settings, hostile words inert, nothing guessed."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback_hub.cards import card_errors
from loopback_hub.student_folders import evaluation_report, save_student, training_summary
from markdown_it import MarkdownIt

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.hub.bundle import build_bundle
from prune_opd_hf.hub.card import CardOptions, License, ModelFacts, build_card
from prune_opd_hf.hub.results import eval_results_files
from prune_opd_hf.records.statistics import Estimate
from prune_opd_hf.records.student_records import StudentRecords

HASH = "sha256:" + "a" * 64
FACTS = ModelFacts("Qwen3ForCausalLM", 5808, "float32", context_length=64)
parser = MarkdownIt("commonmark").enable("table")


def card_of(
    training=None, reports=(), comparisons=None, *, name="student", facts=FACTS, figures=None, **options
) -> ModelCard:
    records = StudentRecords(
        training, tuple(reports), {name: tuple(each) for name, each in (comparisons or {}).items()}
    )
    return build_card(records, name=name, facts=facts, figures=figures, options=CardOptions(**options))


def code_blocks(card: ModelCard, language: str) -> list[str]:
    return [token.content for token in parser.parse(card.text) if token.type == "fence" and token.info == language]


def tables(card: ModelCard) -> list[list[list[str]]]:
    found: list[list[list[str]]] = []
    tokens = parser.parse(card.text)
    for before, token in pairwise(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif before.type in {"td_open", "th_open"}:
            found[-1][-1].append("".join(child.content for child in token.children or []))
    return found


def test_metadata_follows_the_hubs_rules():
    card = card_of(
        training_summary(dataset="org/prompts"), [evaluation_report(HASH)], license=License("apache-2.0"), language="en"
    )
    data = card.data.to_dict()
    assert card_errors(str(card)) == []
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["license"] == "apache-2.0"
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "finetune")
    assert data["datasets"] == ["org/prompts"]
    assert data["tags"] == ["on-policy-distillation", "prune-opd"]
    assert ModelCard(str(card)).data.to_dict() == data  # what a reader parses


def test_stops_are_claimed_where_there_were_some():
    def text(**changes):
        return " ".join(card_of(training_summary(**changes)).text.split())

    stopped = text()  # 150 tokens saved, 450 - 300 sampled in vain
    assert "weighted down and stopped once they have drifted" in stopped
    assert "Training stopped answers early where teacher and student disagreed;" in stopped
    whole = text(saved_tokens=0, kept_tokens=450)
    assert "weighted down once they have drifted from what the teacher can judge. None of them was stopped" in whole
    assert "Training stopped answers early" not in whole
    unweighted = text(hyperparameters={"reliability_weights": False})
    assert "answers are stopped once they have drifted" in unweighted
    control = text(pruning="fixed")
    assert "cut at lengths that do not look at it (pruning `fixed`), a control" in control
    assert "drifted from" not in control
    assert "Training stopped answers early; behaviour" in control
    plain = text(pruning="none", saved_tokens=0, kept_tokens=450)
    assert "stopped answers early" not in plain


def test_the_model_index_holds_each_score_in_percent_with_its_interval_and_settings():
    card = card_of(None, [evaluation_report(HASH, value=0.75)], name="my student")
    (model,) = card.data.to_dict()["model-index"]
    assert model["name"] == "my student"
    (result,) = model["results"]
    assert result["dataset"] == {"name": "chain", "type": "embedded"}
    (metric,) = result["metrics"]
    assert (metric["type"], metric["name"], metric["value"]) == ("accuracy", "avg@2", 75.0)
    assert metric["args"]["interval_95"] == [55.0, 85.0]
    assert metric["args"]["temperature"] == 1.0
    assert "verif" not in str(card).lower()


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, "none: trained from scratch"),
        ("/home/me/models/qwen", "qwen (local)"),
        ("a name with spaces", "a name with spaces"),
    ],
)
def test_a_base_that_is_not_on_the_hub_is_left_out_and_said_so(base, said):
    card = card_of(training_summary(student_base=base))
    assert not {"base_model", "base_model_relation"} & set(card.data.to_dict())
    assert said in card.text
    assert "/home/me" not in str(card)
    assert "None" not in str(card)


def test_an_adapter_says_that_it_is_one():
    card = card_of(training_summary(), facts=replace(FACTS, architecture="LORA", adapter=True))
    data = card.data.to_dict()
    assert (data["library_name"], data["base_model_relation"]) == ("peft", "adapter")
    assert "`peft`" in card.text


def test_without_pruning_a_student_does_not_bear_its_name():
    card = card_of(training_summary(pruning="none"))
    assert card.data.tags == ["on-policy-distillation"]


def test_no_licence_is_not_guessed():
    card = card_of(training_summary())
    assert "license" not in card.data.to_dict()
    assert "not stated by its publisher" in card.text


def test_another_licence_comes_with_name_and_link():
    other = License("other", name="qwen-research", link="https://example.org/LICENSE")
    card = card_of(None, license=other)
    data = card.data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", other.name, other.link)
    assert card_errors(str(card)) == []
    assert "[qwen-research](<https://example.org/LICENSE>)" in card.text


@pytest.mark.parametrize("wrong", [{"id": "other"}, {"id": "mit", "name": "x"}, {"id": "other", "name": "x"}])
def test_a_licence_that_the_hub_would_refuse_is_refused_here(wrong):
    with pytest.raises(ConfigError, match="licen"):
        License(**wrong)


def test_results_stand_beside_the_other_models_and_copies_of_a_benchmark_are_not_mixed():
    student = evaluation_report(HASH, value=0.75)
    teacher = evaluation_report(
        "sha256:" + "b" * 64, model_name="org/teacher", value=0.9, metrics={"avg@2": Estimate(0.9, 0.8, 1.0, "m")}
    )
    other_copy = evaluation_report("sha256:" + "c" * 64, value=0.2, content_hash="sha256:" + "1" * 64)
    card = card_of(None, [student], comparisons={"base student": [other_copy], "teacher": [teacher]})
    assert tables(card)[1] == [
        ["benchmark", "metric", "this student", "base student", "teacher"],
        ["chain", "avg@2", "75.0 [55.0, 85.0]", "not measured", "90.0 [80.0, 100.0]"],
    ]
    for column in ("this student", "base student", "teacher"):
        assert any(row[0] == column for row in tables(card)[2])
    twice = card_of(None, [student, evaluation_report(HASH, metrics={"avg@2": Estimate(0.6, 0.5, 0.7, "m")})])
    assert tables(twice)[1][1] == ["chain", "avg@2", "75.0 [55.0, 85.0]; 60.0 [50.0, 70.0]"]  # of other settings


def test_another_model_cannot_take_the_students_column():
    other = evaluation_report("sha256:" + "b" * 64, model_name="org/teacher", value=0.9)
    with pytest.raises(ConfigError, match="column of the student itself"):
        card_of(None, [evaluation_report(HASH)], comparisons={"this student": [other]})


def test_sampling_settings_stand_with_the_scores():
    text = card_of(None, [evaluation_report(HASH)]).text.replace("\\", "")
    assert "2 samples a problem, temperature 1.0, top_p 0.95, top_k off, at most 32 new tokens, seed 0" in text


def test_without_a_report_nothing_is_claimed():
    card = card_of(training_summary())
    assert "Not evaluated yet" in card.text
    assert "model-index" not in card.data.to_dict()


def test_equal_records_give_equal_cards():
    arguments = (training_summary(), [evaluation_report(HASH)])
    assert str(card_of(*arguments)) == str(card_of(*arguments))


def test_saved_tokens_are_called_an_upper_bound():
    # 8 s of generation and 1 s of teacher for 450 tokens: 150 tokens are worth 3 s.
    row = ["Tokens saved by stopping", "at most 150, 3.0 s of generation at this run's pace"]
    assert row in tables(card_of(training_summary()))[1]


def test_the_snippet_asks_what_the_student_was_trained_on():
    (snippet,) = code_blocks(card_of(training_summary(example_prompt="/think 1 + 1 =")), "python")
    assert '"/think 1 + 1 ="' in snippet


def test_registered_benchmarks_get_their_own_file_and_no_others():
    registered = evaluation_report(HASH, source="MathArena/aime_2026", revision="c" * 40, value=0.75)
    files = eval_results_files([evaluation_report(HASH), registered])
    assert list(files) == [".eval_results/MathArena--aime_2026.yaml"]
    (entry,) = yaml.safe_load(files[".eval_results/MathArena--aime_2026.yaml"])
    assert entry["dataset"] == {"id": "MathArena/aime_2026", "task_id": "MathArena/aime_2026", "revision": "c" * 40}
    assert entry["value"] == 75.0
    assert "temperature 1.0" in entry["notes"]
    assert "verifyToken" not in entry


HOSTILE = [
    'a"b',
    "a'b: c",
    "a\nlicense: mit",
    "a\n---\n# Injected",
    "# Injected",
    "![x](http://evil/x.png)",
    "[x](javascript:alert(1))",
    "<script>alert(1)</script>",
    "| a | b |",
    "```\n# Injected",
    "`` ` ``",
    "{{ 7 * 7 }}{% for x in y %}",
    "🙂\u202egnp.exe",
    "*bold* _it_ ~~no~~",
    "!!python/object/apply:os.system ['x']",
    "&anchor *alias",
    "- item",
    "\\",
    "null",
    "yes",
    "1e3",
    "\x00\x1b[31m",
    "\ud800x",
]
hostile = st.one_of(st.sampled_from(HOSTILE), st.text(min_size=1, max_size=30)).filter(
    lambda words: words.strip() and words.isprintable() | ("\n" in words)
)


def shown(words: str) -> str:
    """What a report lets through in the names of a benchmark."""
    return "".join(character for character in words if character.isprintable())


@pytest.mark.parametrize("blank", ["\n\uab6c", " \t"])
def test_a_licence_whose_name_or_link_shows_nothing_is_refused(blank):
    for name, link in ((blank, "https://example.org"), ("mine", blank)):
        with pytest.raises(ConfigError, match="needs a name and a link"):
            License("other", name=name, link=link)


@settings(max_examples=40)
@given(*[hostile] * 7)
def test_hostile_words_leave_the_card_valid_and_inert(first, second, third, fourth, fifth, sixth, seventh):
    training = training_summary(
        dataset=first,
        teacher=second,
        student_base=third,
        loss=fourth,
        hardware=fifth,
        hyperparameters={sixth: seventh, "x": [first]},
    )
    report = evaluation_report(HASH, grader=shown(first))
    report = replace(
        report,
        hardware=shown(second),
        benchmarks=(replace(report.benchmarks[0], name="n" + shown(third), source="s" + shown(fourth)),),
    )
    card = card_of(
        training,
        [report],
        name=f"n{fifth}",
        comparisons={sixth: [report], f"{seventh}2": []},
        figures={first: f"figures/{second}.png"},
        preflight={third: fourth},
        example_prompt=fifth,
        limitations=(sixth, seventh),
        license=License("other", name="l" + first, link="https://example.org/" + second),
    )
    text = str(card)
    text.encode()
    benign = card_of(training_summary(), [evaluation_report(HASH)], name="n")
    errors = [error for error in card_errors(text) if not error.startswith(("base_model", "datasets"))]
    assert errors == []
    metadata = yaml.safe_load(text.split("\n---\n")[0])
    assert set(metadata) <= {*benign.data.to_dict(), "license", "license_name", "license_link", "datasets"}
    assert metadata["license"] == "other"
    tokens = parser.parse(card.text)
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"][1:]
    assert headings == [
        "Use it", "Results", "How it was trained", "Drift", "Response budget", "Versions", "Seeds",
        "Compatibility of teacher and student", "Repeat it", "Limitations", "Citation",
    ]  # fmt: skip
    children = [child for token in tokens for child in token.children or []]
    assert all(child.content in {"<code>", "</code>"} for child in children if child.type == "html_inline")
    blocks = [token.content.strip() for token in tokens if token.type == "html_block"]
    assert blocks == ["<details><summary>Hyperparameters</summary>", "</details>"]
    addresses = [child.attrs["href"] for child in children if child.type == "link_open"]
    assert all(re.match(r"https://(huggingface\.co|arxiv\.org|example\.org)/", address) for address in addresses)
    assert [child.attrs["src"] for child in children if child.type == "image"] == [
        address
        for address in [child.attrs["src"] for child in children if child.type == "image"]
        if address.startswith("figures/")
    ]


@pytest.mark.parametrize("name", ["", "\n", "\x00"])
def test_a_card_needs_a_name(name):
    with pytest.raises(ConfigError, match="name"):
        card_of(None, name=name)


def snippet_of(chat: bool) -> str:
    """The usage snippet of a card, asking something that needs care with quotes."""
    prompt = '1+2*3="""\'\\'
    card = card_of(facts=replace(FACTS, chat=chat), example_prompt=prompt)
    (snippet,) = code_blocks(card, "python")
    return f"{snippet}\nassert output.shape[1] > inputs['input_ids'].shape[1]\n"


@pytest.mark.parametrize("chat", [False, True])
def test_the_snippet_runs_as_it_stands(tmp_path, monkeypatch, chat):
    monkeypatch.chdir(save_student(tmp_path / "student", chat=chat))
    exec(compile(snippet_of(chat), "snippet", "exec"), {})


@given(st.text(max_size=40))
@settings(max_examples=40)
def test_whatever_the_snippet_asks_is_one_literal_in_it(prompt):
    (snippet,) = code_blocks(card_of(example_prompt=prompt or "x"), "python")
    asked = re.search(r"^prompt = (.*)$", snippet, re.MULTILINE)
    assert asked is not None
    compile(snippet, "snippet", "exec")
    if not any(0xD800 <= ord(character) < 0xE000 for character in prompt):
        assert eval(asked[1]) == (prompt or "x")


def test_without_matplotlib_the_bundle_says_that_the_card_has_no_figures(tmp_path, without_matplotlib):
    bundle = build_bundle(save_student(tmp_path / "student"))
    assert not any(path.startswith("figures/") for path in bundle.files)
    assert "warning: the card has no figures: figures need matplotlib: pip install" in bundle.describe()


def test_the_figures_of_a_run_are_shown_and_shipped(tmp_path):
    bundle = build_bundle(save_student(tmp_path / "student"))
    images = [
        child.attrs["src"]
        for token in parser.parse(bundle.card.text)
        for child in token.children or []
        if child.type == "image"
    ]
    assert images == [
        "figures/overlap_by_position.png",
        "figures/response_budget.png",
        "figures/tokens.png",
        "figures/reward.png",
    ]
    for image in images:
        assert bundle.files[image].startswith(b"\x89PNG")
        assert image.replace(".png", ".csv") in bundle.files
