"""Can this teacher distil into this student at all? Findings from tokenizers, end tokens, contexts and first rollouts.

Every check gives one line: what was found, and where it is not fine, what follows and what to do. Nothing here raises.
"""

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from prune_opd_hf.errors import ConfigError, UnsupportedGenerationError, VocabularyMismatchError
from prune_opd_hf.evaluation.grading.math_grader.extraction import THOUGHT_TAGS, is_thinking
from prune_opd_hf.generation import LoopEngine, Sampling
from prune_opd_hf.models.compatibility import (
    check_context,
    describe_rotary_switch,
    refuse_other_caches,
    rotary_switch,
)
from prune_opd_hf.models.end_tokens import EndTokens, named_token
from prune_opd_hf.models.lm_head import base_causal_lm
from prune_opd_hf.models.vocabulary import SharedVocabulary, shared_vocabulary
from prune_opd_hf.records.files import first_line
from prune_opd_hf.records.rollouts import Rollouts

PROBE_TEXT = "Let x = 12.5; then 3x + 1 = 38.5.\n\n\\boxed{7}  Straße, 数学 🙂"
PROBE_MESSAGES = [{"role": "user", "content": "What is 2 + 2?"}]
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")

ACCEPTED_END = 0.05
"""Where the teacher gives the student's own end tokens a smaller median probability than this, training teaches it not to end."""

FOLLOWED = 0.5
"""Teacher's probability of a token from which on it counts as having followed the text."""


Level = Literal["fine", "note", "warning", "stop"]


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        level: "fine", "note", "warning", or "stop": this pair will not work.
        message: what was found and what follows.
    """

    name: str
    level: Level
    message: str


def check_tokenizers(
    student: Any, teacher: Any, shared_end_tokens: Collection[int] = (), *, allow_renamed_special_tokens: bool = False
) -> tuple[list[Check], SharedVocabulary | None]:
    """Vocabulary, special tokens, the tokens of a probe text, and chat templates of two tokenizers.

    Args:
        shared_end_tokens: the tokens that end a response of either model.
        allow_renamed_special_tokens: as in training.

    Returns:
        The findings, and the ids that both share; None where they mean different tokens by one id that must be the same.
    """
    shared = None
    try:
        shared = shared_vocabulary(student, teacher, allow_renamed_special_tokens=allow_renamed_special_tokens)
        shared = shared.with_shared(shared_end_tokens)
        vocabulary = Check("vocabulary", "warning" if shared.renamed else "fine", shared.describe())
        if len(student) != len(teacher) and not shared.renamed:
            sizes = f"the student's tokenizer has {len(student):,} entries, the teacher's {len(teacher):,}"
            vocabulary = Check("vocabulary", "note", f"{vocabulary.message}; {sizes}")
    except VocabularyMismatchError as error:
        vocabulary = Check("vocabulary", "stop", str(error))
    pairs = {name: (getattr(student, name, None), getattr(teacher, name, None)) for name in SPECIAL_TOKENS}
    differing = [f"{name} {ours!r} and {theirs!r}" for name, (ours, theirs) in pairs.items() if ours != theirs]
    special = Check("special tokens", "fine", "the same")
    if differing:
        special = Check("special tokens", "note", f"student and teacher differ: {'; '.join(differing)}")
    tokenization = Check("tokenization", "fine", "a probe text gets the same ids from both")
    if list(student(PROBE_TEXT)["input_ids"]) != list(teacher(PROBE_TEXT)["input_ids"]):
        message = (
            "a probe text gets other ids from the teacher's tokenizer (another normalisation, or a token that one of them "
            "adds): the teacher reads the student's tokens, split as they never were in its training"
        )
        tokenization = Check("tokenization", "warning", message)
    templates = Check("chat template", *_compare_chat_templates(student, teacher))
    return [vocabulary, special, tokenization, templates], shared


def _compare_chat_templates(student: Any, teacher: Any) -> tuple[Level, str]:
    """Level and message."""
    has = [bool(getattr(tokenizer, "chat_template", None)) for tokenizer in (student, teacher)]
    if not any(has):
        return "fine", "neither has one: prompts are plain text"
    if not all(has):
        return "warning", (
            f"the {('student', 'teacher')[has.index(False)]} has none: conversations reach both in the student's form; give "
            "the teacher its own prompt with teacher_prompt_ids, or train on plain text"
        )
    try:
        ours, theirs = (
            tokenizer.apply_chat_template(PROBE_MESSAGES, tokenize=False, add_generation_prompt=True)
            for tokenizer in (student, teacher)
        )
    except Exception as error:  # templates are programs of their authors; they may raise anything
        return "warning", f"a chat template fails on a plain user message: {first_line(error)}"
    if ours == theirs:
        return "fine", "a user message reads the same in both"
    ours, theirs = (repr(text if len(text) <= 60 else f"{text[:60]}…") for text in (ours, theirs))
    return "warning", (
        f"a user message reads {ours} for the student and {theirs} for the teacher, which will see the student's form: overlap "
        "starts low unless it is given its own prompt (teacher_prompt_ids)"
    )


def check_end_tokens(end_tokens: EndTokens, tokenizer: Any) -> Check:
    """Whether student and teacher end a response by the same tokens; the student's tokenizer names them."""
    ours, theirs = end_tokens.named_by_role("student"), end_tokens.named_by_role("teacher")
    described = end_tokens.describe(tokenizer)
    if {*ours} == {*theirs} or not (ours or theirs):
        return Check("end tokens", "fine", f"a response ends with {described}")
    added = [token for token in theirs if token not in ours]
    if not added:
        return Check("end tokens", "note", f"a response ends with {described}; the teacher does not name all of them")
    names = " and ".join(named_token(token, tokenizer) for token in added)
    return Check(
        "end tokens",
        "warning",
        f"a response ends with {described}. At {names} the student alone would not stop, and the teacher will teach it to say "
        "that: training stops there, and the saved student's generation config will. Before training, and where that file is "
        f"not read, pass eos_token_id={list(end_tokens.token_ids)}",
    )


