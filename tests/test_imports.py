"""Imports point one way, from the command line down to the exceptions."""

import ast
from pathlib import Path

import pytest

import prune_opd_hf

PACKAGE = Path(prune_opd_hf.__file__).parent

FLOORS = [
    {"errors"},
    {"algorithm"},
    {"records"},
    {"models"},
    {"serving"},
    {"teachers"},
    {"generation"},
    {"tasks"},
    {"evaluation"},
    {"hub"},
    {"training"},
    {"preflight", "study", "viewer"},
    {"cli"},
]
"""Each room imports only from floors below its own, and from itself."""


def imported_rooms(path: Path) -> set[str]:
    """Rooms of the package that a file imports, at its top or inside a function; not what only a type checker reads."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    only_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    names = []
    for node in ast.walk(tree):
        if id(node) in only_types:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{path}: a relative import may name a neighbour, no other room"
            module = "" if node.level else node.module or ""
            names += [f"{module}.{alias.name}" if module == "prune_opd_hf" else module for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("prune_opd_hf.")}


def files_of(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def test_every_room_of_the_package_has_a_floor():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.rglob("*.py"))}
    assert rooms - {"__init__", "__pycache__"} == set().union(*FLOORS)


@pytest.mark.parametrize("room", sorted(set().union(*FLOORS)))
def test_a_room_imports_only_from_floors_below(room):
    floor = next(index for index, rooms in enumerate(FLOORS) if room in rooms)
    allowed = {room, "__version__"}.union(*FLOORS[:floor])
    upward = {
        f"{path.relative_to(PACKAGE)} -> {target}"
        for path in files_of(room)
        for target in imported_rooms(path) - allowed
    }
    assert not upward
