"""The scripts in cells run from top to bottom and show what their text says."""

import runpy
from pathlib import Path

import pytest
from site_pages import NOTEBOOKS, script_page
from transformers import AutoModelForCausalLM

from prune_opd_hf.records.training_summary import TrainingSummary


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The names that a script leaves, and the folder that it ran in."""

    def run(name):
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            return runpy.run_path(str(NOTEBOOKS / f"{name}.py")), folder

    return run


def test_watch_and_prune(ran):
    names, folder = ran("watch_and_prune")
    watched, pruned, found = (names[name] for name in ("watched", "pruned", "found"))
    assert found["event at once"] > len(watched) / 2  # "most responses"
    assert 0 < found["no event"] < len(watched) / 4  # "a few"
    assert set(watched.stop_reason) <= {"eos", "length"}
    assert pruned.stop_reason.count("drift") > len(pruned) / 4
    assert pruned.lengths.sum() < watched.lengths.sum()
    early, late = (watched.overlap[:, at][watched.response_mask[:, at]].mean() for at in (slice(12), slice(60, 72)))
    assert late < early
    assert (folder / "runs" / "drift.html").stat().st_size > 10_000


def test_train_evaluate_compare(ran):
    names, folder = ran("train_evaluate_compare")
    plain, pruned = (names["trainers"][name] for name in ("plain", "pruned"))
    assert plain.counts.kept == plain.counts.generated
    assert pruned.counts.generated < plain.counts.generated
    before, after = (names["reports"][name]["chain"].metrics["avg@2"].value for name in ("before", "pruned"))
    assert after > before
    assert AutoModelForCausalLM.from_pretrained(folder / "runs" / "drift").num_parameters() > 0
    assert TrainingSummary.load(folder / "runs" / "drift").pruning == "drift"


def test_a_page_of_the_documentation_has_the_text_as_text_and_the_code_as_code(tmp_path):
    script = tmp_path / "example.py"
    script.write_text(
        "# %% [markdown]\n# # Title\n#\n# Two `words`.\n\n# %%\nx = 1  # one\n\n# %% [markdown]\n# ## End\n"
    )
    assert script_page(script) == (
        "# Title\n\nTwo `words`.\n\n```python\nx = 1  # one\n```\n\n## End\n\n"
        "*This page is the script `examples/notebooks/example.py`, which the tests run.*\n"
    )
    assert {path.name for path in Path(NOTEBOOKS).glob("*.py")} == {"watch_and_prune.py", "train_evaluate_compare.py"}
