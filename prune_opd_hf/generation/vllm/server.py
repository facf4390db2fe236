"""Rollouts from vLLM servers: every response a stream of its own, all on one event loop in a thread.

A fault that may pass (no connection, a hang, an error of the server) ends the answers that it hit. They begin anew, on another
server or when theirs is back; no token of a broken answer is used. A server that comes back with other weights than those that
were sent last gets them again first. What cannot pass, or does not within `server_timeout`, is an error in one line.

server_streams.py has the requests of one `generate`; here is what outlives them: set-up, weights, the words of both sides.
"""

import contextlib
import copy
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from prune_opd_hf.errors import ConfigError, InputError, PruneOPDError, ServingError
from prune_opd_hf.generation.engine import Candidates, Completion, NewTokens, RaggedWatch, Request, Sampling, cap_of
from prune_opd_hf.generation.streams import check_requests, completions
from prune_opd_hf.generation.vllm.protocol import (
    VLLMSettings,
    candidates_of,
    request_parameters,
    sampling_parameters,
)
from prune_opd_hf.generation.vllm.same_model import PROBE_TOKENS, PROBING, SameModel, probing_prompt
from prune_opd_hf.generation.vllm.server_streams import ServerStreams
from prune_opd_hf.generation.vllm.weights import SavedWeights, WeightFolders, is_main_process, is_sharded
from prune_opd_hf.records.files import first_line
from prune_opd_hf.serving import GENERATE, Client, TransientError, longest_sequence, reading, run

PLAIN_INTERVAL = 64
"""Tokens of an event where no watch waits for them."""


