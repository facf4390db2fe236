"""The student's side of a block of tokens, recorded from the logits that sampling has anyway.

Buffered logits are reduced in blocks of at most 16 MiB, to save kernel launches: a small vocabulary is read several tokens at a
time, of a large one each token's logits are reduced at once and nothing is kept.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from prune_opd_hf.models.vocabulary import without_ids

BUFFERED_ELEMENTS = 2**22


class StudentLogitsBuffer:
    """What one block of tokens holds of the student, one line for each row of the generation.

    Attributes:
        topk_ids, topk_log_probs: S_t and log p on it, most likely first.
        token_log_probs: log p of the sampled tokens.
        normalizers: log-sum-exp of the logits; not finite where logits are NaN or infinite.
    """

    def __init__(
        self, rows: int, width: int, k: int, device: torch.device, excluded: Int[Tensor, " ids"] | None = None
    ) -> None:
        shape, self._excluded = (rows, width), excluded
        self.topk_ids: Int[Tensor, "rows time k"] = torch.zeros(*shape, k, dtype=torch.long, device=device)
        self.topk_log_probs: Float[Tensor, "rows time k"] = torch.zeros(*shape, k, dtype=torch.float32, device=device)
        self.token_log_probs: Float[Tensor, "rows time"] = torch.zeros(shape, dtype=torch.float32, device=device)
        self.normalizers: Float[Tensor, "rows time"] = torch.zeros(shape, dtype=torch.float32, device=device)
        self._buffered: list[tuple[Tensor, int, Tensor]] = []  # rows, column and logits, not reduced yet

    def widen(self, width: int) -> None:
        """Make room for a block of so many tokens."""
        more = width - self.topk_ids.shape[1]
        self.topk_ids, self.topk_log_probs = (pad(of, (0, 0, 0, more)) for of in (self.topk_ids, self.topk_log_probs))
        self.token_log_probs, self.normalizers = (pad(of, (0, more)) for of in (self.token_log_probs, self.normalizers))

    def add_logits(self, logits: Float[Tensor, "rows vocab"], rows: Int[Tensor, " rows"], column: int) -> None:
        """Logits of one token, read later: they must not be changed in place."""
        self._buffered.append((rows, column, logits.float()))

    def columns(self, rows: Int[Tensor, " rows"], width: int) -> dict[str, Tensor]:
        """What the first tokens of these rows hold, by the names of `Rollouts`."""
        return {
            "student_topk_ids": self.topk_ids[rows, :width],
            "student_topk_log_probs": self.topk_log_probs[rows, :width],
            "token_log_probs": self.token_log_probs[rows, :width],
        }

    @property
    def is_full(self) -> bool:
        """Whether what is buffered had better be reduced now."""
        return bool(self._buffered) and len(self._buffered) * self._buffered[0][2].numel() > BUFFERED_ELEMENTS

    def reduce(self, token_ids: Int[Tensor, "rows time"]) -> None:
        """Candidates and log-probabilities of what is buffered, now that its tokens are known."""
        if not self._buffered:
            return
        rows = torch.cat([rows for rows, _, _ in self._buffered])
        # Filled on the device: numbers copied from the host would make every token wait for it.
        columns = torch.cat([torch.full_like(rows, column) for rows, column, _ in self._buffered])
        several = len(self._buffered) > 1
        logits = torch.cat([logits for _, _, logits in self._buffered]) if several else self._buffered[0][2]
        self._buffered = []
        logits, index = without_ids(logits, self._excluded), (rows, columns)
        normalizer = logits.logsumexp(dim=-1, keepdim=True)
        top = logits.topk(self.topk_ids.shape[-1], dim=-1)
        self.topk_ids[index] = top.indices
        self.topk_log_probs[index] = top.values - normalizer
        self.normalizers[index] = normalizer.squeeze(-1)
        inside = token_ids[index].clamp(max=logits.shape[-1] - 1).unsqueeze(-1)
        self.token_log_probs[index] = (logits.gather(-1, inside) - normalizer).squeeze(-1)

    def first_non_finite(self) -> tuple[int, int] | None:
        """Row and column of buffered logits that are NaN or infinite; None where all are finite."""
        for rows, column, logits in self._buffered:
            bad = ~logits.amax(dim=-1).isfinite()
            if bool(bad.any()):
                return int(rows[bad][0]), column
        return None
