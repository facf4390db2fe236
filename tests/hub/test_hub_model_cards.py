"""The checked-in card is what the code makes of the checked-in records, and tells nothing of the machine it was made on."""

import importlib.util
from pathlib import Path

from loopback_hub.cards import card_errors

from prune_opd_hf.hub import ModelFacts, StudentRecords, build_card
from prune_opd_hf.hub.leaks import Machine, find_leaks

FOLDER = Path(__file__).parents[2] / "model_cards"
STUDENT = FOLDER / "embedded-student"
FACTS = ModelFacts("Qwen3ForCausalLM", 86_400, "float32", context_length=512)


def script():
    specification = importlib.util.spec_from_file_location("make_card", FOLDER / "make_card.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_card_is_what_the_records_say():
    records, made = StudentRecords.load(STUDENT), script()
    captions = {
        "Overlap by position over training": "figures/overlap_by_position.png",
        "Response budget and response length": "figures/response_budget.png",
        "Tokens kept, and what stopping saved": "figures/tokens.png",
        "Reward": "figures/reward.png",
    }
    card = build_card(records, name=made.NAME, facts=FACTS, figures=captions, options=made.OPTIONS)
    assert str(card) == (STUDENT / "README.md").read_text(), "make it again with model_cards/make_card.py"
    for path in captions.values():
        assert (STUDENT / path).is_file()


def test_the_card_is_valid_and_compares_the_student_with_the_others():
    text = (STUDENT / "README.md").read_text()
    assert card_errors(text) == []
    assert set(StudentRecords.load(STUDENT).comparisons) >= {"base student", "OPD", "teacher"}


def test_nothing_of_a_machine_is_checked_in():
    nobody = Machine(secrets={}, paths=[], names=[])
    for path in FOLDER.rglob("*"):
        if path.suffix in {".md", ".json", ".csv", ".py"}:
            assert list(find_leaks(path.name, path.read_text(), nobody)) == []
