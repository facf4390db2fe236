"""What a user sees and keeps of a run: the progress line, the table of completions, rollouts on disk.

Callbacks only; what they show is made in `completions.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.training.completions import completions_table, evaluation_line, progress_line
from prune_opd_hf.training.config import PruneOPDConfig

ROLLOUTS_FOLDER = "rollouts"


def readable(logs: dict[str, Any] | None, state: Any) -> str | None:
    """A log call as one line; None for one that has nothing to say to a person."""
    if not logs:
        return None
    if "loss" in logs:
        return progress_line(logs, state.global_step, state.max_steps)
    return evaluation_line(logs) if any(name.startswith("eval_") for name in logs) else None


class ProgressLine(ProgressCallback):
    """The Trainer's progress bar, with one readable line for each log call."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the line above the bar."""
        line = readable(logs, state)
        if line is not None and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(line)


class PlainProgressLine(PrinterCallback):
    """The same without a bar."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print the line."""
        line = readable(logs, state)
        if line is not None and state.is_local_process_zero:
            print(line, flush=True)


def show_readable_lines(trainer: Trainer) -> None:
    """Put our lines in place of the dictionaries that Transformers' own two callbacks print; others stay as they are."""
    for theirs, ours in ((ProgressCallback, ProgressLine), (PrinterCallback, PlainProgressLine)):
        if any(type(callback) is theirs for callback in trainer.callback_handler.callbacks):
            trainer.remove_callback(theirs)
            trainer.add_callback(ours)


class RolloutReports(TrainerCallback):
    """Shows sample completions beside log lines, and stores rollouts of some steps.

    Args:
        args: settings of the run.
        tokenizer: decodes the completions.
        latest: the rollouts of the last step on this process; None before the first.
    """

    def __init__(
        self, args: PruneOPDConfig, tokenizer: PreTrainedTokenizerBase, latest: Callable[[], Rollouts | None]
    ) -> None:
        self.args, self.tokenizer, self.latest = args, tokenizer, latest

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show completions beside a training line."""
        rollouts = self.latest()
        if not self.args.log_completions or not logs or "loss" not in logs or rollouts is None:
            return
        if state.is_world_process_zero:
            table = completions_table(
                rollouts, self.tokenizer, step=state.global_step, rows=self.args.num_completions_to_print
            )
            console = Console()
            console.print()  # off the line of the progress bar
            console.print(table)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store the step's rollouts where they are due."""
        every, rollouts = self.args.save_rollouts_steps, self.latest()
        if not every or state.global_step % every != 0 or rollouts is None:
            return
        folder = Path(self.args.output_dir) / ROLLOUTS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        process = f"-process-{self.args.process_index}" if self.args.world_size > 1 else ""
        rollouts.save(folder / f"step-{state.global_step:06d}{process}.safetensors")
