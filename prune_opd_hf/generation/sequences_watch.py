"""A drift watch over one `generate` call: all rows begin together, and the record is made from the sequences that it returns."""

import torch
from jaxtyping import Int
from torch import Tensor

from prune_opd_hf.errors import MonitorStateError
from prune_opd_hf.generation.blocks import observed_tokens
from prune_opd_hf.generation.watch import CHANGED_TOKENS, CRITERION, RUNNING, DriftWatch
from prune_opd_hf.records.rollouts import Rollouts


class SequencesWatch(DriftWatch):
    """Checks that the tokens it observed are those that `generate` goes on with, and returns."""

    def verify(self, responses: Int[Tensor, "batch time"]) -> None:
        """Make sure that the tokens observed so far are those that stand there now, in the rows that are still followed.

        Raises:
            MonitorStateError: they are not; beam search and assisted decoding do that.
        """
        scored = self.steps - self._pending
        seen = torch.cat(
            [observed_tokens(self._blocks, self.rows, scored).to(self.device), self._tokens[:, : self._pending]], dim=1
        )
        if not torch.equal(seen[self._followed], responses[self._followed, : scored + self._pending]):
            raise MonitorStateError(CHANGED_TOKENS)

    def finish(self, sequences: Int[Tensor, "batch total"]) -> Rollouts:
        """The record, for what plain `generate` returned: all rows began together.

        Raises:
            MonitorStateError: the tokens are not those that were observed.
        """
        prompt_ids = self._prompts[0][0]
        time = sequences.shape[1] - prompt_ids.shape[1]
        if time == self.steps + 1 and self._observed == self._pending + 1 and len(sequences) == self.rows:
            self.append_tokens(sequences[:, -1])  # without the criterion the last token was not reported
        if not (
            0 < time <= self.steps
            and len(sequences) == self.rows
            and torch.equal(sequences[:, : prompt_ids.shape[1]], prompt_ids)
        ):
            raise MonitorStateError(
                f"finish got sequences of the shape {tuple(sequences.shape)} that are not those of the generation that was "
                f"observed: {self.rows} rows of {prompt_ids.shape[1]} prompt and {self.steps} response tokens"
            )
        self.score_pending()
        self.is_finished = True
        tokens = sequences[:, prompt_ids.shape[1] :]
        lengths = torch.where(self._reason == RUNNING, time, self._length).clamp(max=time)
        reasons, pad = self._reason.clone(), self.settings.pad_token_id
        if not self.reports_finished_rows and pad is not None and pad not in self.settings.eos_token_ids:
            # Beside plain `generate`, a row that another criterion ended shows only as padding up to the end.
            padding = (tokens == pad).flip(-1).long().cumprod(dim=-1).sum(dim=-1)
            earlier = (time - padding < lengths) & (padding < time)
            lengths = torch.where(earlier, time - padding, lengths)
            reasons = torch.where(earlier, CRITERION, reasons)
        seen = observed_tokens(self._blocks, self.rows, time)
        if not bool(((seen == tokens) | (torch.arange(time, device=self.device) >= lengths.unsqueeze(-1))).all()):
            raise MonitorStateError(CHANGED_TOKENS)
        return self._record(tokens, lengths, reasons)
