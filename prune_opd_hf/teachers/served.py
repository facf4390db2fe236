"""A teacher on vLLM servers: each sequence is sent as token ids, and what the server's model says of them comes back.

Requests run side by side, shared by all servers; one that fails is asked again, there or elsewhere. A server reads a sequence anew
at every request, so a watch asks at growing lengths (`generation/check_lengths.py`). Capabilities are what the servers answered to
one small request when the teacher was made. It knows HTTP and tensors; it knows nothing of drift, students or settings.

Departures
1. A server normalises over every id that its model has. Where ids do not count (`restrict_vocabulary`), those among the returned
   ones are left out and log q is corrected by their probability; the rest of theirs stays in the normaliser.
"""

import asyncio
import base64
import io
import math
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from prune_opd_hf.errors import ConfigError, InputError, MonitorStateError, NonFiniteLogitsError, ServingError
from prune_opd_hf.serving.client import GENERATE, Client, TransientError, reading, run, served_model
from prune_opd_hf.serving.servers import (
    ATTEMPTS,
    Server,
    ServerPool,
    Servers,
    gather_or_cancel,
    pause_before,
    split_urls,
)
from prune_opd_hf.teachers.base import TeacherCapabilities, TeacherScores

REQUESTS_AT_ONCE = 32
"""For each server."""

SPARE_CANDIDATES = 4
"""Candidates asked for beyond top_k: some of the likeliest may not count."""

KEY_VARIABLE = "TEACHER_VLLM_API_KEY"
"""The environment variable with the key of the teacher's servers. They never get that of servers that sample (`VLLM_API_KEY`)."""

PROBE = tuple(range(8))
PROBE_TOLERANCE = 1.0
"""Nats of the mean difference between servers that have one model. In bfloat16 the first ids of SmolLM2, which are control tokens,
differed by 0.5 on average and 2.5 at most between two kernels; another model's by 1.3 on average."""


class Passage(NamedTuple):
    """A sequence to be read, of which the end is scored.

    Attributes:
        token_ids: prompt and response.
        first: place of the first token to be scored.
        candidates: ids to be scored at each place from `first` on, where the server can.
    """

    token_ids: list[int]
    first: int
    candidates: list[list[int]] | None = None


class Scored(NamedTuple):
    """What a server says of a sequence, from its first scored place on.

    Attributes:
        ids, log_probs: of the likeliest ids, in any order.
        token_log_probs: of those that stand there.
        candidates: of the given candidates.
    """

    ids: Tensor
    log_probs: Tensor
    token_log_probs: Tensor
    candidates: Tensor | None


class Probed(NamedTuple):
    """What a server answered to one small request, with the version of its weights where somebody trains on it."""

    name: str
    longest: int
    scores_candidates: bool
    log_probs: Tensor
    weights: Any


