"""Whether a teacher and a student can be distilled at all, from their tokenizers, configurations and first rollouts.

Every check gives one line: what was found, and where it is not fine, what follows and what to do. Nothing here raises.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from prune_opd_hf.errors import VocabularyMismatchError
from prune_opd_hf.models.compatibility import shared_vocabulary_size
from prune_opd_hf.records.rollouts import Rollouts

LEVELS = ("fine", "note", "warning", "stop")
"""How bad a finding is. "stop": this pair will not work."""

PROBE_TEXT = "Let x = 12.5; then 3x + 1 = 38.5.\n\n\\boxed{7}  Straße, 数学 🙂"
PROBE_MESSAGES = [{"role": "user", "content": "What is 2 + 2?"}]
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")

ACCEPTED_END = 0.05
"""Where the teacher gives the student's own ends a smaller median probability than this, training teaches it not to end."""

FOLLOWED = 0.5
"""Teacher's probability of a token from which on it counts as having followed the text."""


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        level: one of LEVELS.
        words: what was found and what follows.
    """

    name: str
    level: str
    words: str


def check_tokenizers(student: Any, teacher: Any) -> tuple[list[Check], int | None]:
    """Vocabulary, special tokens, the tokens of a probe text, and chat templates.

    Args:
        student, teacher: tokenizers.

    Returns:
        The findings, and how many ids both share; None where they mean different tokens by one id.
    """
    checks, shared = [], None
    try:
        shared = shared_vocabulary_size(student, teacher)
        sizes = len(student), len(teacher)
        level, words = "fine", f"{shared:,} ids mean the same tokens"
        if sizes[0] != sizes[1]:
            level, words = (
                "note",
                f"{words}; the student's tokenizer has {sizes[0]:,} entries, the teacher's {sizes[1]:,}",
            )
        checks.append(Check("vocabulary", level, words))
    except VocabularyMismatchError as error:
        checks.append(Check("vocabulary", "stop", str(error)))
    differing = []
    for name in SPECIAL_TOKENS:
        ours, theirs = getattr(student, name, None), getattr(teacher, name, None)
        if ours != theirs:
            differing.append(f"{name} {ours!r} and {theirs!r}")
    checks.append(
        Check("special tokens", "note", f"student and teacher differ: {'; '.join(differing)}")
        if differing
        else Check("special tokens", "fine", "the same")
    )
    same = list(student(PROBE_TEXT)["input_ids"]) == list(teacher(PROBE_TEXT)["input_ids"])
    checks.append(
        Check("tokenization", "fine", "a probe text gets the same ids from both")
        if same
        else Check(
            "tokenization",
            "warning",
            "a probe text gets other ids from the teacher's tokenizer (another normalisation, or a token that one of them adds): "
            "the teacher reads the student's tokens, so it will see text split as it never was in its training",
        )
    )
    checks.append(_check_chat_templates(student, teacher))
    return checks, shared


def _check_chat_templates(student: Any, teacher: Any) -> Check:
    name = "chat template"
    has = [bool(getattr(tokenizer, "chat_template", None)) for tokenizer in (student, teacher)]
    if not any(has):
        return Check(name, "fine", "neither has one: prompts are plain text")
    if not all(has):
        who = ("student", "teacher")[has.index(False)]
        return Check(
            name,
            "warning",
            f"the {who} has none: conversations reach both in the student's form; give the teacher its own prompt with "
            "teacher_prompt_ids, or train on plain text",
        )
    try:
        texts = [
            tokenizer.apply_chat_template(PROBE_MESSAGES, tokenize=False, add_generation_prompt=True)
            for tokenizer in (student, teacher)
        ]
    except Exception as error:  # templates are programs of their authors; they may raise anything
        return Check(name, "warning", f"a chat template fails on a plain user message: {str(error).splitlines()[0]}")
    if texts[0] == texts[1]:
        return Check(name, "fine", "a user message reads the same in both")
    return Check(
        name,
        "warning",
        f"a user message reads {_short(texts[0])} for the student and {_short(texts[1])} for the teacher, which will see the "
        "student's form: overlap starts low unless it is given its own prompt (teacher_prompt_ids)",
    )


def check_ends(student_ids: Iterable[int], teacher_ids: Iterable[int], tokenizer: Any) -> Check:
    """Whether both end a response by the same token.

    Args:
        student_ids, teacher_ids: the tokens that end a response, from the generation configs.
        tokenizer: the student's, to name them.
    """
    ours, theirs = set(student_ids), set(teacher_ids)
    shown = [", ".join(_token(tokenizer, index) for index in sorted(ids)) or "none" for ids in (ours, theirs)]
    if not ours:
        return Check(
            "ends", "stop", "the student has no EOS token: its responses never end. Set generation_config.eos_token_id"
        )
    if not ours & theirs:
        return Check(
            "ends",
            "warning",
            f"the student ends with {shown[0]}, the teacher with {shown[1]}: the teacher will teach it to go on where it ends, and "
            "responses explode in length. Let both end by one token (generation_config.eos_token_id), or leave such a pair alone",
        )
    if ours != theirs:
        return Check("ends", "note", f"the student ends with {shown[0]}, the teacher with {shown[1]}")
    return Check("ends", "fine", f"both end with {shown[0]}")


def check_contexts(contexts: dict[str, int | None], longest_prompt: int, max_new_tokens: int) -> list[Check]:
    """Whether prompts and responses fit both models.

    Args:
        contexts: tokens that each model reads at most; None where it does not say.
        longest_prompt, max_new_tokens: in tokens.
    """
    checks = []
    needed = longest_prompt + max_new_tokens
    for role, context in contexts.items():
        if context is None or needed <= context:
            room = "any length" if context is None else f"{context:,} tokens"
            checks.append(Check(f"context of the {role}", "fine", f"{room}; {needed:,} are needed"))
        else:
            checks.append(
                Check(
                    f"context of the {role}",
                    "stop",
                    f"{context:,} tokens, and the longest prompt with {max_new_tokens:,} new tokens needs {needed:,}: lower "
                    f"max_completion_length to {max(context - longest_prompt, 0):,}",
                )
            )
    return checks


def check_rollout_ends(rollouts: Rollouts, teacher_end_ids: Iterable[int]) -> list[Check]:
    """How the rollouts end, and what the teacher says to that.

    Args:
        rollouts: unpruned.
        teacher_end_ids: the tokens that end the teacher's own responses.
    """
    rows = len(rollouts)
    at_cap = rollouts.stop_reason.count("length") / rows
    checks = []
    level = "warning" if at_cap > 0.5 else "note" if at_cap > 0.1 else "fine"
    remedy = (
        "; raise max_new_tokens to see what lies beyond, or expect most of the time to be spent there"
        if at_cap > 0.1
        else ""
    )
    checks.append(Check("responses at the cap", level, f"{at_cap:.0%} of the rollouts met the cap{remedy}"))
    checks.append(_check_students_ends(rollouts))
    ends = torch.tensor(sorted(teacher_end_ids), dtype=torch.long, device=rollouts.response_ids.device)
    would_end = torch.isin(rollouts.teacher_topk_ids[..., 0], ends) & rollouts.response_mask
    goes_on = ~torch.isin(rollouts.response_ids, ends)
    missed = float((would_end & goes_on).any(dim=-1).float().mean())
    level = "warning" if missed > 0.5 else "note" if missed > 0.1 else "fine"
    checks.append(
        Check(
            "the teacher's ends",
            level,
            f"in {missed:.0%} of the rollouts the teacher would have ended where the student went on",
        )
    )
    return checks


def _check_students_ends(rollouts: Rollouts) -> Check:
    """What the teacher says to the student's ends, where it could follow the text up to there."""
    name = "the student's ends"
    rows = [row for row, reason in enumerate(rollouts.stop_reason) if reason == "eos"]
    rows = [row for row in rows if int(rollouts.lengths[row]) > 1]
    if not rows:
        return Check(name, "note", "no rollout ended by itself after a first token")
    last = rollouts.lengths[rows] - 1
    probabilities = rollouts.teacher_token_log_probs[rows, last].exp()
    followed = rollouts.teacher_token_log_probs[rows, last - 1].exp() >= FOLLOWED
    if not bool(followed.any()):
        return Check(
            name,
            "note",
            "every end follows a token that the teacher did not expect, so they say nothing about its own ends",
        )
    accepted = float(probabilities[followed].median())
    words = (
        f"where the teacher expected the token before ({float(followed.float().mean()):.0%} of the ends), it gives the end a "
        f"median probability of {accepted:.2g}"
    )
    if accepted < ACCEPTED_END:
        return Check(name, "warning", f"{words}: distillation teaches the student not to end there, and responses grow")
    return Check(name, "fine", words)


def worst(checks: Iterable[Check]) -> str:
    """The highest level among the findings.

    Example:
        >>> worst([Check("a", "note", ""), Check("b", "fine", "")])
        'note'
    """
    return max((check.level for check in checks), key=LEVELS.index, default=LEVELS[0])


def _token(tokenizer: Any, index: int) -> str:
    text = tokenizer.convert_ids_to_tokens(index)
    return f"{text!r} ({index})" if text is not None else str(index)


def _short(text: str, longest: int = 60) -> str:
    return repr(text if len(text) <= longest else f"{text[:longest]}…")
