"""What a run that goes on needs beside the Trainer's own files: written into each checkpoint, and read from it.

Its state is that of pruning, counts, safeguards, clock and metrics, of the rollouts that a further update reuses, and of a teacher
that follows the student.
"""

import math
from typing import Any

from accelerate.utils import gather_object

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.training.checkpoints import (
    AtomicSavingTrainer,
    ProcessState,
    TrainingState,
    load_reused,
    save_reused,
)
from prune_opd_hf.training.metrics import MetricMeans, StepClock, TokenCounts
from prune_opd_hf.training.micro_batches import StepRollouts
from prune_opd_hf.training.pruning import Pruning
from prune_opd_hf.training.safeguards import Safeguards
from prune_opd_hf.training.teachers import MovingAverage


class ResumingTrainer(AtomicSavingTrainer):
    """Base of a Trainer that goes on as if it had not been interrupted."""

    pruning: Pruning
    counts: TokenCounts
    safeguards: Safeguards
    clock: StepClock
    step: StepRollouts | None
    _means: MetricMeans
    _average: MovingAverage | None
    _resumed: TrainingState | None = None
    _globalstep_last_logged: Any
    _tr_loss: Any

    def _save_rng_state(self, output_dir: str) -> None:
        """Every process comes by here while a checkpoint is written, so our own state is written here as well."""
        super()._save_rng_state(output_dir)
        loss = float(self._tr_loss)
        mine = ProcessState(self._means, loss if math.isfinite(loss) else 0.0)
        state = TrainingState(
            pruning=self.pruning.state_dict(),
            counts=self.counts,
            safeguards=self.safeguards.seen,
            phase_seconds=self.clock.phase_seconds,
            last_logged_step=self._globalstep_last_logged,
            processes=gather_object([mine]),
            optimizer=self._optimizer_class,
            **self._unchanging,
        )
        if self.args.should_save:
            state.save(output_dir)
            if self._average is not None:
                self._average.save(output_dir)
        if self.state.global_step % self.args.num_iterations and self.step is not None:
            save_reused(output_dir, self.args.process_index, self.step)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The Trainer's own state is loaded here, and ours with it.

        Raises:
            ConfigError: the optimizer is of another class than the one whose state was saved, which it could not use.
        """
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self._resumed = state = TrainingState.load(checkpoint)
        was, now = state.optimizer, self._optimizer_class
        if None not in (was, now) and was != now:
            raise ConfigError(
                f"{checkpoint} was trained with the optimizer {was}, and this run has {now} (optim={self.args.optim.value}): go on "
                "with optim as it was, or begin a run anew in another output_dir"
            )
        super()._load_optimizer_and_scheduler(checkpoint)
        self.pruning.load_state_dict(state.pruning)
        self.counts = state.counts
        if self._average is not None:
            self._average.load(checkpoint)
        self.safeguards.seen = state.safeguards
        self.clock.phase_seconds.update(state.phase_seconds)
        # Another number of processes has other shares of the prompts: the rest of the updates gets rollouts of its own.
        if self.state.global_step % self.args.num_iterations and self._has_processes_of(state):
            self.step = load_reused(checkpoint, self.args.process_index, self.args.device)

    def _restore_since_last_log(self) -> None:
        """Restore what the Trainer resets when a run begins: what has been measured since the last log line."""
        state, self._resumed = self._resumed, None
        if state is None or not self._has_processes_of(state):
            return  # resumed on another number of processes: the next log line begins at the checkpoint
        mine = state.processes[self.args.process_index]
        self._means = mine.means
        self._tr_loss += mine.loss_since_log
        self._globalstep_last_logged = state.last_logged_step

    @property
    def _unchanging(self) -> dict[str, Any]:
        """What a run must have as the run had that it goes on with."""
        trained = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
        return {"trained_weights": trained, "teacher_model_kind": self.args.teacher_model_kind}

    @property
    def _optimizer_class(self) -> str | None:
        """The class of the optimizer that moves the weights; None under DeepSpeed, which keeps the state its own way."""
        if self.is_deepspeed_enabled:
            return None
        made = type(getattr(self.optimizer, "optimizer", self.optimizer))  # accelerate wraps it
        return f"{made.__module__}.{made.__qualname__}"

    def _has_processes_of(self, state: TrainingState) -> bool:
        return len(state.processes) == self.accelerator.num_processes
