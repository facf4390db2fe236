"""Token ids as text that can be shown: nothing in it is invisible, reorders its surroundings or breaks an encoding.

What a reader of rollouts must be able to see: a zero-width space in a candidate, a right-to-left override, half of an emoji.
It knows tokenizers by `batch_decode`, `convert_ids_to_tokens` and `all_special_ids`; it knows neither rollouts nor HTML.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prune_opd_hf.errors import VocabularyMismatchError

LONGEST_TEXT = 200
"""Characters of one token that are kept; what is cut off is counted."""

_SIGNS = {"\n": "↵", "\t": "⇥", "\x7f": "␡"}
_HIDDEN_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}
_HIDDEN_LETTERS = set("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")  # letters and marks that draw nothing
_JOINERS = set("\u200c\u200d\ufe0e\ufe0f")  # part of an emoji or a word where something stands before them
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

    Example:
        >>> visible("a\\n\\u202eb\\x00"), visible("\\ud800"), visible("\\u200d")
        ('a↵⟨U+202E⟩b␀', '⟨U+D800⟩', '⟨U+200D⟩')
    """
    shown = "".join(_visible_character(text, index) for index in range(len(text)))
    if shown and unicodedata.category(shown[0]) in ("Mn", "Mc", "Me"):
        shown = "◌" + shown  # an accent needs something to stand on, else it lands on the token before
    if len(shown) > LONGEST_TEXT:
        shown = f"{shown[:LONGEST_TEXT]}… (+{len(shown) - LONGEST_TEXT})"
    return shown


def _visible_character(text: str, index: int) -> str:
    character = text[index]
    if character == " ":
        return character
    if character in _SIGNS:
        return _SIGNS[character]
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if character in _JOINERS:
        return character if index and _draws(text[index - 1]) else f"⟨U+{code:04X}⟩"
    return character if _draws(character) else f"⟨U+{code:04X}⟩"


def _draws(character: str) -> bool:
    code = ord(character)
    selector = 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF
    hidden = unicodedata.category(character) in _HIDDEN_CATEGORIES or character in _HIDDEN_LETTERS or selector
    return not hidden or character == "\ufe0f"  # an emoji's selector may be followed by a joiner


def describe_ids(ids: Sequence[int]) -> list[Token]:
    """Entries for readers without a tokenizer: the ids themselves.

    Example:
        >>> describe_ids([7])[0].text
        ' 7'
    """
    return [Token(f" {index}") for index in ids]


def describe_tokens(ids: Sequence[int], tokenizer: Any, name: str = "the tokenizer") -> list[Token]:
    """Each id as it reads in the middle of a text, with the blank before it where there is one.

    Args:
        ids: distinct token ids.
        tokenizer: of Transformers.
        name: of the tokenizer, for the message.

    Raises:
        VocabularyMismatchError: an id that the tokenizer does not have.

    Example:
        >>> from prune_opd_hf.tasks import load_tokenizer
        >>> [token.text for token in describe_tokens([20, 2], load_tokenizer())]
        [' +3', ' <eos>']
    """
    size = len(tokenizer)
    known = set(tokenizer.get_vocab().values())
    for index in ids:
        if index not in known:
            raise VocabularyMismatchError(
                f"{name} is of another vocabulary: the rollouts hold token id {index}, it has {size} tokens. "
                "Pass the student's tokenizer."
            )
    ids = [int(index) for index in ids]
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(ids)
    texts = _decode_in_context(ids, tokenizer)
    return [
        _describe(text, name_of_token, index in special)
        for index, text, name_of_token in zip(ids, texts, names, strict=True)
    ]


def _describe(text: str, name: str, special: bool) -> Token:
    if "\ufffd" in text and "\ufffd" not in name:
        data = _token_bytes(name)
        if data:
            return Token(f"⟨{data.hex(' ').upper()}⟩", special=special, fragment=True)
    if not text:
        text, special = name or "", True
    return Token(visible(text) or "⟨empty⟩", text.count("\n"), special)


def _decode_in_context(ids: list[int], tokenizer: Any) -> list[str]:
    """Text that each id adds after an ordinary token: decoders drop the blank of a sequence's first token."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    special = set(tokenizer.all_special_ids)
    anchor = next((index for index in ids if index not in special and _is_word(tokenizer, index, options)), None)
    if anchor is None:
        return list(tokenizer.batch_decode([[index] for index in ids], **options))
    before = tokenizer.decode([anchor], **options)
    alone = tokenizer.batch_decode([[index] for index in ids], **options)
    behind = tokenizer.batch_decode([[anchor, index] for index in ids], **options)
    return [
        pair[len(before) :] if pair.startswith(before) else single for pair, single in zip(behind, alone, strict=True)
    ]


def _is_word(tokenizer: Any, index: int, options: dict) -> bool:
    return tokenizer.decode([index], **options).strip().isascii() and tokenizer.decode([index], **options).strip() != ""


def _token_bytes(name: str) -> bytes | None:
    """Bytes of a token in the alphabets of byte-level BPE and of SentencePiece's byte fallback; None for any other."""
    match = _BYTE_FALLBACK.fullmatch(name)
    if match:
        return bytes([int(match.group(1), 16)])
    if all(character in _BYTE_OF for character in name):
        return bytes(_BYTE_OF[character] for character in name)
    return None


def _byte_alphabet() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable Latin-1 stands for itself, other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