THINKING_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which chat templates open a thought, or close it at once."""


def check_thoughts(
    prompts: Sequence[str], student_openings: Sequence[str], teacher_openings: Sequence[str], student: Any, teacher: Any
) -> Check:
    """Whether the teacher begins its answers with a thought that the student's prompts do not lead to.

    Args:
        prompts: as the student reads them.
        student_openings, teacher_openings: the first tokens of answers to them.
        student, teacher: the tokenizers.
    """
    teacher_thinks = max(_share(map(_begins_thought, teacher_openings)), is_thinking(_probe_prompt(teacher)))
    student_thinks = max(_share(map(_begins_thought, student_openings)), _share(map(is_thinking, prompts)))
    if teacher_thinks <= 0.5:
        return Check("thoughts", "fine", "the teacher does not begin its answers with a thought")
    if student_thinks > 0.5:
        return Check("thoughts", "fine", "both begin their answers with a thought")
    written = str(getattr(student, "chat_template", None))
    known = [f"{{'{name}': False}}, which its template knows" for name in THINKING_SWITCHES if name in written]
    return Check(
        "thoughts",
        "warning",
        "the teacher begins its answers with a thought, and the student's prompts do not lead there: they hardly agree from the "
        "first token on, and the student would learn to think first. If it shall not, give chat_template_kwargs"
        f"{f' ({known[0]})' if known else ''}; if it shall, give prompts that open the thought",
    )


def _probe_prompt(tokenizer: Any) -> str:
    """A user's message in a chat template; nothing where there is none or where it fails, which `check_tokenizers` reports."""
    if getattr(tokenizer, "chat_template", None):
        with contextlib.suppress(Exception):
            return tokenizer.apply_chat_template(PROBE_MESSAGES, tokenize=False, add_generation_prompt=True)
    return ""


def _begins_thought(text: str) -> bool:
    return text.lstrip().startswith(tuple(opening for opening, _ in THOUGHT_TAGS))


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values) if values else 0.0


