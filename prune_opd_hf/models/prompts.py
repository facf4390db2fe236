"""From a prompt as its author has it to token ids: the one answer for training, evaluation and preflight.

A prompt is text, or a conversation whose messages hold text or parts. It knows tokenizers; it does not know data sets.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from prune_opd_hf.errors import ConfigError, InputError, warn_once
from prune_opd_hf.records.files import first_line

logger = logging.getLogger(__name__)

FINAL_ASSISTANT_MESSAGE = ("refuse", "drop", "prefill")
"""What becomes of the assistant's message at the end of a prompt."""


@dataclass(frozen=True)
class PromptEncoder:
    """Makes the token ids of prompts.

    Text is tokenized as it stands: with what the tokenizer puts in front of a text, once, also where a template has put it there
    already, and without an end that the tokenizer puts behind. A conversation goes through the chat template, up to the header
    of the assistant's turn.

    Args:
        tokenizer: the student's.
        chat_template_kwargs: for the chat template.
        final_assistant_message: where the last message is the assistant's: "refuse" it, for it may be the answer; "drop" it; or
            "prefill": the student goes on with it.

    Raises:
        ConfigError: an unknown `final_assistant_message`.

    Example:
        >>> from prune_opd_hf.tasks import load_tokenizer
        >>> tokenizer = load_tokenizer()
        >>> tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        >>> prompt = [{"role": "user", "content": [{"type": "text", "text": ", +1"}, {"type": "text", "text": " = 3"}]}]
        >>> tokenizer.decode(PromptEncoder(tokenizer)(prompt))
        ', +1 = 3'
        >>> PromptEncoder(tokenizer)("<bos> , +1") == PromptEncoder(tokenizer)(", +1")
        True
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    final_assistant_message: str = "refuse"

    def __post_init__(self) -> None:
        if self.final_assistant_message not in FINAL_ASSISTANT_MESSAGE:
            raise ConfigError(
                f"final_assistant_message must be one of {', '.join(FINAL_ASSISTANT_MESSAGE)}, got "
                f"{self.final_assistant_message!r}"
            )

    def __call__(self, prompt: Any, where: str = "this prompt") -> list[int]:
        """The token ids of one prompt.

        Raises:
            InputError: it is no prompt, has no tokens, or the chat template does not take it; one line that names the remedy.
        """
        try:
            ids = self._of_text(prompt) if isinstance(prompt, str) else self._of_conversation(messages_of(prompt))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error.__cause__
        if not ids:
            raise InputError(f"{where} has no tokens: {prompt!r:.80} (does the tokenizer belong to the model?)")
        return ids

    def check_settings_act(self, prompts: Sequence[Any]) -> None:
        """Refuse settings of the chat template where no prompt goes through it."""
        if self.chat_template_kwargs and prompts and all(isinstance(prompt, str) for prompt in prompts):
            raise ConfigError(
                "chat_template_kwargs has no effect on prompts that are text: give lists of messages (on the command line "
                "prompt_as_chat makes them), or leave it out"
            )

    def _of_text(self, text: str) -> list[int]:
        ids, front = self._tokens(text, add_special_tokens=False), self._front
        return ids if not ids or ids[: len(front)] == front else front + ids

    @cached_property
    def _front(self) -> list[int]:
        """What the tokenizer puts in front of a text, found on one."""
        marked, plain = (self._tokens("a", add_special_tokens=added) for added in (True, False))
        starts = range(len(marked) - len(plain) + 1)
        return marked[: next((start for start in starts if marked[start : start + len(plain)] == plain), 0)]

    def _tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        except Exception as error:  # half a surrogate pair, for one; tokenizers raise what they like
            raise InputError(f"the tokenizer does not take the text {text[:40]!r}: {first_line(error)}") from error

    def _of_conversation(self, messages: list[dict[str, Any]]) -> list[int]:
        prefill = False
        if messages[-1]["role"] == "assistant":
            messages, prefill = self._without_answer(messages)
        if not self.tokenizer.chat_template:
            raise InputError(
                "it is a conversation and the student's tokenizer has no chat template: set tokenizer.chat_template, or give the "
                "prompts as text"
            )
        text = self._rendered(messages, prefill)
        if not _stands_in(messages[-1], text):
            text = self._rendered([{**message, **_in_parts(message)} for message in messages], prefill)
        if not _stands_in(messages[-1], text):
            raise InputError(
                "the chat template leaves out the text of the last message: correct tokenizer.chat_template"
            )
        return self._tokens(text, add_special_tokens=False)

    def _rendered(self, messages: list[dict[str, Any]], prefill: bool) -> str:
        opens = {"continue_final_message": True} if prefill else {"add_generation_prompt": True}
        settings = {**opens, **self.chat_template_kwargs}
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **settings)
        except Exception as error:  # a template is a program of its author: it may raise anything
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"the chat template does not take this conversation ({roles}): {first_line(error)}. Change its messages (a system "
                "text may go into the user's first one), chat_template_kwargs or tokenizer.chat_template"
            ) from error

    def _without_answer(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
        """The messages that are used, and whether the last one is to be continued."""
        if self.final_assistant_message == "prefill":
            return messages, True
        if self.final_assistant_message == "refuse":
            raise InputError(
                "the last message is the assistant's, which would tell the student the answer: end the prompt before it, or set "
                "final_assistant_message to 'drop' or, to let the student go on with it, to 'prefill'"
            )
        kept = len(messages)
        while kept and messages[kept - 1]["role"] == "assistant":
            kept -= 1
        if not kept:
            raise InputError("every message is the assistant's, and without them there is no prompt")
        warn_once(
            logger, "prompts that end with the assistant's message are used without it (final_assistant_message='drop')"
        )
        return messages[:kept], False


def messages_of(prompt: Any) -> list[dict[str, Any]]:
    """The messages of a conversation, the text parts of each joined to one text.

    Raises:
        InputError: it is no conversation, it is empty, or a message has no role, no content, or a part that is no text.

    Example:
        >>> messages_of([{"role": "user", "content": ["a", {"type": "text", "text": "b"}], "tool_calls": None}])
        [{'role': 'user', 'content': 'ab'}]
    """
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes)
    if not is_list or not all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in prompt
    ):
        raise InputError(
            "a prompt must be text or a list of messages with 'role' and 'content', got "
            + (type(prompt).__name__ if not is_list or not prompt else f"a list with {prompt[0]!r:.60}")
        )
    if not prompt:
        raise InputError("the conversation is empty: leave it out, or give it a user's message")
    messages = []
    for number, message in enumerate(prompt):
        kept = {name: value for name, value in message.items() if value is not None}
        if "content" in kept:
            kept["content"] = _text_of(kept["content"], number)
        elif "tool_calls" not in kept:
            raise InputError(f"message {number} ({kept['role']}) has no content: give it a text, or leave it out")
        messages.append(kept)
    return messages


def _stands_in(message: Mapping[str, Any], text: str) -> bool:
    """Whether a user's words stand in a rendered conversation, blanks aside; a template may drop content whose form it does not
    know without a word."""
    return message["role"] != "user" or "".join(message.get("content", "").split()) in "".join(text.split())


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """The content as a list of one part, which is all that some templates of multimodal models read."""
    return {"content": [{"type": "text", "text": message["content"]}]} if "content" in message else {}


def _text_of(content: Any, number: int) -> str:
    """The text of a message's content."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InputError(
            f"the content of message {number} must be text or a list of parts, got {type(content).__name__}"
        )
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") in (None, "text") else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InputError(
                f"message {number} holds a part of type {kind!r}, and models are trained on text alone: leave such rows out"
            )
        texts.append(text)
    return "".join(texts)
