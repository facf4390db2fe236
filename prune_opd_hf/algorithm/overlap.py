"""How well teacher and student agree at one position: set overlap, nucleus membership and shared probability mass.

Pure functions of token ids and log-probabilities; this module knows neither models nor sequences.
Source: REFERENCE formulas of Prune-OPD (arXiv 2605.07804); the overlap ratio is defined in arXiv 2604.13016. The shared mass
is ours.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad


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


def mass_overlap(
    student_log_probs: Float[Tensor, "*positions k"], teacher_log_probs: Float[Tensor, "*positions k"]
) -> Float[Tensor, "*positions"]:
    """Probability that both models share on the candidates: M_t = Σ_v min(p_v, q_v) over v in S_t.

    Where distributions are nearly deterministic the tail of a top-k set is noise. Set overlap counts it like the head; here a
    candidate counts by what both models give it, and the order and size of the tail hardly matter.

    Over the whole vocabulary the sum is 1 - TV(p, q). What is summed here are the candidates whose probability is known
    under both models in every way of generating: the student's top-k. The teacher's further candidates T_t \\ S_t are left
    out, since p on them is gone when the teacher's block is scored. So M_t is a lower bound, and close:

        M_t <= Σ_{v in S_t ∪ T_t} min(p_v, q_v) <= 1 - TV(p, q) <= M_t + 1 - Σ_{v in S_t} p_v

    Take k so large that S_t holds nearly all of p wherever the student is sure of itself: M_t never exceeds the mass of S_t.

    Args:
        student_log_probs: log p of distinct candidates over the full vocabulary.
        teacher_log_probs: log q of the same candidates, in the same order.

    Returns:
        The shared mass in [0, 1], float32.

    Example: .6 and .1 are shared where p = (.7, .2) and q = (.6, .1); nothing where q gives the candidates nothing.
        >>> import torch
        >>> log_p, log_q = torch.tensor([[0.7, 0.2], [0.7, 0.2]]).log(), torch.tensor([[0.6, 0.1], [0.0, 0.0]]).log()
        >>> mass_overlap(log_p, log_q)
        tensor([0.7000, 0.0000])
    """
    return torch.minimum(student_log_probs.float(), teacher_log_probs.float()).exp().sum(dim=-1)