def check_contexts(contexts: Mapping[str, int | None], longest_prompt: int, max_completion_length: int) -> list[Check]:
    """Whether prompts and responses fit what each model reads at most, in tokens; None where it does not say."""
    checks = []
    for role, context in contexts.items():
        limit = "any length" if context is None else f"{context:,} tokens"
        found = Check(
            f"context of the {role}", "fine", f"{limit}; {longest_prompt + max_completion_length:,} are needed"
        )
        try:
            check_context(context, longest_prompt, max_completion_length, role=role)
        except ConfigError as error:
            found = Check(found.name, "stop", str(error))
        checks.append(found)
    return checks


def check_families(student: Any, teacher: Any, sampling: Sampling, longest_prompt: int) -> list[Check]:
    """Whether both models can be followed block by block, and rows of the student that have ended removed from a batch."""
    checks = []
    for role, model in (("student", student), ("teacher", teacher)):
        try:
            refuse_other_caches(base_causal_lm(model), role)
        except UnsupportedGenerationError as error:
            checks.append(Check("family", "stop", str(error)))
    if checks:
        return checks
    longest = longest_prompt + sampling.max_completion_length
    checks = [
        Check("rotary embedding", "warning", message)
        for role, model in (("student", student), ("teacher", teacher))
        if (message := describe_rotary_switch(rotary_switch(model), longest, role=role)) is not None
    ]
    obstacle = LoopEngine(student, sampling).compaction_obstacle(longest_prompt)
    if obstacle is None:
        return [*checks, Check("row compaction", "fine", "rows that end are removed from the batch")]
    consequence = "rows that end stay in the batch until all have ended, and stopping them saves little"
    return [*checks, Check("row compaction", "warning", f"{obstacle}: {consequence}")]


def check_rollout_end_tokens(rollouts: Rollouts, teacher_end_ids: Iterable[int]) -> list[Check]:
    """How unpruned rollouts end, and how likely the teacher finds that, whose own responses end with `teacher_end_ids`."""

    def level_of(share: float) -> Level:
        return "warning" if share > 0.5 else "note" if share > 0.1 else "fine"

    at_cap = rollouts.stop_reason.count("length") / len(rollouts)
    remedy = "; raise max_completion_length to see what lies beyond, or expect most of the time to be spent there"
    met = f"{at_cap:.0%} of the rollouts met the cap{remedy if at_cap > 0.1 else ''}"
    end_ids = torch.tensor(sorted(teacher_end_ids), dtype=torch.long, device=rollouts.response_ids.device)
    teacher_ends = torch.isin(rollouts.teacher_topk_ids[..., 0], end_ids) & rollouts.response_mask
    missed = float((teacher_ends & ~torch.isin(rollouts.response_ids, end_ids)).any(dim=-1).float().mean())
    went_on = f"in {missed:.0%} of the rollouts the teacher would have ended where the student went on"
    return [
        Check("responses at the cap", level_of(at_cap), met),
        Check("the student's end tokens", *_judge_students_end_tokens(rollouts)),
        Check("the teacher's end tokens", level_of(missed), went_on),
    ]


def _judge_students_end_tokens(rollouts: Rollouts) -> tuple[Level, str]:
    """Level and message: the teacher's probability of the student's end tokens, where it could follow the text up to there."""
    ended = torch.tensor([reason == "eos" for reason in rollouts.stop_reason], device=rollouts.lengths.device)
    rows = (ended & (rollouts.lengths > 1)).nonzero().squeeze(-1)
    if not len(rows):
        return "note", "no rollout ended by itself after a first token"
    last = rollouts.lengths[rows] - 1
    probabilities = rollouts.teacher_token_log_probs[rows, last].exp()
    followed = rollouts.teacher_token_log_probs[rows, last - 1].exp() >= FOLLOWED
    if not bool(followed.any()):
        return "note", "every end follows a token that the teacher did not expect, so nothing is known of its own ends"
    accepted = float(probabilities[followed].median())
    message = (
        f"where the teacher expected the token before ({float(followed.float().mean()):.0%} of the ends), it gives the end a "
        f"median probability of {accepted:.2g}"
    )
    if accepted >= ACCEPTED_END:
        return "fine", message
    return "warning", f"{message}: distillation teaches the student not to end there, and responses grow"
