"""The card of a saved student with its records and figures, without its weights: `make_card.py STUDENT CARD_FOLDER`."""

import shutil
import sys
from pathlib import Path

from prune_opd_hf.errors import PruneOPDError
from prune_opd_hf.hub import CardOptions, License, build_bundle
from prune_opd_hf.tasks import ChainTask

APACHE = License("apache-2.0")
CARDS = {
    "embedded-student": (
        "Prune-OPD student of the embedded chain task",
        CardOptions(
            license=APACHE,
            example_prompt=ChainTask().problems(1, seed=0, split="evaluation")[0].prompt,
            limitations=("It solves one made-up task, chains of arithmetic modulo 10, and nothing else.",),
        ),
    ),
    "smollm2-27-layers": (
        "SmolLM2-135M-Instruct without three of its layers, distilled from the whole",
        CardOptions(
            license=APACHE,
            language="en",
            limitations=(
                "It was trained on 240 templated questions about 24 topics, with answers of up to 64 tokens, to measure the "
                "training and for nothing else. It answers worse than its teacher: on 60 held-out questions the reverse KL from it "
                "fell from 0.398 to 0.343 nats a token in these 24 steps.",
            ),
        ),
    ),
}
"""Name and options by the folder of the card."""
KEPT = ("README.md", "training_summary.json", "evaluation/", "figures/")


def main(student: str, folder: str) -> None:
    """Make the card anew; what an earlier one left is removed."""
    root = Path(folder)
    name, options = CARDS[root.name]
    bundle = build_bundle(student, name=name, options=options)
    shutil.rmtree(root, ignore_errors=True)
    for path, content in bundle.files.items():
        if path.startswith(KEPT):
            place = root / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content if isinstance(content, bytes) else content.read_bytes())


if __name__ == "__main__":
    if len(sys.argv) != 3 or Path(sys.argv[2]).name not in CARDS:
        sys.exit(f"usage: make_card.py STUDENT CARD_FOLDER, whose last part is one of {', '.join(CARDS)}")
    try:
        main(*sys.argv[1:])
    except PruneOPDError as error:
        sys.exit(f"make_card.py: {error}")
