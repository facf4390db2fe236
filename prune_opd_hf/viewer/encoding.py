"""Rollouts as bytes for the drift viewer: a header for the list, and two blocks for each rollout.

The track holds what the text needs (tokens, overlap, reliability, events), the candidates what a single token needs; the browser
unpacks the second only for the rollout it shows. Both are planes of unsigned integers, least significant byte first, under
zlib: planes of high bytes are nearly constant and vanish there. `page/data.js` reads them in the same order.

Precision: overlap, reliability and mass to 1/65534; log-probabilities to a thousandth of a nat, so probabilities to 0.1% of
themselves. It knows Rollouts and numpy; it knows neither tokenizers nor HTML.
"""

import itertools
import zlib
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8, UInt16
from numpy import ndarray

from prune_opd_hf.algorithm.drift import RELIABILITY_FLOOR, STOP_REASONS, agreement
from prune_opd_hf.records.rollouts import Rollouts

ABSENT = 65535
"""Stands for a number that was not recorded."""

ID_BYTES = 3
"""Of one token's place in the vocabulary."""

BINS = 48
"""Pieces of equal length into which the list's strip divides a rollout."""

STUDENT_COLUMNS = "token_log_probs student_topk_ids student_topk_log_probs teacher_log_probs overlap mass".split()

IN_STUDENTS_TAIL, NOT_STUDENTS = 254, 255
"""In place of a rank among the student's shown candidates: among its further ones; not among its top-k."""


def read_row(rollouts: Rollouts, index: int) -> dict[str, Any]:
    """The columns of one rollout by their names in `Rollouts`, without its padding and over the compared top-k alone, as numpy
    arrays; None where the student was not observed. Beside them "mass", M_t, where it is known, and the "stop" reason."""
    row = rollouts.select([index])
    columns = row.tensors()
    if row.student_topk_log_probs is not None and row.teacher_log_probs is not None:
        columns["mass"] = agreement("mass", row.config.top_k, row.positions)
    arrays: dict[str, Any] = {**dict.fromkeys(STUDENT_COLUMNS), "stop": row.stop_reason[0]}
    for name, values in columns.items():
        values = values[0] if values.ndim == 2 else values[0, :, : row.config.top_k]
        arrays[name] = (values.float() if values.is_floating_point() else values).detach().cpu().numpy()
    return arrays


def agreement_name(rollouts: Rollouts) -> str:
    """What tints text and strips at first: "overlap", "mass" where events count candidates by probability and it is known, or
    "teacher", the teacher's probability of the sampled token, where the student was not observed."""
    if rollouts.overlap is None:
        return "teacher"
    by_probability = rollouts.config.metric in ("mass", "weighted_overlap") and rollouts.teacher_log_probs is not None
    return "mass" if by_probability else "overlap"


def summarize(row: dict[str, Any], tint: str) -> dict[str, Any]:
    """Numbers of one rollout for the list; positions count from 0, and None stands for what there is none of.

    Args:
        row: as `read_row` gives it.
        tint: a name that `agreement_name` gives; the strip is its mean in BINS pieces, in percent.
    """
    log_p, log_q, events = row["token_log_probs"], row["teacher_token_log_probs"], row["drift_events"]
    length, teacher = len(log_q), np.exp(log_q)
    exhausted = row["reliability"] <= RELIABILITY_FLOOR
    values = {"teacher": teacher, **row}[tint]
    edges = np.linspace(0, length, BINS + 1).astype(int)
    strip = (_mean(values[start : max(end, start + 1)]) for start, end in itertools.pairwise(edges))
    return {
        "stop": STOP_REASONS.index(row["stop"]),
        "prompt": len(row["prompt_ids"]),
        "length": length,
        "effective": int((~exhausted).sum()),  # response tokens with reliability above zero
        "events": int(events.sum()),
        "first_event": _first(events),
        "exhausted": _first(exhausted),
        "overlap": _mean(row["overlap"]),
        "mass": _mean(row["mass"]),
        "teacher": _mean(teacher),  # probability of the sampled tokens
        "log_ratio": None if log_p is None else _mean(log_p - log_q),  # an estimate of KL(p || q)
        "reliability": _mean(row["reliability"][-1:]),
        "strip": [0 if mean is None else round(100 * mean) for mean in strip],
    }


