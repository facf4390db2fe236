"""Which tokens end a response, and who says so: the one answer for training, evaluation, the preflight and what is saved.

A Base student ends documents with one token, an Instruct teacher ends turns with another. A trainer that used the student's
alone would teach it the teacher's end and let it run on to the cap behind it. So every end counts that either of them names, as
far as both know the token. It knows configs and tokenizers; it does not know losses or engines.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.models.compatibility import as_ids, special_token_ids

NAME = "eos_token_id"
SETTING = f"setting {NAME}"


class Source(NamedTuple):
    """Who names a token: the student, the teacher or another role, or `SETTING`; and which part of it, where several could."""

    role: str
    part: str = ""


@dataclass(frozen=True)
class EndTokens:
    """The tokens that end a response.

    Attributes:
        named_by: who names each of them, in the order in which they were asked.
        left_out: tokens that somebody names and not both models know.
    """

    named_by: Mapping[int, tuple[Source, ...]]
    left_out: tuple[int, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(self.named_by)

    def named_by_role(self, role: str) -> tuple[int, ...]:
        """Those that the student, the teacher or another role names, in its config or tokenizer."""
        return tuple(token for token, by in self.named_by.items() if any(source.role == role for source in by))

    def describe(self, tokenizer: Any) -> str:
        """Each token with who names it, in one phrase."""
        tokens = []
        for token, by in self.named_by.items():
            names = [f"the {role}'s {part}" if part else f"the {role}" for role, part in by]
            tokens.append(f"{named_token(token, tokenizer)} ({', '.join(names)})")
        described = ", ".join(tokens)
        if self.left_out:
            described += f"; left out, since not both models know it: {', '.join(map(str, self.left_out))}"
        return described


def find_end_tokens(
    model: Any,
    tokenizer: Any = None,
    *,
    role: str = "model",
    teacher_ids: Iterable[int] = (),
    teacher_tokenizers: Iterable[Any] = (),
    shared: int | None = None,
    excluded: Collection[int] = (),
    given: int | Iterable[int] | None = None,
) -> EndTokens:
    """The tokens that end a response of this model: those of its generation config, its tokenizer and its teacher.

    The model's config is asked only where generation config and tokenizer name none.

    Args:
        role: what the model is called.
        teacher_ids: what its teacher names; none where it cannot name any.
        teacher_tokenizers: the teacher's, or those of several, as far as they are known.
        shared: how many ids both models know; None where there is no teacher to ask.
        excluded: those of them that mean something else to the teacher.
        given: what the user chose; nobody else is asked then.

    Raises:
        ConfigError: nobody names a token that both models know, so that every response would run to its cap; or one was chosen
            that they do not know.

    Example: a student that ends with 2 and a teacher that ends with 6 or 2.
        >>> from types import SimpleNamespace
        >>> student = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=2))
        >>> found = find_end_tokens(student, role="student", teacher_ids=[6, 2], shared=10)
        >>> found.token_ids, found.named_by_role("student"), found.named_by_role("teacher")
        ((2, 6), (2,), (2, 6))
    """
    if given is not None:
        sources = [(Source(SETTING), as_ids(given))]
    else:
        sources = [
            (Source(role, "generation config"), as_ids(getattr(getattr(model, "generation_config", None), NAME, None))),
            (Source(role, "tokenizer"), as_ids(getattr(tokenizer, NAME, None))),
        ]
        if not any(ids for _, ids in sources):
            sources.append((Source(role, "config"), special_token_ids(NAME, model)))
        of_tokenizers = (token for one in teacher_tokenizers for token in as_ids(getattr(one, NAME, None)))
        sources += [
            (Source("teacher"), tuple(teacher_ids)),
            (Source("teacher", "tokenizer"), tuple(dict.fromkeys(of_tokenizers))),
        ]
    named: dict[int, tuple[Source, ...]] = {}
    for source, ids in sources:
        for token in ids:
            named[token] = (*named.get(token, ()), source)
    known = {token: by for token, by in named.items() if (shared is None or token < shared) and token not in excluded}
    left_out = tuple(token for token in named if token not in known)
    if given is not None and (left_out or not known):
        raise ConfigError(f"{NAME} must name tokens below {shared}, which both models know; got {list(named)}")
    if not named:
        raise ConfigError(
            "neither a generation config nor a tokenizer names a token that ends a response: set "
            f"model.generation_config.{NAME}"
        )
    if not known:
        raise ConfigError(
            f"the {role} ends its responses with token {next(iter(named))}, which lies outside the {shared} ids that it shares "
            f"with the teacher: choose a teacher with the student's tokenizer, or set {NAME}"
        )
    return EndTokens(known, left_out)


def shared_end_tokens(*named_by: tuple[Any, Any]) -> set[int]:
    """The tokens that end a response of every model, by its configs or its tokenizer; each comes with its tokenizer, or None."""
    end_tokens = (
        {*special_token_ids(NAME, model), *as_ids(getattr(tokenizer, NAME, None))} for model, tokenizer in named_by
    )
    return set.intersection(*end_tokens)


def named_token(token: int, tokenizer: Any) -> str:
    """A token as text and id, or its id alone where the tokenizer does not know it."""
    text = tokenizer.convert_ids_to_tokens(token)
    return str(token) if text is None else f"{text!r} {token}"
