"""`prune-opd view ROLLOUTS -o drift.html`: stored rollouts as one HTML file. Thin over `write_drift_view`."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from prune_opd_hf.cli.parser import SourceArguments
from prune_opd_hf.records.settings import NEEDED, setting


@dataclass(frozen=True)
class ViewArguments(SourceArguments):
    """Arguments of `prune-opd view`."""

    rollouts: str = setting(NEEDED, "a file that Rollouts.save wrote")
    output: str = setting("drift.html", "the HTML file; it needs no network and nothing beside it", aliases=["-o"])
    tokenizer: str | None = setting(
        None, "the student's, to read text instead of token ids: a Hub id, a folder, or 'embedded'"
    )
    limit: int | None = setting(None, "take the first so many rollouts only")
    candidates: int = setting(8, "how many of each model's top-k to keep at each position; most of the file's size")
    force: bool = setting(False, "replace the output if it exists")


def view(arguments: ViewArguments) -> int:
    """Write the viewer and print where it lies; 0."""
    from prune_opd_hf.models.loading import load_tokenizer
    from prune_opd_hf.records.rollouts import Rollouts
    from prune_opd_hf.tasks.pair import resolve_embedded
    from prune_opd_hf.viewer.document import check_view, write_drift_view

    output = Path(arguments.output)
    settings = {name: getattr(arguments, name) for name in ("candidates", "limit", "force")}
    check_view(output, **settings)
    tokenizer = name = None
    if arguments.tokenizer is not None:
        tokenizer = load_tokenizer(resolve_embedded(arguments.tokenizer, "student"), "student", **arguments.loading())
        name = os.path.basename(os.path.normpath(arguments.tokenizer))
    rollouts = Rollouts.load(arguments.rollouts)
    write_drift_view(
        rollouts,
        output,
        tokenizer=tokenizer,
        tokenizer_name=name,
        source=Path(arguments.rollouts).name,
        **settings,
    )
    lengths = rollouts.lengths[: arguments.limit]
    print(
        f"{output}: {len(lengths)} rollouts, {int(lengths.sum()):,} tokens, {output.stat().st_size / 1e6:.1f} MB. Open it in a "
        "browser."
    )
    if tokenizer is None:
        print("It has token ids; pass --tokenizer to read text.", file=sys.stderr)
    return 0