def used_ids(row: dict[str, Any], candidates: int) -> Int[ndarray, " used"]:
    """Distinct token ids that the viewer names for this rollout, in rising order."""
    both = (row[name] for name in ("teacher_topk_ids", "student_topk_ids") if row[name] is not None)
    shown = [ids[:, :candidates].ravel() for ids in both]
    return np.unique(np.concatenate([row["prompt_ids"], row["response_ids"], *shown]))


def pack_track(row: dict[str, Any], vocabulary: Int[ndarray, " used"]) -> bytes:
    """The block of tokens: ids of prompt and response as places in `vocabulary`, then overlap, reliability, log p, log q, mass
    and events of each response token."""
    ids = np.concatenate([row["prompt_ids"], row["response_ids"]])
    parts = [_planes(np.searchsorted(vocabulary, ids), ID_BYTES)]
    for name in ("overlap", "reliability", "token_log_probs", "teacher_token_log_probs", "mass"):
        quantize = quantize_log if name.endswith("log_probs") else quantize_share
        values = np.full(len(row["response_ids"]), np.nan) if row[name] is None else row[name]
        parts.append(_planes(quantize(values), 2))
    return _compressed(*parts, row["drift_events"].astype(np.uint8).tobytes())


def pack_candidates(row: dict[str, Any], vocabulary: Int[ndarray, " used"], candidates: int) -> bytes:
    """The block of candidates, the first `candidates` of each model at each position.

    The student's: ids, log p, log q, and whether the teacher has the id among its top-k. The teacher's: rank among the student's
    shown ones (IN_STUDENTS_TAIL or NOT_STUDENTS where there is none), and for those without a rank their ids and log q.
    """
    shown = slice(None), slice(candidates)
    student_ids, teacher_ids = row["student_topk_ids"], row["teacher_topk_ids"]
    parts: list[bytes] = []
    ranks = np.full(teacher_ids[shown].shape, NOT_STUDENTS, dtype=np.uint8)
    if row["mass"] is not None:
        same = student_ids[:, :, None] == teacher_ids[:, None, :]  # time, rank of student, rank of teacher
        ranks = np.where(same.any(axis=1), same.argmax(axis=1), NOT_STUDENTS)[shown]
        ranks = np.where((ranks >= candidates) & (ranks != NOT_STUDENTS), IN_STUDENTS_TAIL, ranks).astype(np.uint8)
        parts = [
            _planes(np.searchsorted(vocabulary, student_ids[shown].ravel()), ID_BYTES),
            _planes(quantize_log(row["student_topk_log_probs"][shown].ravel()), 2),
            _planes(quantize_log(row["teacher_log_probs"][shown].ravel()), 2),
            same.any(axis=2)[shown].astype(np.uint8).tobytes(),
        ]
    further = ranks >= IN_STUDENTS_TAIL
    places = np.searchsorted(vocabulary, teacher_ids[shown][further])
    log_q = row["teacher_topk_log_probs"][shown][further]
    return _compressed(*parts, ranks.tobytes(), _planes(places, ID_BYTES), _planes(quantize_log(log_q), 2))


def quantize_share(values: Float[ndarray, "*shape"]) -> UInt16[ndarray, "*shape"]:
    """Numbers of [0, 1] as 0 to 65534."""
    codes = np.rint(np.clip(np.nan_to_num(values), 0, 1) * (ABSENT - 1))
    return np.where(np.isnan(values), ABSENT, codes).astype(np.uint16)


def quantize_log(log_probs: Float[ndarray, "*shape"]) -> UInt16[ndarray, "*shape"]:
    """Log-probabilities as thousandths of a nat below 0, at most 65534 of them."""
    codes = np.rint(np.clip(np.nan_to_num(-1000 * log_probs, posinf=ABSENT), 0, ABSENT - 1))
    return np.where(np.isnan(log_probs), ABSENT, codes).astype(np.uint16)


def _planes(values: Int[ndarray, " n"] | UInt16[ndarray, " n"], width: int) -> bytes:
    octets: UInt8[ndarray, "n 4"] = np.ascontiguousarray(values.astype("<u4")).view(np.uint8).reshape(-1, 4)
    return octets[:, :width].T.tobytes()


def _compressed(*parts: bytes) -> bytes:
    return zlib.compress(b"".join(parts), 4)


def _mean(values: Float[ndarray, " n"] | None) -> float | None:
    if values is None or not len(values) or not np.isfinite(values).all():
        return None
    return round(float(values.mean(dtype=np.float64)), 5)


def _first(flags: Bool[ndarray, " n"]) -> int | None:
    return int(flags.argmax()) if flags.any() else None
