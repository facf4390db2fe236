"""Completions of a step, each with the place where it drifted: in the terminal, and as a table in the trackers that have tables."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from pandas import DataFrame
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from prune_opd_hf.algorithm.drift import RELIABILITY_FLOOR
from prune_opd_hf.records.files import printable
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.training.config import PruneOPDConfig

DRIFT_MARK = "⟦"
EXHAUSTED_MARK = "⟧"
"""Stand before the first drifted token and before the first whose reliability is used up."""

PROMPT_CHARACTERS = 160
TABLE_TRACKERS = ("trackio", "wandb")
"""Trackers whose module has `log` and `Table`."""


def log_completions(rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase, args: PruneOPDConfig, *, step: int) -> None:
    """Print `num_completions_to_print` completions, and send them to those of `TABLE_TRACKERS` that the run reports to."""
    found = completions(rollouts, tokenizer, rows=args.num_completions_to_print)
    console = Console()
    console.print()  # off the line of the progress bar
    console.print(completions_table(found, step=step))
    plain = [{"step": step, **each, "completion": each["completion"].plain} for each in found]
    for name in (name for name in TABLE_TRACKERS if name in args.report_to):
        tracker = import_module(name)
        # trackio counts calls of `log` as steps; wandb's axis is train/global_step.
        at = {"step": step} if name == "trackio" else {}
        if getattr(tracker, "run", tracker) is not None:  # wandb has none where it is switched off
            tracker.log({"completions": tracker.Table(dataframe=DataFrame(plain))}, **at)


def completions(rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase, *, rows: int | None) -> list[dict[str, Any]]:
    """The first rows of a step, or all: prompt, marked completion, and what became of it."""
    found = []
    for row in range(len(rollouts))[:rows]:
        mask = rollouts.response_mask[row]
        teacher = {"teacher": rollouts.teachers[row]} if rollouts.teachers else {}
        found.append(
            {
                **teacher,
                "prompt": tokenizer.decode(rollouts.prompt_ids[row][rollouts.prompt_mask[row]]),
                "completion": marked_completion(rollouts, row, tokenizer),
                "stop_reason": rollouts.stop_reason[row],
                "tokens": int(mask.sum()),
                "effective_length": int(rollouts.effective_lengths[row]),
                "drift_events": int(rollouts.drift_events[row][mask].sum()),
                "overlap": None if rollouts.overlap is None else float(rollouts.overlap[row][mask].mean()),
            }
        )
    return found


def completions_table(found: Sequence[Mapping[str, Any]], *, step: int) -> Table:
    """What `completions` returns, for a terminal of 80 columns or more."""
    table = Table(
        title=f"Completions of step {step} ({DRIFT_MARK} first drift event, {EXHAUSTED_MARK} reliability used up)",
        show_lines=True,
    )
    table.add_column("prompt", ratio=2)
    table.add_column("completion", ratio=5)
    table.add_column("ended by", no_wrap=True)
    for each in found:
        prompt = each["prompt"]
        prompt = prompt if len(prompt) <= PROMPT_CHARACTERS else "... " + prompt[-PROMPT_CHARACTERS:]
        ended = [each["stop_reason"], f"{each['tokens']} tokens", f"{each['drift_events']} events"]
        if each["overlap"] is not None:
            ended.append(f"overlap {each['overlap']:.2f}")
        table.add_row(escape(printable(prompt, lines=True)), each["completion"], "\n".join(ended))
    return table


def marked_completion(rollouts: Rollouts, row: int, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The text of one response: plain while fully reliable, yellow from the first drift event on, red where nothing is left.

    The marks ⟦ and ⟧ stand at both borders, so that it reads without colours as well.
    """
    ids = rollouts.response_ids[row][rollouts.response_mask[row]].tolist()
    reliability = rollouts.reliability[row][: len(ids)].tolist()
    drifted = next((index for index, value in enumerate(reliability) if value < 1), len(ids))
    exhausted = next((index for index, value in enumerate(reliability) if value <= RELIABILITY_FLOOR), len(ids))
    exhausted = max(exhausted, drifted)

    def text_of(part: list[int]) -> str:
        return printable(tokenizer.decode(part), lines=True)

    text = Text(text_of(ids[:drifted]))
    if drifted < len(ids):
        text.append(f" {DRIFT_MARK} " + text_of(ids[drifted:exhausted]), style="yellow")
    if exhausted < len(ids):
        text.append(f" {EXHAUSTED_MARK} " + text_of(ids[exhausted:]), style="red")
    return text
