"""From streams of tokens to completions: what every engine does whose rows come each at a pace of its own.

It knows neither servers nor teachers: a `TokenSource` says what each row got, and the watch which rows have ended.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from prune_opd_hf.generation.engine import Completion, NewTokens, Request
from prune_opd_hf.generation.ragged_watch import RaggedDriftWatch


@runtime_checkable
class TokenSource(Protocol):
    """Requests under way."""

    def next(self) -> list[NewTokens]:
        """What has come since the last call; waits until there is something."""

    def cancel(self, rows: Sequence[int]) -> None:
        """Nothing more is wanted of these rows."""

    def undisturbed(self) -> AbstractContextManager:
        """While this lasts, nothing else uses the student's model in this process."""


def completions(
    source: TokenSource, requests: Sequence[Request], watch: RaggedDriftWatch | None
) -> Iterator[Completion]:
    """Yield each response when it is final, and cancel the rows that the watch alone has ended."""
    tokens: list[list[int]] = [[] for _ in requests]
    running = set(range(len(requests)))
    if watch is not None:
        watch.add_prompts([request.prompt_ids for request in requests])
    while running:
        ended: dict[int, str] = {}
        for new in source.next():
            row = new.row
            if watch is not None:
                watch.append(new)
            if row not in running:
                continue
            tokens[row][new.start :] = new.token_ids
            if new.end is not None:
                ended[row] = new.end
        if watch is not None:
            ended_by_source = set(ended)
            ended = {row: watch.ending(row)[1] for row in watch.score_ready(source.undisturbed)}
            source.cancel([row for row in ended if row not in ended_by_source])
        for row, reason in ended.items():
            length = len(tokens[row]) if watch is None else watch.ending(row)[0]
            running.discard(row)
            yield Completion(row, tokens[row][:length], reason)