class VLLMServerEngine:
    """A `RolloutEngine` over one vLLM server or several. Set-up asks each of them for one token.

    Args:
        model: the student; the servers must have been started with it, whatever its weights.
        sampling: how to sample.
        candidates: how many of the student's most likely tokens are wanted with each token.
        settings: where the servers are.

    Raises:
        ServingError: a server is not there, is none of vLLM's, or refuses.
        ConfigError: it takes no responses of this length, or has no like of a sampling argument.
    """

    ragged = True

    def __init__(self, model: nn.Module, sampling: Sampling, *, candidates: int, settings: VLLMSettings) -> None:
        self.settings, self._wanted_candidates = settings, candidates
        self._set_sampling(sampling)
        self._folders = WeightFolders(settings.weights_dir, f"prune-opd-{secrets.token_hex(4)}")
        self.weights: SavedWeights | None = None
        self._same_model = SameModel()
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._trains_adapter = hasattr(model, "peft_config")
        self.max_model_len = min(run(self.settings.servers.ask_each(self._probe)))
        self._check_length()

    def with_sampling(self, sampling: Sampling, *, slots: int) -> "VLLMServerEngine":
        """Another engine over the same servers, to which it sends weights of its own."""
        other = copy.copy(self)
        other._set_sampling(sampling)
        other._check_length()
        return other

    def _set_sampling(self, sampling: Sampling) -> None:
        # The server normalises over every id. Where some must not count, the student's side is scored here.
        self.delivers_candidates = self._wanted_candidates > 0 and not sampling.suppress_tokens
        self.sampling = sampling
        self.candidates = self._wanted_candidates if self.delivers_candidates else 0
        self.parameters = sampling_parameters(sampling, self.candidates)

    def _check_length(self) -> None:
        if self.max_model_len <= self.sampling.max_completion_length:
            raise ConfigError(
                f"vLLM at {', '.join(self.settings.server_base_url)} takes sequences of {self.max_model_len} tokens "
                f"(--max-model-len), too few for max_completion_length {self.sampling.max_completion_length} and a prompt: start "
                "it with a larger one, or lower max_completion_length"
            )

    # ------------------------------------------------------------------ set-up

    async def _probe(self, client: Client, url: str) -> int:
        """The longest sequence that a server takes, after one token from it."""
        longest = await longest_sequence(client, url)
        request = Request((0,), seed=0, max_completion_length=1)
        self.new_tokens(url, 0, 0, await client.call(url, GENERATE, self._body(request)))
        if not self._trains_adapter:
            await client.call(url, "/weight_info")
        return longest

    # ------------------------------------------------------------------ weights

    def update_weights(self, model: nn.Module, step: int) -> None:
        """Send these weights to every server. All processes call it together; the first one saves and sends."""
        weights: SavedWeights | None = None
        own_fault: Exception | None = None
        try:
            weights = self._folders.save(model, step)
            if is_main_process():
                self._send_and_check(model, weights)
        except Exception as error:  # whatever it is: raised at once, it would leave the other processes waiting
            own_fault = error
        weights, fault = _from_main_process(weights, own_fault)
        if own_fault is not None or fault is not None:
            raise own_fault or fault  # type: ignore[misc]
        assert weights is not None
        self._folders.keep_only(weights)
        self.weights = weights

    def _send_and_check(self, model: nn.Module, weights: SavedWeights) -> None:
        run(self.settings.servers.ask_each(lambda client, url: self.send_weights(client, url, weights)))
        self.weights = weights
        if not is_sharded(model):
            self._check_model(model)

    async def send_weights(self, client: Client, url: str, weights: SavedWeights) -> None:
        """Have a server read these weights."""
        if weights.is_adapter:
            body = {"lora_name": weights.version, "lora_path": weights.folder}
            if self.weights is not None and self.weights.version != weights.version:
                with contextlib.suppress(ServingError):  # a server that was started anew does not know it
                    await client.call(url, "/v1/unload_lora_adapter", {"lora_name": self.weights.version})
            await client.call(url, "/v1/load_lora_adapter", body)
            return
        reload = {"method": "reload_weights", "kwargs": {"weights_path": weights.folder}}
        await client.call(
            url, "/pause?mode=abort", {}
        )  # what was cancelled may still run, and hold blocks of the prefix cache
        try:
            await client.call(url, "/collective_rpc", reload)
            answer = await client.call(url, "/reset_prefix_cache", {})
            with reading(url):
                succeeded = answer["success"]
            if not succeeded:
                raise TransientError("holds on to its prefix cache, which old weights made")
            await client.call(url, "/update_weight_version", {"new_version": weights.version})
        finally:
            await client.call(url, "/resume", {})

    async def has_weights(self, client: Client, url: str, weights: SavedWeights) -> bool:
        """Whether these are the weights that a server samples with; one that was started anew has forgotten them."""
        if weights.is_adapter:
            models = await client.call(url, "/v1/models")
            with reading(url):
                return any(known["id"] == weights.version for known in models["data"])
        answer = await client.call(url, "/weight_info")
        with reading(url):
            return answer["weight_version"] == weights.version

    def _check_model(self, model: nn.Module) -> None:
        """Compare what every server says of a few tokens of its own with the student."""
        prompt = probing_prompt(self._vocabulary)
        body = self._body(Request(prompt, max_completion_length=1))
        body["sampling_params"] |= {**PROBING, "max_tokens": PROBE_TOKENS}

        async def ask(client: Client, url: str) -> tuple[list[int], list[float]]:
            answer = await client.call(url, GENERATE, body)
            with reading(url):
                choice = answer["choices"][0]
                return choice["token_ids"], [at["logprob"] for at in choice["logprobs"]["content"]]

        answers = run(self.settings.servers.ask_each(ask))
        for url, answer in zip(self.settings.server_base_url, answers, strict=True):
            self._same_model.check(f"vLLM at {url}", model, prompt, *answer)

    # ------------------------------------------------------------------ requests and answers

    def _body(self, request: Request, interval: int = 0) -> dict[str, Any]:
        """A request as it is sent: for a stream whose tokens come `interval` at a time, or for an answer in one piece."""
        parameters = request_parameters(self.parameters, request, self.sampling.max_completion_length, max(1, interval))
        body = {"token_ids": list(request.prompt_ids), "sampling_params": parameters, "stream": interval > 0}
        if self.weights is not None:
            body |= {"model": self.weights.version} if self.weights.is_adapter else {"cache_salt": self.weights.version}
        return body

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
        highest = max((*token_ids, *(id for ids in (candidates.ids if candidates else ()) for id in ids)), default=0)
        if highest >= self._vocabulary:
            raise ServingError(
                f"vLLM at {url} has another vocabulary: token {highest}, and the student knows {self._vocabulary}. Start it with "
                "the student's folder"
            )
        if reason in ("abort", "error"):
            raise TransientError(f"gave an answer up ({reason})")
        wanted = self.weights
        if reason is not None and wanted is not None and not wanted.is_adapter:
            found = {span["version"] for span in choice.get("weight_versions") or ()}
            if found != {wanted.version}:
                raise TransientError(
                    f"answered with the weights {', '.join(sorted(found))}, and {wanted.version} were sent"
                )
        end = {"stop": "eos", "length": "length"}.get(reason)
        return NewTokens(row, start, token_ids, candidates, end)

    def _candidates(self, content: Sequence[Any], token_ids: Sequence[int]) -> Candidates:
        alternatives = [
            {int(entry["token_id"]): float(entry["logprob"]) for entry in (*at["top_logprobs"], at)} for at in content
        ]
        if len(alternatives) != len(token_ids):
            raise ValueError(f"{len(alternatives)} log-probabilities for {len(token_ids)} tokens")
        return candidates_of(alternatives, token_ids, self.candidates)

    def generate(self, requests: Iterable[Request], watch: RaggedWatch | None = None) -> Iterator[Completion]:
        """Sample a response to each request, and yield each when it is final.

        Raises:
            ServingError: servers fail, or do not come back.
            InputError: an empty prompt, or a sequence beyond what the servers take.
        """
        requests = list(requests)
        if not requests:
            return
        check_requests(requests, self.sampling.eos_token_ids, watch)
        for request in requests:
            tokens = len(request.prompt_ids) + cap_of(request, self.sampling.max_completion_length)
            if tokens > self.max_model_len:
                raise InputError(
                    f"a prompt of {len(request.prompt_ids)} tokens and its response may come to {tokens}, and the servers take "
                    f"{self.max_model_len}: start them with a larger --max-model-len, or lower max_completion_length"
                )
        interval = PLAIN_INTERVAL if watch is None else watch.check_every
        streams = ServerStreams(self, [self._body(request, interval) for request in requests])
        try:
            yield from completions(streams, requests, watch)
            streams.finish()
        finally:
            streams.close()

    def close(self) -> None:
        """Remove the saved weights."""
        self._folders.close()


def _from_main_process(
    weights: SavedWeights | None, fault: Exception | None
) -> tuple[SavedWeights | None, Exception | None]:
    """What the first process saved and met."""
    if fault is not None and not isinstance(fault, PruneOPDError):  # it may hold what cannot be sent
        fault = ServingError(
            f"the first process could not send new weights: {type(fault).__name__}: {first_line(fault)}"
        )
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return weights, fault
    values = [weights, fault]
    torch.distributed.broadcast_object_list(values)
    return values[0], values[1]  # type: ignore[return-value]
