"""A decoding loop that drops finished rows: for `model.generate(..., custom_generate=pruned_generate, drift_monitor=monitor)`.

`generate` prepares everything (inputs, cache, processors, criteria) and hands over. It never shrinks the batch itself, so a
row that has ended costs as much as one that runs; here it leaves the batch and the KV cache. Families that cannot drop rows
go through Transformers' own loop with the pair, said once in the log.
"""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from prune_opd_hf.errors import InputError, MonitorStateError, NonFiniteLogitsError, UnsupportedGenerationError
from prune_opd_hf.generation.decoding_step import DecodingStep
from prune_opd_hf.generation.generate_call import eos_token_ids, generate_call, pad_token_id, refuse_other_modes
from prune_opd_hf.generation.hooks import DriftStoppingCriteria, StudentTopKLogitsProcessor
from prune_opd_hf.generation.inverse_transform import inverse_transform, sum_dtype
from prune_opd_hf.generation.logits_processors import is_row_local, with_standing_mask
from prune_opd_hf.generation.monitor import DriftMonitor
from prune_opd_hf.models.compatibility import refuse_checkpointing
from prune_opd_hf.models.kv_cache import RowMoves, keep_rows_inplace, kept_order, use_growing_layers_inplace
from prune_opd_hf.models.lm_head import text_config

logger = logging.getLogger(__name__)

KNOWN_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}

UNIFORM_STEPS = 64
"""Random numbers are drawn for so many steps of all sequences at once."""

