"""The card of a saved student with its records and figures, without its weights: `make_card.py STUDENT CARD_FOLDER`."""

import shutil
import sys
from pathlib import Path

from prune_opd_hf.errors import PruneOPDError
from prune_opd_hf.hub import CardOptions, License, build_bundle
from prune_opd_hf.tasks import ChainTask

OPTIONS = CardOptions(
    license=License("apache-2.0"),
    example_prompt=ChainTask().problems(1, seed=0, split="evaluation")[0].prompt,
    limitations=("It solves one made-up task, chains of arithmetic modulo 10, and nothing else.",),
)
KEPT = ("README.md", "training_summary.json", "evaluation/", "figures/")
NAME = "Prune-OPD student of the embedded chain task"


def main(student: str, folder: str) -> None:
    """Make the card anew; what an earlier one left is removed."""
    bundle = build_bundle(student, name=NAME, options=OPTIONS)
    root = Path(folder)
    shutil.rmtree(root, ignore_errors=True)
    for path, content in bundle.files.items():
        if path.startswith(KEPT):
            place = root / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content if isinstance(content, bytes) else content.read_bytes())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: make_card.py STUDENT CARD_FOLDER")
    try:
        main(*sys.argv[1:])
    except PruneOPDError as error:
        sys.exit(f"make_card.py: {error}")
