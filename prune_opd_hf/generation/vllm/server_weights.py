"""The weights that vLLM's servers hold. Every engine over the same servers shares them, so that they are sent once."""

import contextlib
import secrets
from typing import Any

import torch
from torch import nn

from prune_opd_hf.errors import PruneOPDError, ServingError
from prune_opd_hf.generation.vllm.same_model import PROBE_TOKENS, PROBING, SameModel, probing_prompt
from prune_opd_hf.generation.vllm.weights import (
    SavedWeights,
    State,
    WeightFolders,
    is_main_process,
    state_of,
)
from prune_opd_hf.models.lm_head import is_sharded
from prune_opd_hf.records.files import first_line
from prune_opd_hf.serving.client import GENERATE, Client, TransientError, reading, run
from prune_opd_hf.serving.servers import Servers


class ServerWeights:
    """What was sent last, and to which servers.

    Args:
        servers: where they are.
        weights_dir: an existing folder that the servers read from; a temporary one by default.

    Attributes:
        current: the newest weights; None before the first ones, where servers have those that they were started with.
        gone: URLs of servers that did not answer until the time-out, and have not come back.
    """

    def __init__(self, servers: Servers, weights_dir: str | None) -> None:
        self.servers = servers
        self.current: SavedWeights | None = None
        self.gone: set[str] = set()
        self._state: State | None = None
        self._folders = WeightFolders(weights_dir, f"prune-opd-{secrets.token_hex(4)}")
        self._same_model = SameModel()

    def update(self, model: nn.Module, step: int) -> None:
        """Send these weights to every server, unless they are those sent last. All processes call it together; the first one
        saves and sends.
        """
        state = state_of(model, step)
        if _from_main_process(state == self._state):
            return
        weights: SavedWeights | None = None
        own_fault: Exception | None = None
        try:
            weights = self._folders.save(model, step)
            if is_main_process():
                self._send_and_check(model, weights)
        except Exception as error:  # whatever it is: raised at once, it would leave the other processes waiting
            own_fault = error
        weights, fault = _from_main_process((weights, _sendable(own_fault)))
        if own_fault is not None or fault is not None:
            raise own_fault or fault
        assert weights is not None
        self._folders.keep_only(weights)
        self.current, self._state = weights, state

    def _send_and_check(self, model: nn.Module, weights: SavedWeights) -> None:
        run(self.servers.ask_each(lambda client, url: self.send(client, url, weights), self.gone))
        self.current = weights
        if is_sharded(model):
            return
        prompt = probing_prompt(int(model.get_input_embeddings().weight.shape[0]))
        parameters = {**PROBING, "max_tokens": PROBE_TOKENS, "ignore_eos": True, "detokenize": False}
        body = {"token_ids": list(prompt), "sampling_params": parameters, "stream": False, **self.in_requests}

        async def ask(client: Client, url: str) -> tuple[list[int], list[float]]:
            answer = await client.call(url, GENERATE, body)
            with reading(url):
                choice = answer["choices"][0]
                return choice["token_ids"], [at["logprob"] for at in choice["logprobs"]["content"]]

        for url, answer in run(self.servers.ask_each(ask, self.gone)).items():
            self._same_model.check(f"vLLM at {url}", model, prompt, *answer)

    @property
    def in_requests(self) -> dict[str, Any]:
        """How a request names them: an adapter, or a prefix cache that no other weights have filled."""
        if self.current is None:
            return {}
        return {"model" if self.current.is_adapter else "cache_salt": self.current.version}

    async def send(self, client: Client, url: str, weights: SavedWeights) -> None:
        """Have a server read these weights."""
        if weights.is_adapter:
            body = {"lora_name": weights.version, "lora_path": weights.folder}
            if self.current is not None and self.current.version != weights.version:
                with contextlib.suppress(ServingError):  # a server that was started anew does not know it
                    await client.call(url, "/v1/unload_lora_adapter", {"lora_name": self.current.version})
            if not await self._holds(client, url, weights):  # what loaded it may have lost its answer
                await client.call(url, "/v1/load_lora_adapter", body)
            return
        reload = {"method": "reload_weights", "kwargs": {"weights_path": weights.folder}}
        try:
            # What was cancelled may still run, and hold blocks of the prefix cache.
            await client.call(url, "/pause?mode=abort", {})
            await client.call(url, "/collective_rpc", reload)
            answer = await client.call(url, "/reset_prefix_cache", {})
            with reading(url):
                if not answer["success"]:
                    raise TransientError("holds on to its prefix cache, which old weights made")
            await client.call(url, "/update_weight_version", {"new_version": weights.version})
        finally:
            await client.call(url, "/resume", {})

    async def are_held_by(self, client: Client, url: str) -> bool:
        """Whether a server samples with them; one that was started anew has forgotten them."""
        return self.current is None or await self._holds(client, url, self.current)

    async def _holds(self, client: Client, url: str, weights: SavedWeights) -> bool:
        answer = await client.call(url, "/v1/models" if weights.is_adapter else "/weight_info")
        with reading(url):
            if weights.is_adapter:
                return any(known["id"] == weights.version for known in answer["data"])
            return answer["weight_version"] == weights.version

    def close(self) -> None:
        self._folders.close()


def _sendable(fault: Exception | None) -> PruneOPDError | None:
    """The same for other processes: an error of elsewhere may hold what cannot be sent."""
    if fault is None or isinstance(fault, PruneOPDError):
        return fault
    return ServingError(f"the first process could not send new weights: {type(fault).__name__}: {first_line(fault)}")


def _from_main_process(value: Any) -> Any:
    """What the first process found."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]
