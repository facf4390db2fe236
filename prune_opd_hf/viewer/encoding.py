"""Rollouts as bytes for the drift viewer: a header for the list, and two blocks for each rollout.

The track holds what the text needs (tokens, overlap, reliability, events), the candidates what a single token needs; the browser
unpacks the second only for the rollout it shows. Both are planes of unsigned integers, least significant byte first, under
zlib: planes of high bytes are nearly constant and vanish there. `page/data.js` reads them in the same order.

Precision: overlap, reliability and mass to 1/65534; log-probabilities to a thousandth of a nat, so probabilities to 0.1% of
themselves. It knows Rollouts and numpy; it knows neither tokenizers nor HTML.
"""

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8, UInt16
from numpy import ndarray

from prune_opd_hf.algorithm.drift import RELIABILITY_FLOOR, STOP_REASONS
from prune_opd_hf.algorithm.overlap import mass_overlap
from prune_opd_hf.records.rollouts import Rollouts

ABSENT = 65535
"""Stands for a number that was not recorded."""

BINS = 48
"""Pieces of equal length into which the list's strip divides a rollout."""

IN_STUDENTS_TAIL, NOT_STUDENTS = 254, 255
"""In place of a rank among the student's shown candidates: among its further ones; not among its top-k."""


@dataclass(frozen=True, eq=False)
class Row:
    """One rollout without its padding, as numpy arrays; None where the student was not observed."""

    prompt_ids: Int[ndarray, " prompt"]
    ids: Int[ndarray, " time"]
    overlap: Float[ndarray, " time"] | None
    mass: Float[ndarray, " time"] | None
    reliability: Float[ndarray, " time"]
    events: Bool[ndarray, " time"]
    log_p: Float[ndarray, " time"] | None
    log_q: Float[ndarray, " time"]
    student_ids: Int[ndarray, "time k"] | None
    student_log_p: Float[ndarray, "time k"] | None
    student_log_q: Float[ndarray, "time k"] | None
    teacher_ids: Int[ndarray, "time k"]
    teacher_log_q: Float[ndarray, "time k"]
    stop: str


def read_row(rollouts: Rollouts, index: int) -> Row:
    """One row of the record without its padding."""
    row = rollouts.select([index])

    def column(tensor: torch.Tensor | None) -> Any:
        if tensor is None:
            return None
        values = tensor[0].detach().cpu()
        if values.ndim == 2:
            values = values[:, : row.config.top_k]  # what O_t was computed over
        return (values.float() if values.is_floating_point() else values).numpy()

    log_p, log_q = row.student_topk_log_probs, row.teacher_log_probs
    mass = None
    if log_p is not None and log_q is not None:
        mass = mass_overlap(log_p[..., : row.config.top_k], log_q[..., : row.config.top_k])
    return Row(
        prompt_ids=column(row.prompt_ids),
        ids=column(row.response_ids),
        overlap=column(row.overlap),
        mass=column(mass),
        reliability=column(row.reliability),
        events=column(row.drift_events),
        log_p=column(row.token_log_probs),
        log_q=column(row.teacher_token_log_probs),
        student_ids=column(row.student_topk_ids),
        student_log_p=column(log_p),
        student_log_q=column(log_q),
        teacher_ids=column(row.teacher_topk_ids),
        teacher_log_q=column(row.teacher_topk_log_probs),
        stop=row.stop_reason[0],
    )


def agreement_name(rollouts: Rollouts) -> str:
    """What tints text and strips at first: "overlap", "mass" where the events come from it, or "teacher", the teacher's probability
    of the sampled token, where the student was not observed."""
    if rollouts.overlap is None:
        return "teacher"
    return "mass" if rollouts.config.metric == "mass" else "overlap"


def summarize(row: Row, agreement: str) -> dict[str, Any]:
    """Numbers of one rollout for the list; positions count from 0, and None stands for what there is none of.

    Args:
        row: the rollout.
        agreement: a name that `agreement_name` gives; the strip is its mean in BINS pieces, in percent.
    """
    length, teacher = len(row.ids), np.exp(row.log_q)
    exhausted = row.reliability <= RELIABILITY_FLOOR
    values = {"overlap": row.overlap, "mass": row.mass}.get(agreement)
    values = teacher if values is None else values
    edges = np.linspace(0, length, BINS + 1).astype(int)
    return {
        "stop": STOP_REASONS.index(row.stop),
        "prompt": len(row.prompt_ids),
        "length": length,
        "effective": int((~exhausted).sum()),  # response tokens with reliability above zero
        "events": int(row.events.sum()),
        "first_event": _first(row.events),
        "exhausted": _first(exhausted),
        "overlap": _mean(row.overlap),
        "mass": _mean(row.mass),
        "teacher": _mean(teacher),  # probability of the sampled tokens
        "log_ratio": None if row.log_p is None else _mean(row.log_p - row.log_q),  # an estimate of KL(p || q)
        "reliability": _mean(row.reliability[-1:]),
        "strip": [_percent(values[start : max(end, start + 1)]) for start, end in itertools.pairwise(edges)],
    }


def used_ids(row: Row, candidates: int) -> Int[ndarray, " used"]:
    """Distinct token ids that the viewer names for this rollout, in rising order."""
    parts = [row.prompt_ids, row.ids, row.teacher_ids[:, :candidates].ravel()]
    if row.student_ids is not None:
        parts.append(row.student_ids[:, :candidates].ravel())
    return np.unique(np.concatenate(parts))


