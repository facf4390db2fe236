"""Token ids as text that can be shown: nothing in it is invisible, reorders its surroundings or breaks an encoding.

What a reader of rollouts must be able to see: a zero-width space in a candidate, a right-to-left override, half of an emoji.
It knows tokenizers by `batch_decode`, `convert_ids_to_tokens` and `all_special_ids`; it knows neither rollouts nor HTML.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from prune_opd_hf.errors import VocabularyMismatchError

LONGEST_TEXT = 200
"""Characters of one token that are kept; what is cut off is counted."""

_SIGNS = {"\n": "↵", "\t": "⇥", "\x7f": "␡"}
_HIDDEN_LETTERS = set("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")  # letters and marks that draw nothing
_JOINERS = set("\u200c\u200d\ufe0e\ufe0f")  # part of an emoji or a word where something stands before them
_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}  # the alphabet of byte-level BPE (GPT-2)
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Token:
    """One entry of the vocabulary as it is shown.

    Attributes:
        text: visible characters only.
        breaks: line breaks that the token's text holds.
        special: a special token of the tokenizer.
        fragment: some bytes of a character, shown as hexadecimal digits.
    """

    text: str
    breaks: int = 0
    special: bool = False
    fragment: bool = False


def visible(text: str) -> str:
    """Text with a sign for whatever could not be seen: controls, bidi marks, odd blanks, lone surrogates.

    Blanks stay. Joiners inside an emoji or a word stay as well; alone they are shown.
    """
    shown = "".join(_visible_character(text, index) for index in range(len(text)))
    if shown and unicodedata.category(shown[0]) in ("Mn", "Mc", "Me"):
        shown = "◌" + shown  # an accent needs something to stand on, else it lands on the token before
    if len(shown) > LONGEST_TEXT:
        shown = f"{shown[:LONGEST_TEXT]}… (+{len(shown) - LONGEST_TEXT})"
    return shown


def _visible_character(text: str, index: int) -> str:
    character = text[index]
    code = ord(character)
    if character in _SIGNS or code < 0x20:
        return _SIGNS.get(character, chr(0x2400 + code))
    drawn = bool(index) and _draws(text[index - 1]) if character in _JOINERS else _draws(character)
    return character if drawn else f"⟨U+{code:04X}⟩"


def _draws(character: str) -> bool:
    if character == "\ufe0f":  # an emoji's selector may be followed by a joiner
        return True
    selector = "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
    return character.isprintable() and character not in _HIDDEN_LETTERS and not selector


def describe_tokens(ids: Sequence[int], tokenizer: Any, name: str = "the tokenizer") -> list[Token]:
    """Each of several distinct ids as it reads in the middle of a text, with the blank before it where there is one; without a
    tokenizer the ids themselves.

    Raises:
        VocabularyMismatchError: an id that the tokenizer does not have.
    """
    if tokenizer is None:
        return [Token(f" {index}") for index in ids]
    known = set(tokenizer.get_vocab().values())
    unknown = next((index for index in ids if index not in known), None)
    if unknown is not None:
        raise VocabularyMismatchError(
            f"{name} is of another vocabulary: the rollouts hold token id {unknown}, it has {len(tokenizer)} tokens. "
            "Pass the student's tokenizer."
        )
    ids = [int(index) for index in ids]
    special = set(tokenizer.all_special_ids)
    names, texts = tokenizer.convert_ids_to_tokens(ids), _decode_in_context(ids, tokenizer)
    return [_describe(text, token, index in special) for index, text, token in zip(ids, texts, names, strict=True)]


def _describe(text: str, name: str, special: bool) -> Token:
    if "\ufffd" in text and "\ufffd" not in name and (data := _token_bytes(name)):
        return Token(f"⟨{data.hex(' ').upper()}⟩", special=special, fragment=True)
    if not text:
        text, special = name or "", True
    return Token(visible(text) or "⟨empty⟩", text.count("\n"), special)


def _decode_in_context(ids: list[int], tokenizer: Any) -> list[str]:
    """Text that each id adds after an ordinary token: decoders drop the blank of a sequence's first token."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    special = set(tokenizer.all_special_ids)
    alone = tokenizer.batch_decode([[index] for index in ids], **options)
    anchors = (
        (index, text)
        for index, text in zip(ids, alone, strict=True)
        if index not in special and text.strip() and text.strip().isascii()
    )
    anchor, before = next(anchors, (None, ""))
    if anchor is None:
        return list(alone)
    behind = tokenizer.batch_decode([[anchor, index] for index in ids], **options)
    return [
        pair[len(before) :] if pair.startswith(before) else single for pair, single in zip(behind, alone, strict=True)
    ]


def _token_bytes(name: str) -> bytes | None:
    """Bytes of a token in the alphabets of byte-level BPE and of SentencePiece's byte fallback; None for any other."""
    if match := _BYTE_FALLBACK.fullmatch(name):
        return bytes([int(match[1], 16)])
    if all(character in _BYTE_OF for character in name):
        return bytes(_BYTE_OF[character] for character in name)
    return None
