"""The checked-in card is what the code makes of the checked-in records, and tells nothing of the machine it was made on."""

import importlib.util
from pathlib import Path

import pytest
from loopback_hub.cards import card_errors

from prune_opd_hf.hub import ModelFacts, StudentRecords, build_card
from prune_opd_hf.hub.leaks import Machine, find_leaks

FOLDER = Path(__file__).parents[2] / "model_cards"
STUDENT = FOLDER / "embedded-student"
FACTS = {
    "embedded-student": ModelFacts("Qwen3ForCausalLM", 86_400, "float32", context_length=512),
    "smollm2-27-layers": ModelFacts("LlamaForCausalLM", 123_894_720, "float32", context_length=8192, chat=True),
}
FIGURES = {
    "overlap_by_position": "Overlap by position over training",
    "response_budget": "Response budget and response length",
    "tokens": "Tokens kept, and what stopping saved",
    "reward": "Reward",
}


def script():
    specification = importlib.util.spec_from_file_location("make_card", FOLDER / "make_card.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", FACTS)
def test_the_card_is_what_the_records_say(folder):
    student = FOLDER / folder
    name, options = script().CARDS[folder]
    captions = {
        caption: f"figures/{file}.png"
        for file, caption in FIGURES.items()
        if (student / f"figures/{file}.png").is_file()
    }
    assert captions
    card = build_card(StudentRecords.load(student), name=name, facts=FACTS[folder], figures=captions, options=options)
    text = (student / "README.md").read_text()
    assert str(card) == text, "make it again with model_cards/make_card.py"
    assert card_errors(text) == []
    assert set(FACTS) == set(script().CARDS)


def test_the_card_compares_the_student_with_the_others():
    assert set(StudentRecords.load(STUDENT).comparisons) >= {"base student", "OPD", "teacher"}


def test_nothing_of_a_machine_is_checked_in():
    nobody = Machine(secrets={}, paths=[], names=[])
    for path in FOLDER.rglob("*"):
        if path.suffix in {".md", ".json", ".csv", ".py"}:
            assert list(find_leaks(path.name, path.read_text(), nobody)) == []
