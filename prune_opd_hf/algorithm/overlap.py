"""How well teacher and student agree at one position: set overlap, nucleus membership and shared probability mass.

Pure functions of token ids and log-probabilities; this module knows neither models nor sequences.
Source: REFERENCE formulas of Prune-OPD (arXiv 2605.07804): overlap, whose ratio is defined in arXiv 2604.13016, and nucleus.
The others are ours. They say 1, or reject no more than they state, where both models are the same, however unsure it is; the
published ones are kept as they are.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

LARGEST_VOCABULARY = 2**18
"""No known vocabulary has more tokens; that of Gemma 3 has as many."""


def topk_overlap(
    student_ids: Int[Tensor, "*positions k"], teacher_ids: Int[Tensor, "*positions k"]
) -> Float[Tensor, "*positions"]:
    """Share of the student's k most likely tokens that are also among the teacher's: O_t = |S_t ∩ T_t| / k.

    The order inside each set does not matter. Ids within one set must be distinct, as `torch.topk` returns them.

    Args:
        student_ids: S_t, the k most likely token ids under the student.
        teacher_ids: T_t, the k most likely token ids under the teacher.

    Returns:
        The overlap in [0, 1], float32.

    Example: three of four candidates shared, then one of four.
        >>> import torch
        >>> student = torch.tensor([[5, 2, 9, 7], [1, 2, 3, 4]])
        >>> teacher = torch.tensor([[7, 5, 9, 1], [4, 8, 6, 5]])
        >>> topk_overlap(student, teacher)
        tensor([0.7500, 0.2500])
    """
    shared = (student_ids.unsqueeze(-1) == teacher_ids.unsqueeze(-2)).any(dim=-1)
    return shared.sum(dim=-1).float() / student_ids.shape[-1]


def weighted_overlap(
    student_ids: Int[Tensor, "*positions k"],
    student_log_probs: Float[Tensor, "*positions k"],
    teacher_ids: Int[Tensor, "*positions k"],
) -> Float[Tensor, "*positions"]:
    """The overlap with each candidate counted by its probability: Σ_{v in S_t ∩ T_t} p_v / Σ_{v in S_t} p_v.

    Where the student is sure the tail of a top-k set is noise: the overlap is low although both first choices agree. Here the
    tail hardly counts, so one k and one threshold suit sharp and flat distributions. The teacher's probabilities are not needed.

    Args:
        student_ids: S_t.
        student_log_probs: log p of those ids.
        teacher_ids: T_t.

    Returns:
        A share in [0, 1], float32; 1 where T_t = S_t.

    Example: one of four candidates is shared, and it holds nearly all of the probability.
        >>> import torch
        >>> student, teacher = torch.tensor([[5, 2, 9, 7]]), torch.tensor([[5, 1, 3, 4]])
        >>> weighted_overlap(student, torch.tensor([[0.97, 0.01, 0.01, 0.01]]).log(), teacher)
        tensor([0.9700])
    """
    probs = student_log_probs.float().exp()
    shared = (student_ids.unsqueeze(-1) == teacher_ids.unsqueeze(-2)).any(dim=-1)
    return (probs * shared).sum(dim=-1) / probs.sum(dim=-1)


def nucleus_accepts(
    token_ids: Int[Tensor, "*positions"],
    teacher_ids: Int[Tensor, "*positions k"],
    teacher_log_probs: Float[Tensor, "*positions k"],
    mass: float,
) -> Bool[Tensor, "*positions"]:
    """Whether the sampled token lies in the teacher's nucleus; needs no student logits.

    The nucleus is the smallest prefix of T_t, most likely first, whose teacher mass reaches `mass`. Where all k tokens
    together do not reach it, all k count.

    Args:
        token_ids: y_t, the tokens that were sampled.
        teacher_ids: T_t, most likely first.
        teacher_log_probs: log q of those ids over the full vocabulary, in descending order.
        mass: the mass the prefix has to reach, in (0, 1].

    Example: masses .6, .3, .08; the nucleus of mass .9 is the first two, and that of .99 all three (they reach .98 only).
        >>> import torch
        >>> ids, log_q = torch.tensor([[3, 1, 4]]), torch.tensor([[0.6, 0.3, 0.08]]).log()
        >>> [bool(nucleus_accepts(torch.tensor([y]), ids, log_q, mass=0.85)) for y in (3, 1, 4, 5)]
        [True, True, False, False]
        >>> [bool(nucleus_accepts(torch.tensor([y]), ids, log_q, mass=0.99)) for y in (3, 1, 4, 5)]
        [True, True, True, False]
    """
    probs = teacher_log_probs.float().exp()
    mass_before = pad(probs.cumsum(dim=-1)[..., :-1], (1, 0))
    in_nucleus = mass_before < mass
    return ((teacher_ids == token_ids.unsqueeze(-1)) & in_nucleus).any(dim=-1)


def tail_accepts(
    token_ids: Int[Tensor, "*positions"],
    teacher_ids: Int[Tensor, "*positions k"],
    teacher_log_probs: Float[Tensor, "*positions k"],
    token_log_probs: Float[Tensor, "*positions"],
    mass: float,
) -> Bool[Tensor, "*positions"]:
    """Whether the sampled token lies outside of the teacher's least likely tokens, which hold at most 1 - `mass` together.

    Among T_t as `nucleus_accepts`. Of the tokens outside of T_t those that are at most as likely as y_t hold no more than all of
    them, 1 - Σ_{v in T_t} q_v, and no more than their number times q(y_t); y_t is rejected where the smaller of both is at most
    1 - `mass`. So at most 1 - `mass` of the teacher's own samples are rejected, for every k.

    Args:
        token_ids, teacher_ids, teacher_log_probs, mass: as for `nucleus_accepts`.
        token_log_probs: log q of y_t.

    Example: the three candidates hold .98. Outside of them lies no more than .02: the tail of .05, but not of .01, unless the token
    is so unlikely that a whole vocabulary of its like would not hold .01.
        >>> import torch
        >>> ids, log_q = torch.tensor([[3, 1, 4]]), torch.tensor([[0.6, 0.3, 0.08]]).log()
        >>> [bool(tail_accepts(torch.tensor([5]), ids, log_q, torch.tensor([q]).log(), mass))
        ...  for q, mass in ((0.02, 0.95), (0.02, 0.99), (1e-9, 0.99))]
        [False, True, False]
    """
    likelier = torch.maximum(
        teacher_log_probs.float().exp().sum(dim=-1), 1 - LARGEST_VOCABULARY * token_log_probs.float().exp()
    )
    is_candidate = (teacher_ids == token_ids.unsqueeze(-1)).any(dim=-1)
    return torch.where(is_candidate, nucleus_accepts(token_ids, teacher_ids, teacher_log_probs, mass), likelier < mass)


def mass_overlap(
    student_log_probs: Float[Tensor, "*positions k"], teacher_log_probs: Float[Tensor, "*positions k"]
) -> Float[Tensor, "*positions"]:
    """Share of the student's probability on its candidates that the teacher shares: M_t = Σ_v min(p_v, q_v) / Σ_v p_v, v in S_t.

    Where distributions are nearly deterministic the tail of a top-k set is noise. Set overlap counts it like the head; here a
    candidate counts by what both models give it, and the order and size of the tail hardly matter.

    Over the whole vocabulary it is 1 - TV(p, q). What is summed here are the candidates whose probability is known under both
    models in every way of generating: the student's top-k. The teacher's further candidates T_t \\ S_t are left out, since p on
    them is gone when the teacher's block is scored. With P = Σ_{v in S_t} p_v:

        P M_t <= Σ_{v in S_t ∪ T_t} min(p_v, q_v) <= 1 - TV(p, q) <= P M_t + 1 - P

    Args:
        student_log_probs: log p of distinct candidates over the full vocabulary.
        teacher_log_probs: log q of the same candidates, in the same order.

    Returns:
        A share in [0, 1], float32; 1 where both give the candidates the same, however little.

    Example: of .7 + .2 the teacher shares .6 + .1; nothing where it gives the candidates nothing; all of it where
    both models are equally unsure.
        >>> import torch
        >>> log_p = torch.tensor([[0.7, 0.2], [0.7, 0.2], [0.1, 0.1]]).log()
        >>> log_q = torch.tensor([[0.6, 0.1], [0.0, 0.0], [0.1, 0.1]]).log()
        >>> mass_overlap(log_p, log_q)
        tensor([0.7778, 0.0000, 1.0000])
    """
    student, teacher = student_log_probs.float(), teacher_log_probs.float()
    return torch.minimum(student, teacher).exp().sum(dim=-1) / student.exp().sum(dim=-1)