_said: set[str] = set()


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
    """Greedy decoding or sampling that drops rows as they finish: by EOS, by drift, by any stopping criterion.

    Called by `model.generate(custom_generate=pruned_generate, ...)`, never directly. Every logits processor and stopping
    criterion that `generate` prepared is respected. Greedy tokens equal plain `generate`'s. Sampled ones are drawn with one
    random number for each sequence and step: what a sequence samples under a seed depends neither on `check_every` nor on who
    leaves the batch. They are not those of plain `generate`, which makes a random number for every token of the vocabulary.

    Args:
        drift_monitor: watches and stops rows by drift; None only drops rows that finish by themselves. Its processor and
            criterion need not be passed as well; where one of them is passed instead, its monitor is taken.

    Returns:
        What `generate` returns: token ids, each row padded after its end, a drifted row cut at its exhausted token; with
        `return_dict_in_generate` an output with `.sequences` (rows that left have no cache, so none is returned).

    Raises:
        UnsupportedGenerationError: beam search, assisted or contrastive decoding, an encoder-decoder model, `inputs_embeds`,
            a streamer, outputs for every row at every step (`output_scores` and its kin), or a model in training mode with
            gradient checkpointing.
        MonitorStateError: the monitor has served a call before, or processors and criteria belong to several monitors.
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
    _refuse_unsupported(model, generation_config, model_kwargs)
    drift_monitor = _one_monitor(drift_monitor, [*logits_processor, *stopping_criteria])
    obstacle = _obstacle(model, model_kwargs)
    if obstacle is not None:
        return _without_dropping(
            obstacle,
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            drift_monitor,
            model_kwargs,
        )
    loop = _Loop(model, input_ids, logits_processor, stopping_criteria, generation_config, drift_monitor, model_kwargs)
    sequences = loop.run()
    return GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences


def steps_between_drops(device: torch.device) -> int:
    """How often the host looks for finished rows; on an accelerator each look waits for the device."""
    return 1 if device.type == "cpu" else 8


class _Loop:
    """One generation. Physical rows 0..n-1 are the live ones; `rows` says which sequence each of them is."""

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        monitor: DriftMonitor | None,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.model, self.monitor = model, monitor
        self.do_sample = generation_config.do_sample
        self.processors = [
            with_standing_mask(item) for item in logits_processor if not isinstance(item, StudentTopKLogitsProcessor)
        ]
        self.criteria = [
            item
            for item in stopping_criteria
            if not isinstance(item, (DriftStoppingCriteria, MaxLengthCriteria, EosTokenCriteria))
        ]
        self.eos = eos_token_ids(stopping_criteria).to(input_ids.device)
        limits = [item.max_length for item in stopping_criteria if isinstance(item, MaxLengthCriteria)]
        self.max_length = min(limits)
        self.pad = _pad_token_id(generation_config, monitor)

        batch, self.prompt = input_ids.shape
        self.length = self.prompt
        self.rows = torch.arange(batch, device=input_ids.device)
        self.sequences = input_ids.new_full((batch, self.max_length), self.pad)
        self.sequences[:, : self.prompt] = input_ids
        self.live = self.sequences.clone()
        self.shown = self.prompt  # columns of `sequences` that are up to date in every row
        self.done = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
        self.undrawable = torch.zeros_like(self.done)
        self.needed = torch.tensor(self.prompt, device=input_ids.device)  # columns that some row generated
        self.drop_every = steps_between_drops(input_ids.device)

        mask = model_kwargs.get("attention_mask")
        prompt_mask = torch.ones_like(input_ids) if mask is None else mask
        if monitor is not None:
            monitor.open(
                input_ids,
                prompt_mask,
                ends_are_told=True,
                eos_token_ids=eos_token_ids(stopping_criteria),
                pad_token_id=self.pad,
            )
        given = model_kwargs.get("position_ids")
        first = prompt_mask.sum(dim=-1, keepdim=True) if given is None else given[:, -1:] + 1
        self.positions = first.expand(batch, 1).clone()
        self.cache = model_kwargs["past_key_values"]
        use_growing_layers_inplace(self.cache)
        padded = mask is not None and not bool((mask == 1).all())
        self.student = DecodingStep(model, self.cache, mask if padded else None, max_length=self.max_length)
        self.prompt_inputs = {"input_ids": input_ids, "model_kwargs": model_kwargs}

    def run(self) -> Tensor:
        """Decode until every row has ended, and return the sequences without columns that nobody needs."""
        with self._naming_the_context():
            logits = self._read_prompt()
            while True:
                tokens = self._choose(logits)
                checked = self._append(tokens)
                at_limit = self.length == self.max_length
                if checked or at_limit or (self.length - self.prompt) % self.drop_every == 0:
                    self._drop_done_rows()
                if at_limit or len(self.rows) == 0:
                    break
                logits = self._step()
        self._put_back(torch.arange(len(self.rows), device=self.rows.device))
        return self._cut()

    def _read_prompt(self) -> Tensor:
        kwargs = dict(self.prompt_inputs["model_kwargs"])
        inputs = self.model.prepare_inputs_for_generation(
            self.prompt_inputs["input_ids"], is_first_iteration=True, **kwargs
        )
        return self.student.read(inputs, self.live.device)

    def _step(self) -> Tensor:
        logits = self.student.next(self.tokens.unsqueeze(-1), self.positions, self.length, self.live.device)
        self.positions += 1
        return logits

    @contextmanager
    def _naming_the_context(self) -> Iterator[None]:
        try:
            yield
        except IndexError as error:  # an embedding's: the ids have been through the teacher or `generate`
            context = getattr(text_config(self.model), "max_position_embeddings", None)
            if context is None or self.length <= context:
                raise
            raise InputError(
                f"the student's context holds {context} tokens, and a sequence of {self.length} would have to be read: "
                "lower max_new_tokens or shorten the prompts"
            ) from error

    def _choose(self, logits: Tensor) -> Int[Tensor, " rows"]:
        n = len(self.rows)
        if self.monitor is not None:
            self.monitor.watch(logits, self._fewer_rows())
        scores = logits
        if self.processors:
            scores = self._process(logits)
        tokens = self._draw(torch.softmax(scores, dim=-1)) if self.do_sample else scores.max(dim=-1).indices
        return tokens if self.drop_every == 1 else torch.where(self.done[:n], self.pad, tokens)

    def _fewer_rows(self) -> Tensor | None:
        """Which sequences are left; None while all are, which is cheaper to write to."""
        return None if len(self.rows) == len(self.sequences) else self.rows

    def _draw(self, probabilities: Tensor) -> Int[Tensor, " rows"]:
        """One token a row, by the random number that its sequence gets at this step, whoever else is still in the batch."""
        step = (self.length - self.prompt) % UNIFORM_STEPS
        if step == 0:
            shape, device = (UNIFORM_STEPS, len(self.sequences)), probabilities.device
            self.uniforms = torch.rand(shape, dtype=sum_dtype(device), device=device)[:, self.rows]
        tokens, vocabulary = inverse_transform(probabilities, self.uniforms[step]), probabilities.shape[-1]
        if self.drop_every == 1:
            if int(tokens.max()) == vocabulary:
                self._refuse_undrawable(tokens == vocabulary)
            return tokens
        self.undrawable[: len(tokens)] |= (tokens == vocabulary) & ~self.done[: len(tokens)]
        return tokens.clamp(max=vocabulary - 1)

    def _refuse_undrawable(self, rows: Bool[Tensor, " rows"]) -> None:
        if not bool(rows.any()):
            return
        if self.monitor is not None:
            self.monitor.refuse_rubbish()
        row, token = int(self.rows[rows.nonzero()[0, 0]]), self.length - self.prompt
        at = f"at response token {token}" if self.drop_every == 1 else f"before response token {token}"
        raise NonFiniteLogitsError(
            f"the student's logits, as its logits processors leave them, are NaN or infinite for row {row} {at}, so nothing "
            "can be sampled: check its weights and the processors",
            row=row,
            token=token,
        )

    def _process(self, scores: Tensor) -> Tensor:
        n = len(self.rows)
        ids = self.live[:n, : self.length]
        for processor in self.processors:
            if is_row_local(processor):
                scores = processor(ids, scores)
            else:
                whole = scores.new_zeros(len(self.sequences), scores.shape[-1])
                whole[self.rows] = scores
                scores = processor(self._whole_batch(), whole)[self.rows]
        return scores

    def _whole_batch(self) -> Tensor:
        """Every sequence as `generate` would show it: finished rows padded."""
        n, fresh = len(self.rows), slice(self.shown, self.length)
        self.sequences[self.rows, fresh] = self.live[:n, fresh]
        self.shown = self.length
        return self.sequences[:, : self.length]

    def _append(self, tokens: Tensor) -> bool:
        """Write the tokens down and note whose end they are. Returns whether drift was judged."""
        n = len(self.rows)
        self.tokens = tokens
        self.live[:n, self.length] = tokens
        if self.drop_every > 1:
            self.needed += (~self.done[:n]).any()
        self.length += 1
        checked = self.monitor.take(tokens, self._fewer_rows()) if self.monitor is not None else False
        ends = torch.isin(tokens, self.eos)
        for criterion in self.criteria:
            ends |= criterion(self._whole_batch(), None).to(ends.device)[self.rows]
        if self.monitor is not None:
            newly = ends & ~self.done[:n] if self.criteria else None
            if newly is not None and bool(newly.any()):
                self.monitor.end_rows(self.rows[newly])
            if checked:
                ends |= self.monitor.stopped[self.rows]
        self.done[:n] |= ends
        return checked

    def _drop_done_rows(self) -> None:
        n = len(self.rows)
        if self.drop_every > 1:
            self._refuse_undrawable(self.undrawable[:n])
        leaving = self.done[:n].tolist()
        if not any(leaving):
            return
        self._put_back(self.done[:n].nonzero().squeeze(-1))
        order = torch.tensor(kept_order(leaving), dtype=torch.long, device=self.rows.device)
        moves = RowMoves.to(order)
        for buffer in (self.live, self.positions, self.student.mask, self.done):
            if buffer is not None:
                moves.apply_inplace(buffer)
        self.positions, self.tokens = self.positions[: len(order)], self.tokens[order]
        self.rows = self.rows[order]
        if self.do_sample:
            self.uniforms = self.uniforms[:, order]
        if len(order):
            with self.student.context():
                keep_rows_inplace(self.cache, order, moves)

    def _put_back(self, places: Tensor) -> None:
        self.sequences[self.rows[places], : self.length] = self.live[places, : self.length]

    def _cut(self) -> Tensor:
        columns = torch.arange(self.length - self.prompt, device=self.rows.device)
        if self.monitor is None:  # rows that had ended may have stayed until the next look
            return self.sequences[:, : self.length if self.drop_every == 1 else int(self.needed)]
        sequences = self.sequences[:, : self.length]
        self.monitor.settle()
        beyond = columns >= self.monitor.lengths.unsqueeze(-1)
        sequences[:, self.prompt :].masked_fill_(beyond, self.pad)
        return sequences[:, : self.prompt + int(self.monitor.lengths.max())]


def _pad_token_id(generation_config: GenerationConfig, monitor: DriftMonitor | None) -> int:
    """What finished rows are padded with; 0 where neither the generation config nor the monitor knows a padding token."""
    pad = pad_token_id(generation_config)
    if pad is None and monitor is not None:
        pad = monitor.pad_token_id
    return 0 if pad is None else pad


def _one_monitor(given: DriftMonitor | None, items: list[Any]) -> DriftMonitor | None:
    """The monitor of this generation: the one given, else that of the pair's halves among processors and criteria."""
    monitors = [] if given is None else [given]
    monitors += [
        item.monitor for item in items if isinstance(item, (StudentTopKLogitsProcessor, DriftStoppingCriteria))
    ]
    if any(monitor is not monitors[0] for monitor in monitors):
        raise MonitorStateError(
            "one generate call has one drift monitor, and processors and criteria of several were given"
        )
    return monitors[0] if monitors else None