class ServedTeacher:
    """A `Teacher` that answers over HTTP. Set-up sends each server one small request.

    Args:
        urls: of vLLM servers with one model, one or several (also separated by commas).
        top_k: how many of its most likely tokens `score` returns for each position.
        timeout: seconds without an answer, after which a server counts as gone.
        key_variable: the environment variable with the servers' API key, where they want one.

    Attributes:
        name: what the servers call their model: the Hub id or folder that they were started with.
        wall_seconds, batches: as of every teacher.

    Raises:
        ConfigError: `top_k` below 1, or a URL, time-out or key that cannot be worked with.
        ServingError: a server is not there, is none of vLLM's, refuses, or has another model than the others.

    Example:
        >>> ServedTeacher("http://teacher.example", top_k=0)
        Traceback (most recent call last):
        ...
        prune_opd_hf.errors.ConfigError: top_k must be at least 1, got 0
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        top_k: int = 16,
        timeout: float = 240.0,
        key_variable: str = KEY_VARIABLE,
    ) -> None:
        if top_k < 1:
            raise ConfigError(f"top_k must be at least 1, got {top_k}")
        urls = split_urls(urls if isinstance(urls, str) else ",".join(urls))
        self.servers = Servers(urls, timeout, "teacher_model_server_url", "teacher_model_server_timeout", key_variable)
        self.top_k, self.vocab_size = top_k, 2**31
        self.excluded_ids: tuple[int, ...] = ()
        self.wall_seconds, self.batches = 0.0, 0
        found: dict[str, Probed] = run(self.servers.ask_each(self._probe))
        self._at_set_up = found[urls[0]]
        self.name = self._at_set_up.name
        self._scores_candidates = all(each.scores_candidates for each in found.values())
        self._max_model_len = min(each.longest for each in found.values())
        for url, each in found.items():
            self._check_model(url, each)
        self._sequences: list[list[int]] = []

    # ------------------------------------------------------------------ what it can do

    @property
    def capabilities(self) -> TeacherCapabilities:
        return TeacherCapabilities(
            scores_candidates=self._scores_candidates, gives_full_logits=False, is_incremental=False, adds_rows=False
        )

    @property
    def context_length(self) -> int:
        """The longest sequence that every server reads: one token is generated at its end."""
        return self._max_model_len - 1

    @property
    def rotary_switch(self) -> None:
        """Not known of a served model."""

    @property
    def block_tokens(self) -> int:
        return 2**13  # of a usual GPU server

    def special_token_ids(self, name: str) -> tuple[int, ...]:
        return ()

    def restrict_vocabulary(self, size: int, excluded_ids: Iterable[int] = ()) -> None:
        """As of every teacher; see departure 1. A ConfigError if fewer than `top_k` stay."""
        self.vocab_size = min(size, self.vocab_size)
        self.excluded_ids = tuple(sorted({*self.excluded_ids, *excluded_ids}))
        if self.vocab_size - len(self.excluded_ids) < self.top_k:
            raise ConfigError(f"top_k is {self.top_k}, above the tokens that both models share")

    # ------------------------------------------------------------------ rows that advance together

    def start(
        self, prompt_ids: Int[Tensor, "rows prompt"], prompt_mask: Int[Tensor, "rows prompt"] | None = None
    ) -> None:
        """As `LocalTeacher.start`, with its InputErrors. Nothing is sent yet."""
        mask = torch.ones_like(prompt_ids) if prompt_mask is None else prompt_mask
        self._sequences = [ids[of.bool()].tolist() for ids, of in zip(prompt_ids, mask, strict=True)]
        for sequence in self._sequences:
            self._check(sequence, len(sequence))
        self.batches += 1

    def add_rows(self, prompt_ids: Tensor, prompt_mask: Tensor | None = None) -> None:
        """Refused: every row that joins would have all others read again."""
        raise MonitorStateError(
            "rows cannot join a batch of a served teacher: call start when all of its rows have left"
        )

    def score(
        self,
        token_ids: Int[Tensor, "rows time"],
        candidate_ids: Int[Tensor, "rows time candidates"] | None = None,
        *,
        wanted: Bool[Tensor, "rows time"] | None = None,
    ) -> TeacherScores:
        """As `LocalTeacher.score`, with its errors, and a ServingError where a server refuses, none answers in time, or one has
        another model than at set-up."""
        if not self._sequences:
            raise MonitorStateError("the teacher has no prompts yet: call start(prompt_ids, prompt_mask) first")
        wanted = torch.ones_like(token_ids, dtype=torch.bool) if wanted is None else wanted
        return self._score(self._sequences, token_ids, candidate_ids, wanted)

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Follow only these rows from now on, in this order."""
        self._sequences = [self._sequences[row] for row in rows.tolist()]

    def release(self) -> None:
        self._sequences = []

    def follow_rows(self) -> "ServedRows":
        self.batches += 1
        return ServedRows(self)

    # ------------------------------------------------------------------ inside

    def _check(self, sequence: Sequence[int], first: int) -> None:
        """Refuse ids that the teacher does not have, and from `first` on those that do not count. Prompts may hold these."""
        if not sequence:
            raise InputError("the prompt is empty; it needs at least one token")
        if len(sequence) > self.context_length:
            raise InputError(
                f"the teacher's servers read {self.context_length} tokens, and a sequence of {len(sequence)} would have to be "
                "read: lower max_completion_length, shorten the prompts, or start them with a larger --max-model-len"
            )
        highest = max(sequence)
        if highest >= self.vocab_size or not {*sequence[first:]}.isdisjoint(self.excluded_ids):
            raise InputError(
                "a token id lies outside the teacher's vocabulary: teacher and student must share one tokenizer, and ids that "
                "they do not share must not be sampled (suppress_tokens)"
            )

    def _score(
        self, sequences: Sequence[list[int]], token_ids: Tensor, candidate_ids: Tensor | None, wanted: Tensor
    ) -> TeacherScores:
        """Scores of the next tokens of these sequences, which grow by them."""
        started, device = perf_counter(), token_ids.device
        token_ids, wanted = token_ids.cpu(), wanted.cpu()
        rows, time = token_ids.shape
        if rows != len(sequences) or time == 0:
            raise InputError(f"the teacher follows {len(sequences)} rows, got tokens of {rows} and {time} columns")
        given = None if candidate_ids is None or not self._scores_candidates else candidate_ids.cpu().tolist()
        scores = TeacherScores(
            topk_ids=torch.zeros(rows, time, self.top_k, dtype=torch.long),
            topk_log_probs=torch.zeros(rows, time, self.top_k, dtype=torch.float32),
            candidate_log_probs=None if given is None else torch.zeros(candidate_ids.shape, dtype=torch.float32),  # type: ignore[union-attr]
            token_log_probs=torch.zeros(rows, time, dtype=torch.float32),
        )
        asked: dict[int, Passage] = {}
        for row, sequence in enumerate(sequences):
            begin = len(sequence)
            sequence += token_ids[row].tolist()
            places = wanted[row].nonzero().flatten().tolist()
            if places:
                whole = sequence[: begin + places[-1] + 1]
                self._check(whole, begin)
                asked[row] = Passage(whole, begin, None if given is None else given[row][: places[-1] + 1])
        for row, scored in zip(asked, run(self._read_all(list(asked.values()))), strict=True):
            at = wanted[row, : len(scored.token_log_probs)]
            index = row, at.nonzero().flatten()
            own = scored.token_log_probs[at]
            topk_ids, topk_log_probs, correction = self._best(scored.ids[at], scored.log_probs[at], own, row)
            scores.topk_ids[index], scores.topk_log_probs[index] = topk_ids, topk_log_probs
            scores.token_log_probs[index] = own - correction
            if scores.candidate_log_probs is not None and scored.candidates is not None:
                scores.candidate_log_probs[index] = scored.candidates[at] - correction.unsqueeze(-1)
        self.wall_seconds += perf_counter() - started
        return scores.to(device)

    def _best(self, ids: Tensor, log_probs: Tensor, own: Tensor, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """The `top_k` likeliest ids that count, most likely first; and log of the probability of all that count, as far as is
        seen."""
        bad = ~log_probs.isfinite().any(dim=-1) | log_probs.isnan().any(dim=-1) | own.isnan()
        if bool(bad.any()):
            token = int(bad.nonzero()[0])
            message = f"the teacher returned NaN or infinite logits at row {row}, token {token} of this block"
            raise NonFiniteLogitsError(message, row=row, token=token)
        left_out = (ids >= self.vocab_size) | torch.isin(ids, torch.tensor(self.excluded_ids, dtype=torch.long))
        counted = 1 - (log_probs.double().exp() * left_out).sum(dim=-1)
        correction = counted.clamp(min=1e-12).log().float()
        best = log_probs.masked_fill(left_out, -math.inf).topk(self.top_k, dim=-1)
        if not bool(best.values.isfinite().all()):
            raise ServingError(
                f"fewer than {self.top_k} of the likeliest ids of the teacher are known to the student at some position: is it the "
                "right teacher? If so, lower drift_top_k and loss_top_k"
            )
        return ids.gather(-1, best.indices), best.values - correction.unsqueeze(-1), correction

    # ------------------------------------------------------------------ requests and answers

    async def _read_all(self, sequences: Sequence[Passage]) -> list[Scored]:
        """What the servers say of each sequence."""
        if not sequences:
            return []
        async with (
            self.servers.client() as client,
            ServerPool(self.servers, client, self._recover) as pool,
        ):
            limit = asyncio.Semaphore(REQUESTS_AT_ONCE * len(self.servers.urls))
            return await gather_or_cancel(
                self._read(client, pool, limit, home, sequence) for home, sequence in enumerate(sequences)
            )

    async def _read(
        self, client: Client, pool: ServerPool, limit: asyncio.Semaphore, home: int, sequence: Passage
    ) -> Scored:
        fault = ""
        async with limit:
            for attempt in range(ATTEMPTS):
                await pause_before(attempt)
                server: Server = await pool.available(home)
                try:
                    answer = await client.call(server.url, GENERATE, self._body(sequence))
                    return self._scored(server.url, sequence, answer)
                except TransientError as error:
                    fault = f"vLLM at {server.url} {error}"
                    pool.mark_unavailable(server, str(error))
        raise ServingError(
            f"{fault}; a sequence was sent {ATTEMPTS} times. Look into its log, or raise {self.servers.timeout_setting} if it has "
            "too much to do; a training run goes on with --resume_from_checkpoint true"
        )

    async def _recover(self, client: Client, url: str) -> None:
        """Is it there, with the model of set-up? It may have been started anew with another."""
        self._check_model(url, await self._probe(client, url, self._scores_candidates))

    def _check_model(self, url: str, found: Probed) -> None:
        first = self._at_set_up
        difference = float((found.log_probs - first.log_probs).abs().mean())
        is_one = found.name.split("/")[-1] == self.name.split("/")[-1] and found.weights == first.weights
        if not is_one or not difference <= PROBE_TOLERANCE:
            raise ServingError(
                f"vLLM at {url} has another model or other weights ({found.name}) than the teacher had at set-up ({self.name}); "
                f"log-probabilities differ by {difference:.2g} on average. All servers of a teacher must be started with one model "
                "and keep it, and a student is sampled on servers of its own"
            )

    def _body(self, sequence: Passage) -> dict[str, Any]:
        how: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "detokenize": False}
        how["prompt_logprobs"] = self.top_k + SPARE_CANDIDATES
        if sequence.candidates is not None:
            how |= {"prompt_logprob_start": sequence.first - 1, "prompt_logprob_token_ids": sequence.candidates}
        return {"token_ids": sequence.token_ids, "sampling_params": how, "stream": False}

    def _scored(self, url: str, sequence: Passage, answer: Any) -> Scored:
        """What an answer says.

        Raises:
            TransientError: it was given up.
            ServingError: it is none of this protocol.
        """
        with reading(url):
            if answer["choices"][0].get("finish_reason") in ("abort", "error"):
                raise TransientError("gave an answer up")
            entries = answer["prompt_logprobs"][sequence.first :]
            tokens = sequence.token_ids[sequence.first :]
            if len(entries) != len(tokens):
                raise ValueError(f"log-probabilities of {len(entries)} tokens where {len(tokens)} were sent")
            found = [{int(token): float(of["logprob"]) for token, of in entry.items()} for entry in entries]
            own = torch.tensor([entry[token] for entry, token in zip(found, tokens, strict=True)], dtype=torch.float32)
            if min(map(len, found)) < self.top_k or any(token < 0 for entry in found for token in entry):
                raise ValueError("too few candidates, or ids that are none")
            for likely, entry, token in zip(found, entries, tokens, strict=True):
                if entry[str(token)]["rank"] > self.top_k + SPARE_CANDIDATES:
                    del likely[token]  # it merely stands there
            width = max(map(len, found))
            ids = torch.tensor([[*entry, *[0] * (width - len(entry))] for entry in found])
            values = [[*entry.values(), *[-math.inf] * (width - len(entry))] for entry in found]
            candidates = None
            if sequence.candidates is not None:
                scores = np.load(io.BytesIO(base64.b64decode(answer["prompt_token_id_logprobs"])), allow_pickle=False)
                candidates = torch.from_numpy(scores.astype(np.float32))
                if candidates.shape != (len(tokens), len(sequence.candidates[0])):
                    raise ValueError(f"scores of the shape {tuple(candidates.shape)}")
            return Scored(ids, torch.tensor(values, dtype=torch.float32), own, candidates)

    async def _probe(self, client: Client, url: str, with_candidates: bool = True) -> Probed:
        """One small request, with candidates to score; without, where the server refuses them."""
        name, longest = await served_model(client, url)
        probe = Passage(list(PROBE), 1, [[token] for token in PROBE[1:]] if with_candidates else None)
        try:
            answer = await client.call(url, GENERATE, self._body(probe))
        except ServingError:
            if not with_candidates:
                raise
            return await self._probe(client, url, False)
        log_probs = self._scored(url, probe, answer).token_log_probs
        return Probed(name, longest, with_candidates, log_probs, answer["choices"][0].get("weight_versions"))


class ServedRows:
    """A `RaggedScorer` over a `ServedTeacher`. Made by `ServedTeacher.follow_rows`."""

    def __init__(self, teacher: ServedTeacher) -> None:
        self._teacher = teacher
        self._sequences: dict[int, list[int]] = {}

    def start_row(self, row: int, prompt_ids: Sequence[int]) -> None:
        self._teacher._check(prompt_ids, len(prompt_ids))
        self._sequences[row] = list(prompt_ids)

    def drop_rows(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._sequences.pop(row, None)

    def score(
        self,
        rows: Sequence[int],
        token_ids: Int[Tensor, "rows time"],
        candidate_ids: Int[Tensor, "rows time candidates"] | None = None,
        *,
        wanted: Bool[Tensor, "rows time"],
    ) -> TeacherScores:
        sequences = [self._sequences[row] for row in rows]
        begins = [len(sequence) for sequence in sequences]
        scores = self._teacher._score(sequences, token_ids, candidate_ids, wanted)
        for sequence, begin, count in zip(sequences, begins, wanted.sum(dim=-1).tolist(), strict=True):
            del sequence[begin + count :]
        return scores
