"""Continuous batching with row compaction: one decoding loop for `generate`, training and evaluation.

`pruned_generate` is the loop behind `model.generate(custom_generate=...)`, with an empty queue; `LoopEngine` answers any number
of requests in a number of slots. Both let `generate` prepare processors, criteria and the cache. What a row samples depends on
its prompt and seed alone. Models whose cache cannot be compacted are sampled batch by batch by Transformers' own loop (logged
once).
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)

from prune_opd_hf.errors import (
    ConfigError,
    MonitorStateError,
    PruneOPDError,
    UnsupportedGenerationError,
    warn_once,
)
from prune_opd_hf.generation.compiled_step import CompiledDecodingStep, StepCompiler
from prune_opd_hf.generation.decoding_loop import DecodingLoop, PreparedBatch
from prune_opd_hf.generation.engine import (
    Completion,
    Request,
    Sampling,
    cap_of,
    check_requests,
    final_completion,
    request_seed,
)
from prune_opd_hf.generation.generate_call import GenerationPlan, compaction_obstacle, refuse_unsupported
from prune_opd_hf.generation.logits_processors import is_prompt_bound
from prune_opd_hf.generation.monitor import DriftMonitor, DriftStoppingCriteria, StudentTopKLogitsProcessor
from prune_opd_hf.generation.prompts import left_padded
from prune_opd_hf.generation.sampling_copy import SamplingCopy
from prune_opd_hf.generation.uncompacted import sample_batch
from prune_opd_hf.generation.watch import DriftWatch
from prune_opd_hf.models.lm_head import evaluating, input_device
from prune_opd_hf.records.files import first_line

logger = logging.getLogger(__name__)


@torch.no_grad()
def pruned_generate(
    model: Any,
    input_ids: Int[Tensor, "batch prompt"],
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drift_monitor: DriftMonitor | None = None,
    **model_kwargs: Any,
) -> Int[Tensor, "batch total"] | GenerateDecoderOnlyOutput:
    """Greedy decoding or sampling that compacts the batch as rows end: by EOS, by drift, by any stopping criterion.

    Called by `model.generate(custom_generate=pruned_generate, ...)`, never directly. Every logits processor and stopping
    criterion that `generate` prepared is respected (of `stop_strings` it loses the tokenizer: pass
    `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`). Greedy tokens equal plain `generate`'s. Sampled ones are drawn
    with one random number for each sequence and step: what a sequence samples under a seed depends neither on `check_every` nor
    on which rows have ended. They are not those of plain `generate`, which makes a random number for every token of the
    vocabulary.

    Args:
        drift_monitor: watches and stops rows by drift; None only drops rows that finish by themselves (logged once). Its processor
            and criterion need not be passed as well; where one of them is passed instead, its monitor is taken.

    Returns:
        What `generate` returns: token ids, each row padded after its end, a drifted row ending at its exhausted token; with
        `return_dict_in_generate` an output with `.sequences` (rows that have ended have no cache, so none is returned).

    Raises:
        UnsupportedGenerationError: beam search, assisted or contrastive decoding, an encoder-decoder model, `inputs_embeds`,
            a streamer, outputs for every row at every step (`output_scores` and its kin), or a model in training mode with
            gradient checkpointing.
        MonitorStateError: processors and criteria belong to several monitors.
        InputError: sequences beyond the positions that the model has embeddings for.
        NonFiniteLogitsError: NaN or infinite logits of either model.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, eos_token_id=1, pad_token_id=0)
        >>> student, teacher = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config)
        >>> monitor = DriftMonitor(teacher, check_every=4)
        >>> sequences = student.generate(torch.tensor([[5, 6], [7, 8]]), max_new_tokens=8, do_sample=False,
        ...                              custom_generate=pruned_generate, drift_monitor=monitor)
        >>> len(monitor.finish(sequences))
        2
    """
    refuse_unsupported(model, generation_config, model_kwargs)
    monitor = _one_monitor(drift_monitor, [*logits_processor, *stopping_criteria])
    processors = LogitsProcessorList(
        [item for item in logits_processor if not isinstance(item, StudentTopKLogitsProcessor)]
    )
    criteria = StoppingCriteriaList([item for item in stopping_criteria if not isinstance(item, DriftStoppingCriteria)])
    pad = None if monitor is None else monitor.settings.pad_token_id
    plan = GenerationPlan.of(model, processors, criteria, generation_config, pad)
    mask = model_kwargs.get("attention_mask")
    watch = None
    if monitor is None:
        warn_once(
            logger,
            "pruned_generate was called without drift_monitor: no teacher watches, and no row is stopped by drift",
        )
    else:
        prompt_mask = torch.ones_like(input_ids) if mask is None else mask
        ends = plan.eos.tolist()
        watch = monitor.begin_with(input_ids, prompt_mask, eos_token_ids=ends, pad_token_id=plan.pad)
    obstacle = compaction_obstacle(model, model_kwargs, plan.max_length)
    limit = max(1, plan.max_length - input_ids.shape[1])  # a criterion ends a row behind a token
    if obstacle is not None:
        warn_once(logger, f"rows of {type(model).__name__} stay in the batch when they have ended: {obstacle}")
        responses = sample_batch(plan, input_ids, model_kwargs, watch, first=0, limits=[limit] * len(input_ids))
        ended = [final_completion(watch, row, tokens, reason) for row, (tokens, reason) in enumerate(responses)]
    else:
        loop = DecodingLoop(plan, watch, slots=len(input_ids), device=input_ids.device)
        seeds = torch.randint(2**63 - 1, (len(input_ids),), device="cpu").tolist() if plan.do_sample else []
        ended = sorted(loop.run(PreparedBatch(input_ids, model_kwargs, limit, seeds)))
    width = max(len(completion.token_ids) for completion in ended)
    sequences = input_ids.new_full((len(input_ids), input_ids.shape[1] + width), plan.pad)
    sequences[:, : input_ids.shape[1]] = input_ids
    for row, tokens, _ in ended:
        sequences[row, input_ids.shape[1] : input_ids.shape[1] + len(tokens)] = input_ids.new_tensor(tokens)
    return GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences


class LoopEngine:
    """A `RolloutEngine` that samples with a model of this process, `slots` rows at a time.

    Rows that end are replaced by the next requests. What a request samples depends on its prompt, its seed and the sampling
    alone: not on the number of slots, the order, its neighbours, nor on `check_every`, up to the rounding of the logits.

    Args:
        model: a decoder-only causal LM, PEFT-wrapped or not.
        sampling: how to sample.
        slots: rows decoded at a time.
        sampling_copy: samples with its copy of the model, in place of the model itself.
        compiler: compiles the decoding step; None runs it as it is.

    Raises:
        ConfigError: no slot, or settings that `generate` refuses.
        UnsupportedGenerationError: an encoder-decoder model, or settings that this loop cannot follow.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                                      num_attention_heads=2))
        >>> engine = LoopEngine(model, Sampling(max_completion_length=5, eos_token_ids=(1,), pad_token_id=0), slots=1)
        >>> done = list(engine.generate([Request((5, 6, 7), seed=1), Request((8,), seed=2)]))
        >>> [completion.request for completion in done], all(len(completion.token_ids) <= 5 for completion in done)
        ([0, 1], True)
    """

    ragged = False
    delivers_candidates = True

    def __init__(
        self,
        model: nn.Module,
        sampling: Sampling,
        *,
        slots: int = 32,
        sampling_copy: SamplingCopy | None = None,
        compiler: StepCompiler | None = None,
    ) -> None:
        if slots < 1:
            raise ConfigError(f"the loop needs at least 1 slot, got {slots}")
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedGenerationError(
                f"{type(model).__name__} is an encoder-decoder model; rollouts need decoder-only models"
            )
        self.model: Any = model
        self.sampling, self.slots, self.weights = sampling, slots, ""
        self.sampling_copy, self.compiler = sampling_copy, compiler
        if input_device(model).type != "meta":  # where a sharded student gets its weights later, the first call refuses
            with evaluating(model):
                plan, _ = self._prepare(1)
                if compiler is not None:
                    compiler.of(plan.model)  # of PEFT's model the one inside, as later

    def update_weights(self, model: nn.Module, step: int) -> None:
        """Sample with this model from now on."""
        self.model, self.weights = model if self.sampling_copy is None else self.sampling_copy.of(model), f"step {step}"

    def with_sampling(self, sampling: Sampling, *, slots: int) -> "LoopEngine":
        """Another engine over the same model."""
        return LoopEngine(self.model, sampling, slots=slots, sampling_copy=self.sampling_copy, compiler=self.compiler)

    def close(self) -> None:
        """Only a compiled step holds something: its KV cache."""
        if self.compiler is not None:
            self.compiler.close()

    @torch.no_grad()
    def compaction_obstacle(self, longest_prompt: int) -> str | None:
        """Why rows that end cannot be removed from a batch with prompts of up to so many tokens; None where they can."""
        with evaluating(self.model):
            plan, model_kwargs = self._prepare(longest_prompt)
            return compaction_obstacle(plan.model, model_kwargs, plan.max_length)

    @torch.no_grad()
    def generate(self, requests: Iterable[Request], watch: DriftWatch | None = None) -> Iterator[Completion]:
        """Sample a response to each request, and yield each when it is final.

        Args:
            requests: samples of one prompt had better stand side by side: its tokens are read once for them.
            watch: observes every token, and ends rows; its rows are the requests, in their order.

        Raises:
            ConfigError: the watch does not know all tokens that end a response.
            InputError: an empty prompt, a token without an embedding, or a sequence beyond the positions that the model has.
            NonFiniteLogitsError: NaN or infinite logits of either model.
        """
        requests = list(requests)
        if not requests:
            return
        with evaluating(self.model):
            plan, model_kwargs = self._prepare(max(1, *(len(request.prompt_ids) for request in requests)))
            check_requests(requests, plan.eos.tolist(), watch, model=self.model)
            if watch is not None:
                watch.sampled_by = ("loop", self.weights)
            obstacle = compaction_obstacle(plan.model, model_kwargs, plan.max_length)
            if obstacle is None:
                with self._step(plan) as student:
                    device = input_device(plan.model)
                    yield from DecodingLoop(plan, watch, slots=self.slots, device=device, student=student).run(requests)
            elif self.compiler is not None:
                raise UnsupportedGenerationError(
                    f"the decoding step cannot be compiled: {obstacle}; leave out compile_decoding"
                )
            else:
                warn_once(
                    logger,
                    f"rows of {type(plan.model).__name__} stay in the batch when they have ended, and their slots are not "
                    f"refilled: {obstacle}",
                )
                yield from self._batch_by_batch(requests, watch)

    def _step(self, plan: GenerationPlan) -> AbstractContextManager[CompiledDecodingStep | None]:
        """The compiled step, if there is one, for this generation."""
        if self.compiler is None:
            return nullcontext()
        return self.compiler.lent(plan.model, self.slots, plan.max_length)

    def _arguments(self) -> dict[str, Any]:
        """Of `generate`, which loses the tokenizer of stop strings before a custom loop."""
        arguments = self.sampling.generate_arguments()
        tokenizer = arguments.pop("tokenizer", None)
        if tokenizer is not None and arguments.get("stop_strings") is not None:
            ends = StopStringCriteria(tokenizer, arguments.pop("stop_strings"))
            arguments["stopping_criteria"] = StoppingCriteriaList([*(arguments.get("stopping_criteria") or []), ends])
        return arguments

    def _prepare(self, width: int) -> tuple[GenerationPlan, dict[str, Any]]:
        """Processors, criteria and cache as `generate` prepares them for prompts of this width."""

        def capture(model: Any, input_ids: Tensor, **prepared: Any) -> tuple[GenerationPlan, dict[str, Any]]:
            parts = [prepared.pop(name) for name in ("logits_processor", "stopping_criteria", "generation_config")]
            refuse_unsupported(model, parts[2], prepared)
            bound = [type(item).__name__ for item in parts[0] if is_prompt_bound(item)]
            if parts[2].min_length and parts[2].min_new_tokens is None:
                bound.append("min_length")  # it counts prompts and their padding
            if bound:
                raise UnsupportedGenerationError(
                    f"{bound[0]} is made for the prompts of one batch, and the loop engine answers many: leave out min_length (use "
                    "min_new_tokens), guidance_scale, prompt_ignore_length and the penalties that look at the prompt"
                )
            return GenerationPlan.of(model, *parts), prepared

        ids = torch.zeros(1, width, dtype=torch.long, device=input_device(self.model))
        try:
            arguments = self._arguments()
            return self.model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=capture, **arguments)
        except PruneOPDError:
            raise
        except (ValueError, TypeError) as error:
            raise ConfigError(f"generate refuses these settings of the sampling: {first_line(error)}") from error

    def _batch_by_batch(self, requests: Sequence[Request], watch: DriftWatch | None) -> Iterator[Completion]:
        for first in range(0, len(requests), self.slots):
            batch = requests[first : first + self.slots]
            device = input_device(self.model)
            ids, mask = left_padded([request.prompt_ids for request in batch], self.sampling.pad_token_id, device)
            if watch is not None:
                watch.add_rows(ids, mask)
            limits = [cap_of(request, self.sampling.max_completion_length) for request in batch]

            def sample(model: Any, input_ids: Tensor, **prepared: Any) -> list[tuple[list[int], str]]:
                parts = [prepared.pop(name) for name in ("logits_processor", "stopping_criteria", "generation_config")]
                plan = GenerationPlan.of(model, *parts)
                return sample_batch(plan, input_ids, prepared, watch, first=first, limits=limits)  # noqa: B023

            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(request_seed(batch[0].seed, *(request.seed for request in batch)))
                arguments = self._arguments()
                responses = self.model.generate(ids, attention_mask=mask, custom_generate=sample, **arguments)
            for row, (tokens, reason) in enumerate(responses, start=first):
                yield final_completion(watch, row, tokens, reason)


def _one_monitor(given: DriftMonitor | None, items: list[Any]) -> DriftMonitor | None:
    """The monitor of this generation: the one given, else that of the hooks among processors and criteria."""
    monitors = [] if given is None else [given]
    monitors += [
        item.monitor for item in items if isinstance(item, (StudentTopKLogitsProcessor, DriftStoppingCriteria))
    ]
    if any(monitor is not monitors[0] for monitor in monitors):
        raise MonitorStateError(
            "one generate call has one drift monitor, and processors and criteria of several were given"
        )
    return monitors[0] if monitors else None