def pack_track(row: Row, vocabulary: Int[ndarray, " used"]) -> bytes:
    """The block of tokens: ids of prompt and response as places in `vocabulary`, then overlap, reliability, log p, log q, mass
    and events of each response token."""
    width = id_bytes(len(vocabulary))
    absent = np.full(len(row.ids), ABSENT, dtype=np.uint16)
    return _compressed(
        [
            _planes(np.searchsorted(vocabulary, np.concatenate([row.prompt_ids, row.ids])), width),
            _planes(absent if row.overlap is None else quantize_share(row.overlap), 2),
            _planes(quantize_share(row.reliability), 2),
            _planes(absent if row.log_p is None else quantize_log(row.log_p), 2),
            _planes(quantize_log(row.log_q), 2),
            _planes(absent if row.mass is None else quantize_share(row.mass), 2),
            row.events.astype(np.uint8).tobytes(),
        ]
    )


def pack_candidates(row: Row, vocabulary: Int[ndarray, " used"], candidates: int) -> bytes:
    """The block of candidates, the first `candidates` of each model at each position.

    The student's: ids, log p, log q, and whether the teacher has the id among its top-k. The teacher's: rank among the student's
    shown ones (IN_STUDENTS_TAIL or NOT_STUDENTS where there is none), and for those without a rank their ids and log q.
    """
    width = id_bytes(len(vocabulary))
    teacher_ids, teacher_log_q = row.teacher_ids[:, :candidates], row.teacher_log_q[:, :candidates]
    parts: list[bytes] = []
    if row.student_ids is None or row.student_log_p is None or row.student_log_q is None:
        ranks = np.full(teacher_ids.shape, NOT_STUDENTS, dtype=np.uint8)
    else:
        same = row.student_ids[:, :, None] == row.teacher_ids[:, None, :]  # time, rank of student, rank of teacher
        ranks = np.where(same.any(axis=1), same.argmax(axis=1), NOT_STUDENTS)[:, :candidates]
        ranks = np.where((ranks >= candidates) & (ranks != NOT_STUDENTS), IN_STUDENTS_TAIL, ranks).astype(np.uint8)
        shown = slice(None), slice(candidates)
        parts = [
            _planes(np.searchsorted(vocabulary, row.student_ids[shown].ravel()), width),
            _planes(quantize_log(row.student_log_p[shown].ravel()), 2),
            _planes(quantize_log(row.student_log_q[shown].ravel()), 2),
            same.any(axis=2)[shown].astype(np.uint8).tobytes(),
        ]
    further = ranks >= IN_STUDENTS_TAIL
    parts += [
        ranks.tobytes(),
        _planes(np.searchsorted(vocabulary, teacher_ids[further]), width),
        _planes(quantize_log(teacher_log_q[further]), 2),
    ]
    return _compressed(parts)


def id_bytes(vocabulary_size: int) -> int:
    """Bytes of one token's place in the vocabulary.

    Example:
        >>> id_bytes(256), id_bytes(257), id_bytes(151_665)
        (1, 2, 3)
    """
    return next(width for width in (1, 2, 3, 4) if vocabulary_size <= 256**width)


def quantize_share(values: Float[ndarray, "*shape"]) -> UInt16[ndarray, "*shape"]:
    """Numbers of [0, 1] as 0 to 65534.

    Example:
        >>> quantize_share(np.array([0.0, 0.5, 1.0, np.nan], dtype=np.float32)).tolist()
        [0, 32767, 65534, 65535]
    """
    codes = np.rint(np.clip(np.nan_to_num(values), 0, 1) * (ABSENT - 1))
    return np.where(np.isnan(values), ABSENT, codes).astype(np.uint16)


def quantize_log(log_probs: Float[ndarray, "*shape"]) -> UInt16[ndarray, "*shape"]:
    """Log-probabilities as thousandths of a nat below 0, at most 65534 of them.

    Example:
        >>> quantize_log(np.array([0.0, -0.5, -np.inf, np.nan], dtype=np.float32)).tolist()
        [0, 500, 65534, 65535]
    """
    codes = np.rint(np.clip(np.nan_to_num(-1000 * log_probs, posinf=ABSENT), 0, ABSENT - 1))
    return np.where(np.isnan(log_probs), ABSENT, codes).astype(np.uint16)


def _planes(values: Int[ndarray, " n"] | UInt16[ndarray, " n"], width: int) -> bytes:
    octets: UInt8[ndarray, "n 4"] = np.ascontiguousarray(values.astype("<u4")).view(np.uint8).reshape(-1, 4)
    return octets[:, :width].T.tobytes()


def _compressed(parts: Sequence[bytes]) -> bytes:
    return zlib.compress(b"".join(parts), 4)


def _mean(values: Float[ndarray, " n"] | None) -> float | None:
    if values is None or not len(values) or not np.isfinite(values).all():
        return None
    return round(float(values.mean(dtype=np.float64)), 5)


def _first(flags: Bool[ndarray, " n"]) -> int | None:
    return int(flags.argmax()) if flags.any() else None


def _percent(values: Float[ndarray, " n"]) -> int:
    mean = _mean(values)
    return 0 if mean is None else round(100 * mean)
