"""A Trainer whose checkpoints are whole or not there, whatever moment it is killed at.

The Trainer writes a checkpoint file by file into its place and deletes old ones before every process has written. Here it
writes aside; `checkpoints.py` moves the finished folder into place.
"""

import os
import shutil
from typing import Any

from torch import nn
from transformers import Trainer

from prune_opd_hf.training.checkpoints import TRAINER_STATE_FILE, UNFINISHED, delete_old_checkpoints, put_in_place


class AtomicSavingTrainer(Trainer):
    """Base of a Trainer: saving as `transformers.Trainer` does, in one move."""

    _is_saving = False

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint aside, put it in place when all processes are done, and then only delete old ones."""
        args, name = self.args, f"checkpoint-{self.state.global_step}"
        limit, args.save_total_limit = args.save_total_limit, None
        self._is_saving = True
        try:
            unfinished = os.path.join(self._get_output_dir(trial), name)
            if args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving, args.save_total_limit = False, limit
        self.accelerator.wait_for_everyone()
        final = os.path.join(self._get_output_dir(trial), name)
        best = self.state.best_model_checkpoint
        if best is not None and os.path.abspath(best) == os.path.abspath(unfinished):
            self.state.best_model_checkpoint = best = final
            if args.should_save:
                self.state.save_to_json(os.path.join(unfinished, TRAINER_STATE_FILE))
        if args.should_save:
            put_in_place(unfinished, final)
        if args.push_to_hub:
            super()._push_from_checkpoint(final)
        if args.should_save:
            delete_old_checkpoints(os.path.dirname(final), limit, [final, best], resumable=not args.save_only_model)
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving:
            super()._push_from_checkpoint(checkpoint_folder)
