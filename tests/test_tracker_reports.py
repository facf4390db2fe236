"""The page of public reports names tests that are there."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "tracker_reports.md").read_text(encoding="utf-8")


def functions_of(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_is_named_is_there():
    named = set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE))
    assert len(named) > 100
    missing = {
        f"{file}::{test}"
        for file, test in named
        if not (TESTS / file).is_file() or test not in functions_of(TESTS / file)
    }
    assert not missing


def test_every_line_of_a_table_names_a_report_or_says_that_none_was_found_and_a_test():
    kinds, _, further = PAGE.partition("## Twenty-eight further reports")
    rows = [line for line in kinds.splitlines() if line.startswith("|") and line.count("|") == 6 and "---" not in line]
    rows = [row for row in rows if not row.startswith(("| case |", "| family |")) and ".py::" in row]
    assert len(rows) > 70
    for row in rows:
        reports = row.split("|")[3]
        assert re.search(r"[\w.-]+/[\w.-]+#\d+|none found", reports), row
    reports = [line for line in further.splitlines() if re.match(r"\| [\w.-]+/[\w.-]+#\d+", line)]
    assert len(reports) == 28
    assert not {line.split("|")[1] for line in reports} & {
        part for row in rows for part in row.split("|")[3].split(",")
    }