def _refuse_unsupported(model: Any, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    refuse_other_modes(model, generation_config)
    refuse_checkpointing(model, "student")
    if model_kwargs.get("inputs_embeds") is not None:
        raise UnsupportedGenerationError(
            "pruned_generate needs input_ids: the teacher cannot read the student's inputs_embeds"
        )
    asked = [
        name
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        if generation_config.return_dict_in_generate and getattr(generation_config, name, False)
    ]
    if asked:
        raise UnsupportedGenerationError(
            f"{', '.join(asked)}: rows leave the batch as they finish, so there are no outputs for every row at every step. "
            "Use plain generate with the monitor's processor and criterion, or the log-probabilities in its Rollouts"
        )
    if generate_call().get("streamer") is not None:
        raise UnsupportedGenerationError(
            "generate does not hand a streamer to a custom loop, so it would wait for ever: use plain generate with the "
            "monitor's processor and criterion, or the monitor's on_check"
        )


def _obstacle(model: Any, model_kwargs: dict[str, Any]) -> str | None:
    """Why rows cannot be dropped, in words; None where they can."""
    cache = model_kwargs.get("past_key_values")
    if not model_kwargs.get("use_cache", True):
        return "use_cache is off"
    if not isinstance(cache, DynamicCache):
        return f"its cache is {type(cache).__name__}, not a DynamicCache"
    if any(getattr(layer, "is_initialized", False) for layer in cache.layers):
        return "it continues from a cache that was passed in"
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.ndim != 2:
        return f"its position_ids have {positions.ndim} axes"
    unknown = sorted(name for name, value in model_kwargs.items() if value is not None and name not in KNOWN_INPUTS)
    if unknown:
        return f"its forward pass takes {', '.join(unknown)}"
    method = inspect.unwrap(type(model).prepare_inputs_for_generation)
    if method is not inspect.unwrap(GenerationMixin.prepare_inputs_for_generation):
        return f"{type(model).__name__} prepares its inputs in its own way"
    return None


def _without_dropping(
    obstacle: str,
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    monitor: DriftMonitor | None,
    model_kwargs: dict[str, Any],
) -> Any:
    """Transformers' own loop with the pair: the same sequences, and no row leaves the batch."""
    message = (
        f"pruned_generate cannot drop rows of {type(model).__name__}: {obstacle}. Finished rows stay in the batch."
    )
    if message not in _said:
        _said.add(message)
        logger.warning(message)
    if monitor is not None:
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        pad = _pad_token_id(generation_config, monitor)
        monitor.open(input_ids, mask, eos_token_ids=eos_token_ids(stopping_criteria), pad_token_id=pad)
        others = [item for item in logits_processor if not isinstance(item, StudentTopKLogitsProcessor)]
        logits_processor = LogitsProcessorList([monitor.logits_processor, *others])
        stopping_criteria = StoppingCriteriaList([*stopping_criteria, monitor.stopping_criterion])
    outputs = GenerationMixin._sample(
        model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
    )
    if monitor is None:
        return outputs
    sequences = getattr(outputs, "sequences", outputs)
    monitor.settle()
    prompt = input_ids.shape[1]
    beyond = torch.arange(sequences.shape[1] - prompt, device=sequences.device) >= monitor.lengths.unsqueeze(-1)
    sequences[:, prompt:].masked_fill_(beyond, pad)
    return outputs
