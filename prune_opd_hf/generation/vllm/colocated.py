"""vLLM in this process: one engine, stepped by the caller, which sleeps while the trainer updates.

Tried on CPUs. Sleep frees a GPU's memory and needs one. Several processes need servers.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from prune_opd_hf.errors import ConfigError, UnsupportedGenerationError
from prune_opd_hf.generation.engine import NewTokens, Request, Sampling, cap_of
from prune_opd_hf.generation.ragged_watch import RaggedDriftWatch
from prune_opd_hf.generation.streams import TokenSource
from prune_opd_hf.generation.vllm.base import VLLMEngine
from prune_opd_hf.generation.vllm.protocol import STOP_REASON_OF, VLLMSettings, candidates_of
from prune_opd_hf.generation.vllm.same_model import PROBE_TOKENS, PROBING, SameModel, probing_prompt
from prune_opd_hf.generation.vllm.weights import WeightFolders, state_of
from prune_opd_hf.models.loading import is_adapted

SLEEP_LEVEL = 2
"""Weights are thrown away as well: new ones come before the next rollouts."""


class _Resident:
    """The one engine of this process, and the weights that it samples with."""

    def __init__(self, model: Any, *, slots: int, candidates: int, settings: VLLMSettings) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(
                "vllm_mode='colocate' needs vllm in this environment: pip install vllm, or vllm_mode='server'"
            ) from error
        self.vllm: Any = vllm
        self._folders = WeightFolders(None, "prune-opd")
        self.weights, self._state, self._same_model = self._folders.save(model, 0), state_of(model, 0), SameModel()
        on_gpu = torch.cuda.is_available()
        self._sleeps, self._asleep = settings.enable_sleep_mode and on_gpu, False
        self.llm: Any = vllm.LLM(
            model=self.weights.folder,
            skip_tokenizer_init=True,
            dtype=str(model.dtype).removeprefix("torch."),
            max_num_seqs=slots,
            max_logprobs=candidates + 1,
            seed=0,
            enforce_eager=not on_gpu,
            enable_sleep_mode=self._sleeps,
            **({"gpu_memory_utilization": settings.gpu_memory_utilization} if on_gpu else {}),
        )
        self.max_model_len = int(self.llm.llm_engine.model_config.max_model_len)
        self._check(model)

    def update_weights(self, model: nn.Module, step: int) -> None:
        state = state_of(model, step)
        if state == self._state:
            return
        self.weights = self._folders.save(model, step)
        self._load()
        self._folders.keep_only(self.weights)
        self._check(model)
        self._state = state

    def _check(self, model: nn.Module) -> None:
        prompt = probing_prompt(int(model.get_input_embeddings().weight.shape[0]))
        parameters = self.vllm.SamplingParams(**PROBING, max_tokens=PROBE_TOKENS, ignore_eos=True, detokenize=False)
        [answer] = self.llm.generate([{"prompt_token_ids": list(prompt)}], parameters, use_tqdm=False)[0].outputs
        log_probs = [at[token].logprob for at, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        self._same_model.check("vLLM in this process", model, prompt, list(answer.token_ids), log_probs)

    def wake_up(self) -> None:
        if self._asleep:
            self._load()

    def sleep(self) -> None:
        if self._sleeps:
            self.llm.sleep(level=SLEEP_LEVEL)
            self._asleep = True

    def _load(self) -> None:
        """The newest weights, into an engine that may be asleep."""
        if self._asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": self.weights.folder})
        if self._asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self._asleep = False
        self.llm.reset_prefix_cache()

    def close(self) -> None:
        self._folders.close()


class VLLMColocatedEngine(VLLMEngine):
    """The engine over `vllm.LLM`."""

    name = "vllm colocate"
    where = "vLLM in this process"

    @property
    def weights_version(self) -> str:
        return self.resident.weights.version

    def __init__(
        self, model: nn.Module, sampling: Sampling, *, slots: int, candidates: int, settings: VLLMSettings
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("vllm_mode='colocate' runs in one process: use vllm_mode='server' with several")
        if is_adapted(model):
            raise ConfigError(
                "vllm_mode='colocate' takes no adapters: use vllm_mode='server' (with --enable-lora), or train all weights"
            )
        super().__init__(sampling, slots=slots, candidates=candidates)
        self.resident = _Resident(model, slots=slots, candidates=candidates, settings=settings)
        self.max_model_len = self.resident.max_model_len
        self.check_length()

    def update_weights(self, model: nn.Module, step: int) -> None:
        self.resident.update_weights(model, step)

    @contextmanager
    def _source(self, requests: Sequence[Request], watch: RaggedDriftWatch | None) -> Iterator[TokenSource]:
        self.resident.wake_up()
        batch = _Batch(self, requests)
        try:
            yield batch
        finally:
            batch.close()
            self.resident.sleep()

    def close(self) -> None:
        self.resident.close()


class _Batch:
    """The requests of one `generate`, as a `TokenSource`."""

    def __init__(self, owner: VLLMColocatedEngine, requests: Sequence[Request]) -> None:
        self.owner, self.engine = owner, owner.resident.llm.llm_engine
        self.received = [0] * len(requests)
        kind = owner.resident.vllm.sampling_params.RequestOutputKind.DELTA
        for row, request in enumerate(requests):
            cap = cap_of(request, owner.sampling.max_completion_length)
            own = {**owner.parameters, "max_tokens": cap, "seed": request.seed}
            own["logit_bias"] = {int(token): bias for token, bias in own.get("logit_bias", {}).items()} or None
            parameters = owner.resident.vllm.SamplingParams(**own, output_kind=kind)
            self.engine.add_request(str(row), {"prompt_token_ids": list(request.prompt_ids)}, parameters)

    def next(self) -> list[NewTokens]:
        found: list[NewTokens] = []
        while not found:
            if not self.engine.has_unfinished_requests():
                raise UnsupportedGenerationError("vLLM has ended without an answer to every request; its log says why")
            found = [self._new_tokens(output) for output in self.engine.step()]
        return found

    def cancel(self, rows: Sequence[int]) -> None:
        if rows:
            self.engine.abort_request([str(row) for row in rows])

    def undisturbed(self) -> nullcontext:
        return nullcontext()

    def close(self) -> None:
        self.cancel(range(len(self.received)))

    def _new_tokens(self, output: Any) -> NewTokens:
        [answer] = output.outputs
        row, token_ids = int(output.request_id), list(answer.token_ids)
        candidates = None
        if self.owner.candidates:
            alternatives = [{token: entry.logprob for token, entry in at.items()} for at in answer.logprobs]
            candidates = candidates_of(alternatives, token_ids, self.owner.candidates)
        start = self.received[row]
        self.received[row] += len(token_ids)
        return NewTokens(row, start, token_ids, candidates, STOP_REASON_OF.get(answer.finish_reason))
