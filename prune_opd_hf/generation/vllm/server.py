"""Rollouts from vLLM servers: every response a stream of its own, all on one event loop in a thread.

A transient fault (no connection, a hang, an error of the server) ends the answers that it hit. They begin anew, on another
server or when theirs is back; no token of a broken answer is used. A server that comes back with other weights than those that
were sent last gets them again first. What is final, or does not pass within `server_timeout`, is an error in one line.

server_streams.py has the requests of one `generate`, server_weights.py the weights; here is set-up, and how answers read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from prune_opd_hf.errors import ServingError
from prune_opd_hf.generation.engine import Candidates, NewTokens, Request, Sampling, cap_of
from prune_opd_hf.generation.ragged_watch import RaggedDriftWatch
from prune_opd_hf.generation.streams import TokenSource
from prune_opd_hf.generation.vllm.base import VLLMEngine
from prune_opd_hf.generation.vllm.protocol import STOP_REASON_OF, VLLMSettings, candidates_of
from prune_opd_hf.generation.vllm.server_streams import ServerStreams
from prune_opd_hf.generation.vllm.server_weights import ServerWeights
from prune_opd_hf.models.loading import is_adapted
from prune_opd_hf.serving.client import GENERATE, Client, TransientError, reading, run, served_model


class VLLMServerEngine(VLLMEngine):
    """The engine over one vLLM server or several. Set-up asks each of them for one token.

    Args:
        model: the student; the servers must have been started with it, whatever its weights.
        sampling, slots, candidates: as for `VLLMEngine`.
        settings: where the servers are.
    """

    name = "vllm server"

    def __init__(
        self, model: nn.Module, sampling: Sampling, *, slots: int, candidates: int, settings: VLLMSettings
    ) -> None:
        super().__init__(sampling, slots=slots, candidates=candidates)
        self.servers = settings.servers
        self.where = f"vLLM at {', '.join(self.servers.urls)}"
        self.weights = ServerWeights(self.servers, settings.weights_dir)
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._trains_adapter = is_adapted(model)
        self.max_model_len = min(run(self.servers.ask_each(self._probe)).values())
        self.check_length()

    async def _probe(self, client: Client, url: str) -> int:
        """The longest sequence that a server takes, after one token from it."""
        _, longest = await served_model(client, url)
        self.new_tokens(url, 0, 0, await client.call(url, GENERATE, self.body((0,), 1, seed=0)))
        if not self._trains_adapter:
            await client.call(url, "/weight_info")
        return longest

    @property
    def weights_version(self) -> str:
        return "" if self.weights.current is None else self.weights.current.version

    def update_weights(self, model: nn.Module, step: int) -> None:
        self.weights.update(model, step)

    def body(self, token_ids: Sequence[int], max_tokens: int, *, seed: int, interval: int = 0) -> dict[str, Any]:
        """What asks for the next tokens of a sequence: as a stream of events of `interval` tokens each, or in one answer."""
        parameters = {**self.parameters, "max_tokens": max_tokens, "seed": seed, "stream_interval": max(1, interval)}
        named = self.weights.in_requests
        return {"token_ids": list(token_ids), "sampling_params": parameters, "stream": interval > 0, **named}

    def new_tokens(self, url: str, row: int, start: int, answer: Any) -> NewTokens:
        """What an event, or a whole answer, says.

        Raises:
            TransientError: it was given up, or came from other weights.
            ServingError: it is none of this protocol, or of another vocabulary.
        """
        with reading(url):
            choice = answer["choices"][0]
            token_ids, reason = [int(token) for token in choice["token_ids"]], choice.get("finish_reason")
            candidates = self._candidates(choice["logprobs"]["content"], token_ids) if self.candidates else None
            found = {span["version"] for span in choice.get("weight_versions") or ()}
        highest = max((*token_ids, *(id for ids in (candidates.ids if candidates else ()) for id in ids)), default=0)
        if highest >= self._vocabulary:
            raise ServingError(
                f"vLLM at {url} has another vocabulary: token {highest}, and the student knows {self._vocabulary}. Start it with "
                "the student's folder"
            )
        if reason in ("abort", "error"):
            raise TransientError(f"gave an answer up ({reason})")
        wanted = self.weights.current
        if reason is not None and wanted is not None and not wanted.is_adapter and found != {wanted.version}:
            raise TransientError(
                f"answered with the weights {', '.join(sorted(map(str, found)))}, and {wanted.version} were sent"
            )
        return NewTokens(row, start, token_ids, candidates, STOP_REASON_OF.get(reason))

    def _candidates(self, content: Sequence[Any], token_ids: Sequence[int]) -> Candidates:
        alternatives = [
            {int(entry["token_id"]): float(entry["logprob"]) for entry in (*at["top_logprobs"], at)} for at in content
        ]
        if len(alternatives) != len(token_ids):
            raise ValueError(f"{len(alternatives)} log-probabilities for {len(token_ids)} tokens")
        return candidates_of(alternatives, token_ids, self.candidates)

    @contextmanager
    def _source(self, requests: Sequence[Request], watch: RaggedDriftWatch | None) -> Iterator[TokenSource]:
        caps = [cap_of(request, self.sampling.max_completion_length) for request in requests]
        streams = ServerStreams(self, requests, caps, watch)
        try:
            yield streams
            streams.finish()
        finally:
            streams.close()

    def close(self) -> None:
        self.weights.close()
