"""A drift watch over one `generate` call: all rows begin together, and the record is made from the sequences that it returns."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from prune_opd_hf.errors import MonitorStateError
from prune_opd_hf.generation.blocks import observed_tokens
from prune_opd_hf.generation.watch import CHANGED_TOKENS, RUNNING, DriftWatch
from prune_opd_hf.records.rollouts import Rollouts

SEEN_ROOM = 128
"""Room for so many tokens of each row at first; doubled as they come."""


class SequencesWatch(DriftWatch):
    """Checks that the tokens it observed are those that `generate` returns; with `can_verify` also those that it goes on with."""

    def __init__(self, *arguments: Any, can_verify: bool = False, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.can_verify = can_verify
        self._seen: Int[Tensor, "batch room"] | None = None

    def append_tokens(self, token_ids: Int[Tensor, " rows"], rows: Int[Tensor, " rows"] | None = None) -> bool:
        if self.can_verify:
            if self._seen is None:
                self._seen = token_ids.new_zeros(self.rows, SEEN_ROOM)
            elif self.steps == self._seen.shape[1]:
                self._seen = pad(self._seen, (0, self.steps))
            self._seen[:, self.steps] = token_ids
        return super().append_tokens(token_ids, rows)

    def verify(self, responses: Int[Tensor, "batch time"]) -> None:
        """Make sure that the tokens observed so far are those that stand there now, in the rows that are still followed.

        Raises:
            MonitorStateError: they are not; beam search and assisted decoding do that.
        """
        rows = self._followed
        if self._seen is not None and not torch.equal(self._seen[rows, : self.steps], responses[rows, : self.steps]):
            raise MonitorStateError(CHANGED_TOKENS)

    def finish(self, sequences: Int[Tensor, "batch total"]) -> Rollouts:
        """The record, for what plain `generate` returned: all rows began together.

        Raises:
            MonitorStateError: the tokens are not those that were observed.
        """
        prompt_ids = self._prompts[0][0]
        time = sequences.shape[1] - prompt_ids.shape[1]
        last_is_known = not self.needs_candidates or self._observed == self._pending + 1
        if time == self.steps + 1 and last_is_known and len(sequences) == self.rows:
            with torch.inference_mode(self._tokens.is_inference()):
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
        self._score_the_rest()
        self.is_finished = True
        tokens = sequences[:, prompt_ids.shape[1] :]
        lengths = torch.where(self._reason == RUNNING, time, self._length).clamp(max=time)
        seen = observed_tokens(self._blocks, self.rows, time)
        if not bool(((seen == tokens) | (torch.arange(time, device=self.device) >= lengths.unsqueeze(-1))).all()):
            raise MonitorStateError(CHANGED_TOKENS)
        return self._record(tokens, lengths, self._reason)
