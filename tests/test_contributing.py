"""CONTRIBUTING.md speaks of the package as it is."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "prune_opd_hf"


def test_its_tree_names_every_file_of_the_package_and_no_other():
    tree = re.search(r"```\nprune_opd_hf/\n(.*?)```", TEXT, flags=re.DOTALL)[1]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    there = {path.name for path in PACKAGE.rglob("*.py") if "math_grader" not in path.parts}
    assert named - there == set()
    assert there - named - {"__main__.py", "metric.py"} == set()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([a-z_]+/[\w/]+\.(?:py|js))", TEXT))))
def test_every_file_that_it_sends_a_reader_to_is_there(path):
    assert (PACKAGE / path).is_file() or (ROOT / path).is_file() or path == "teachers/served.py"
