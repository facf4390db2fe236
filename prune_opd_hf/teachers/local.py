"""A teacher in this process: a frozen model that follows each sequence with its KV cache and scores new tokens in blocks.

One forward pass scores a whole block of tokens for all rows: what the pass over the finished sequences would have cost,
spread over the generation. This module knows causal language models and their caches; it knows nothing of drift, rewards or
`generate`. Nothing outside of it touches the teacher's model.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from time import perf_counter

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from prune_opd_hf.errors import ConfigError, InputError, MonitorStateError, NonFiniteLogitsError
from prune_opd_hf.models.compatibility import (
    check_left_padding,
    context_length,
    refuse_checkpointing,
    refuse_other_caches,
    rotary_switch,
    special_token_ids,
)
from prune_opd_hf.models.forward_pass import Layout, can_pack, hidden_states, logits
from prune_opd_hf.models.kv_cache import (
    RowMoves,
    can_join,
    join_caches,
    keep_rows_inplace,
    use_growing_layers_inplace,
)
from prune_opd_hf.models.lm_head import (
    BackboneAndHead,
    HeadParameters,
    evaluating,
    forward_context,
    input_device,
    text_config,
)
from prune_opd_hf.models.slot_cache import has_slots
from prune_opd_hf.models.vocabulary import id_tensor, without_ids
from prune_opd_hf.teachers.base import TeacherCapabilities, TeacherScores
from prune_opd_hf.teachers.ragged import RaggedRows

MAX_LOGIT_ELEMENTS = 2**26
"""Logits held at once by default: 256 MiB in float32."""

BLOCK_TOKENS = {"cpu": 2**9, "elsewhere": 2**15}
"""Tokens of one pass by kind of device: on a CPU passes twice as long took a tenth more time."""

LINEAR_LAYER_TYPES = ("linear_attention", "conv", "mamba", "mamba2", "recurrent", "moe_mamba", "hybrid")


class LocalTeacher:
    """A frozen causal LM with the KV cache of one batch of sequences.

    The model is put in evaluation mode and never receives a gradient; its parameters' own flags are left alone, so that
    one model may be student and teacher at once (self-distillation with another prompt).

    Args:
        model: a causal LM of Transformers: on any device, in any dtype, quantized or not.
        top_k: how many of its most likely tokens `score` returns for each position.
        max_logit_elements: never hold more than this many logits at once (where the LM head cannot be split off: than this
            many or one position of every row, whichever is more).
        vocab_size: number of real tokens, where the model's vocabulary has unused rows at its end. Such rows enter neither
            a top-k nor a normalisation. By default every row counts.
        role: how error messages call this model.

    Attributes:
        wall_seconds: time spent in `score` so far.
        batches: how many batches were started.

    Raises:
        ConfigError: `top_k` is above the vocabulary, or `max_logit_elements` too small for one position.
        UnsupportedGenerationError: not a decoder-only causal LM, or one that takes no KV cache.

    Example: the scores of two tokens after a prompt of three, in blocks of one.
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> teacher = LocalTeacher(model, top_k=4)
        >>> sequence = torch.tensor([[5, 6, 7, 8, 9]])
        >>> teacher.start(sequence[:, :3])
        >>> first, second = teacher.score(sequence[:, 3:4]), teacher.score(sequence[:, 4:5])
        >>> full = model(sequence).logits.log_softmax(-1)
        >>> torch.allclose(second.token_log_probs[0, 0], full[0, 3, 9], atol=1e-5)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        top_k: int = 16,
        max_logit_elements: int = MAX_LOGIT_ELEMENTS,
        vocab_size: int | None = None,
        role: str = "teacher",
    ) -> None:
        if role == "teacher":
            model.eval()
        self.role = role
        self._parts = BackboneAndHead(model)
        self.model = self._parts.model
        self.vocab_size = self._parts.vocab_size if vocab_size is None else min(vocab_size, self._parts.vocab_size)
        self.excluded_ids: tuple[int, ...] = ()
        self._excluded: Tensor | None = None
        self.top_k = top_k
        if not 1 <= top_k <= self.vocab_size:
            raise ConfigError(f"top_k must lie in 1 to {self.vocab_size}, the {role}'s vocabulary; got {top_k}")
        if max_logit_elements < self._parts.vocab_size:
            raise ConfigError(
                f"max_logit_elements must hold at least one position of the {role}'s {self._parts.vocab_size} logits, "
                f"got {max_logit_elements}"
            )
        self._positions_at_once = max(1, max_logit_elements // self._parts.vocab_size)
        self._config = text_config(self.model)
        layer_types = getattr(self._config, "layer_types", None) or ()
        self._one_token_at_a_time = any(kind in LINEAR_LAYER_TYPES for kind in layer_types)
        refuse_other_caches(self.model, role)
        self._takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        self._cache: DynamicCache | None = None
        self._adds_rows, self._ragged_rows = can_join(self._new_cache()), has_slots(self.model)
        self.wall_seconds, self.batches = 0.0, 0

    def restrict_vocabulary(self, size: int, excluded_ids: Iterable[int] = ()) -> None:
        """Let only the first `size` ids count from now on, and none of `excluded_ids`; a ConfigError if fewer than `top_k` stay."""
        size = min(size, self.vocab_size)
        excluded = tuple(sorted(index for index in {*self.excluded_ids, *excluded_ids} if 0 <= index < size))
        if size - len(excluded) < self.top_k:
            raise ConfigError(f"top_k is {self.top_k}, above the {size - len(excluded)} tokens that both models share")
        self.vocab_size, self.excluded_ids = size, excluded
        self._excluded = id_tensor(excluded, self.device)

    @property
    def capabilities(self) -> TeacherCapabilities:
        """Rows join only where every layer keeps all of a sequence's keys, and are ragged where every layer is attention."""
        return TeacherCapabilities(gives_full_logits=True, adds_rows=self._adds_rows, ragged_rows=self._ragged_rows)

    @property
    def device(self) -> torch.device:
        return input_device(self.model)

    @property
    def context_length(self) -> int | None:
        return context_length(self.model)

    @property
    def rotary_switch(self) -> int | None:
        return rotary_switch(self.model)

    @property
    def block_tokens(self) -> int:
        """Tokens of one efficient pass; on a CPU the activations of 512 tokens stay in its cache."""
        return BLOCK_TOKENS.get(self.device.type, BLOCK_TOKENS["elsewhere"])

    def special_token_ids(self, name: str) -> tuple[int, ...]:
        return special_token_ids(name, self.model)

    def start(
        self, prompt_ids: Int[Tensor, "rows prompt"], prompt_mask: Int[Tensor, "rows prompt"] | None = None
    ) -> None:
        """Begin a new batch. The prompts are read together with the first block.

        Args:
            prompt_ids: prompts, padded on the left with any id.
            prompt_mask: 1 on prompt tokens, 0 on padding; all ones by default.

        Raises:
            InputError: an empty prompt, padding on the right, a token id outside the vocabulary, or a prompt beyond the model's
                context.
            UnsupportedGenerationError: the model is being trained with gradient checkpointing, so it keeps no cache.
        """
        self._unread, self._mask = self._checked_prompts(prompt_ids, prompt_mask)
        self._cache = self._new_cache()
        self._context = forward_context(self.model)
        self._padded = not bool(self._mask.all())
        self.batches += 1

    @torch.no_grad()
    def add_rows(
        self, prompt_ids: Int[Tensor, "rows prompt"], prompt_mask: Int[Tensor, "rows prompt"] | None = None
    ) -> None:
        """Further rows, as for `start`, behind those that are followed. Their prompts are read at once, and their cache joins the
        others'. A MonitorStateError before `start`, or for a model whose rows cannot join (`capabilities.adds_rows`)."""
        cache = self._require_cache()
        if not self._adds_rows:
            raise MonitorStateError(
                f"rows cannot join a batch of the {self.role}: call start when all of its rows have left"
            )
        started = perf_counter()
        unread, mask = self._checked_prompts(prompt_ids, prompt_mask)
        new_cache = self._new_cache()
        with self.while_asked():
            for reading, of_mask, ids in ((cache, self._mask, self._unread), (new_cache, mask, unread)):
                if ids.shape[1] > 1:  # all tokens but the last
                    self.forward_pass(reading, of_mask[:, :-1], ids[:, :-1], bool(of_mask.all()))
        with self._context():
            joined = join_caches(self._new_cache(), (cache, self._mask[:, :-1]), (new_cache, mask[:, :-1]))
        self._cache = joined.cache
        self._unread = torch.cat([self._unread[:, -1:], unread[:, -1:]])
        self._mask = torch.cat([joined.mask, joined.mask.new_ones(len(joined.mask), 1)], dim=1)
        self._padded = not bool(self._mask.all())
        self.wall_seconds += perf_counter() - started

    @torch.no_grad()
    def score(
        self,
        token_ids: Int[Tensor, "rows time"],
        candidate_ids: Int[Tensor, "rows time candidates"] | None = None,
        *,
        wanted: Bool[Tensor, "rows time"] | None = None,
    ) -> TeacherScores:
        """Score the next block of tokens of every row, and remember them.

        Args:
            token_ids: the tokens that follow what was scored so far.
            candidate_ids: further ids whose log-probabilities are wanted at each position.
            wanted: positions to score (all by default); a finished row's padding is fed but not scored, and may be any id.

        Returns:
            Scores on the device of `token_ids`.

        Raises:
            MonitorStateError: called before `start`.
            InputError: another number of rows, no tokens, an id that does not count, or more tokens than the model's context.
            NonFiniteLogitsError: NaN or infinite logits; names row and position.
        """
        cache, started = self._require_cache(), perf_counter()
        rows, time = token_ids.shape
        if rows != self._unread.shape[0]:
            raise InputError(f"the {self.role} follows {self._unread.shape[0]} rows, got tokens of {rows}")
        if time == 0:
            raise InputError(f"the {self.role} got a block without tokens")
        origin = token_ids.device
        token_ids = token_ids.to(self.device)
        wanted = torch.ones_like(token_ids, dtype=torch.bool) if wanted is None else wanted.to(self.device)
        last = (wanted * torch.arange(1, time + 1, device=self.device)).amax(dim=-1)
        read = torch.where(last > 0, self._mask.sum(dim=-1) + last - 1, 0)  # the last token is not read yet
        self.check_context(int(read.max()))
        token_ids = self.known_ids(token_ids, wanted)
        if candidate_ids is not None:
            candidate_ids = self.known_ids(candidate_ids.to(self.device), wanted.unsqueeze(-1))

        fed = torch.cat([self._unread, token_ids[:, :-1]], dim=-1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(rows, time - 1)], dim=-1)
        collected = []
        with self.while_asked():
            for begin, end, first_scored in self._pieces(fed.shape[1], time):
                mask = self._mask[:, : self._mask.shape[1] - fed.shape[1] + end]
                outputs = self.forward_pass(cache, mask, fed[:, begin:end], not self._padded)
                if end > first_scored:
                    span = slice(first_scored - (fed.shape[1] - time), end - (fed.shape[1] - time))
                    candidates = None if candidate_ids is None else candidate_ids[:, span]
                    outputs, tokens = outputs[:, first_scored - begin :], token_ids[:, span]
                    collected.append(self.score_span(outputs, span.start, tokens, candidates, wanted[:, span]))
        self._unread = token_ids[:, -1:]
        self._mask = torch.cat([self._mask, self._mask.new_ones(rows, 1)], dim=-1)
        scores = TeacherScores.cat(collected).to(origin)
        self.wall_seconds += perf_counter() - started
        return scores

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Follow only these rows from now on, in this order; the others are removed from the cache. A MonitorStateError before
        `start`."""
        cache = self._require_cache()
        rows = rows.to(self.device)
        with self._context():
            keep_rows_inplace(cache, rows, RowMoves.to(rows))
        self._unread, self._mask = self._unread[rows], self._mask[rows]

    def release(self) -> None:
        """Give the cache back; `start` or `follow_rows` comes next."""
        self._cache = None

    def follow_rows(self) -> RaggedRows:
        """Begin a new batch, of rows of different lengths, for a model whose every layer is attention."""
        self._context = forward_context(self.model)
        self.batches += 1
        return RaggedRows(self)

    def head_parameters(self) -> HeadParameters | None:
        """The LM head as plain tensors over the vocabulary that counts; None where it is more than a linear map."""
        with self._alone():  # an adapter of the head is not the teacher's
            return self._parts.head_parameters(self.vocab_size, self.excluded_ids)

    @torch.no_grad()
    def hidden_states(self, layout: Layout) -> Float[Tensor, "tokens hidden"]:
        """What its LM head reads at the positions of `layout` that predict response tokens."""
        with self._alone():
            return hidden_states(self.model, self._parts.lm_head, layout.to(self.device))

    @torch.no_grad()
    def logits(self, layout: Layout) -> Float[Tensor, "tokens vocab"]:
        """float32 logits at those positions, where `head_parameters` is None."""
        with self._alone():
            return logits(self.model, layout.to(self.device), self.vocab_size, self.excluded_ids)

    def can_pack(self) -> bool:
        """Whether `hidden_states` and `logits` may be asked for a packed layout."""
        with self._alone():
            return can_pack(self.model)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The model as the teacher sees it: in evaluation mode, which it may have left if it is the student as well, and outside
        of autocast."""
        with evaluating(self.model), torch.autocast(self.device.type, enabled=False), self.while_asked():
            yield

    def while_asked(self) -> AbstractContextManager:
        """Entered around every pass through the model."""
        return nullcontext()

    def _require_cache(self) -> DynamicCache:
        if self._cache is None:
            raise MonitorStateError(f"the {self.role} has no prompts yet: call start(prompt_ids, prompt_mask) first")
        return self._cache

    def _new_cache(self) -> DynamicCache:
        cache = DynamicCache(config=self._config)
        use_growing_layers_inplace(cache)
        return cache

    def _checked_prompts(self, prompt_ids: Tensor, prompt_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        refuse_checkpointing(self.model, self.role)
        prompt_mask = torch.ones_like(prompt_ids) if prompt_mask is None else prompt_mask
        if prompt_mask.shape != prompt_ids.shape:
            raise InputError(
                f"the {self.role}'s prompt ids and attention mask must have one shape, got {tuple(prompt_ids.shape)} "
                f"and {tuple(prompt_mask.shape)}"
            )
        check_left_padding(prompt_mask)
        self.check_context(int(prompt_mask.sum(dim=-1).max()))
        known = self.known_ids(prompt_ids, prompt_mask.bool(), of_prompt=True).to(self.device)
        return known, prompt_mask.to(self.device, torch.long)

    def _pieces(self, fed: int, time: int) -> list[tuple[int, int, int]]:
        """How to feed `fed` columns of which the last `time` are scored: (begin, end, first scored column) of each pass."""
        first_scored = fed - time
        if not self._one_token_at_a_time:
            width = fed if self._parts.separable else max(1, self._positions_at_once // max(1, self._unread.shape[0]))
            begins = list(range(0, fed, width))
        elif self._mask.shape[1] > fed:
            begins = list(range(fed))  # a recurrent state continues correctly one token at a time in every family
        else:
            begins = [0, *range(first_scored + 1, fed)]
        ends = [*begins[1:], fed]
        return [(begin, end, max(begin, first_scored)) for begin, end in zip(begins, ends, strict=True)]

    @property
    def columns_at_once(self) -> int:
        """Tokens of one pass over rows of different lengths; where it makes logits of all of them, those must fit."""
        return self.block_tokens if self._parts.separable else min(self.block_tokens, self._positions_at_once)

    def forward_pass(self, cache: DynamicCache, mask: Tensor, token_ids: Tensor, unpadded: bool) -> Tensor:
        """Read the next columns into a cache; `mask` covers what it holds and them. Hidden states where the head can be split off,
        logits elsewhere."""
        inputs = {
            "input_ids": token_ids,
            "attention_mask": None if unpadded else mask,
            "past_key_values": cache,
            "use_cache": True,
        }
        if self._takes_positions:
            # A finished row's padding may run on beyond the context.
            last = None if self.context_length is None else self.context_length - 1
            inputs["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(0, last)[:, -token_ids.shape[1] :]
        with self._context(), evaluating(self.model) if self.model.training else nullcontext():
            if self._parts.separable:
                return self._parts.backbone(**inputs).last_hidden_state
            return self.model(**inputs).logits

    def score_span(
        self,
        outputs: Float[Tensor, "rows columns features"],
        first: int,
        token_ids: Int[Tensor, "rows span"],
        candidate_ids: Int[Tensor, "rows span candidates"] | None,
        wanted: Bool[Tensor, "rows span"],
        columns: Int[Tensor, "rows span"] | None = None,
    ) -> TeacherScores:
        """Scores of a span of the block that begins at its column `first`, in slices; `columns`: whose output predicts each."""
        rows, span = token_ids.shape
        row_index, column_index = wanted.nonzero(as_tuple=True)
        predicting = column_index if columns is None else columns[wanted]
        zeros = partial(torch.zeros, dtype=torch.float32, device=token_ids.device)
        scores = TeacherScores(
            topk_ids=token_ids.new_zeros(rows, span, self.top_k),
            topk_log_probs=zeros(rows, span, self.top_k),
            candidate_log_probs=None if candidate_ids is None else zeros(candidate_ids.shape),
            token_log_probs=zeros(rows, span),
        )
        finite, several = [], self._positions_at_once
        for begin in range(0, len(row_index), several):
            at = slice(begin, begin + several)
            index = row_index[at], column_index[at]
            picked = outputs[index[0].to(outputs.device), predicting[at].to(outputs.device)]
            logits = self._parts.project(picked) if self._parts.separable else picked
            logits = without_ids(logits.to(token_ids.device)[:, : self.vocab_size].float(), self._excluded)
            normalizer = logits.logsumexp(dim=-1, keepdim=True)
            finite.append(normalizer.isfinite().squeeze(-1))
            top = logits.topk(self.top_k, dim=-1)
            scores.topk_ids[index] = top.indices
            scores.topk_log_probs[index] = top.values - normalizer
            scores.token_log_probs[index] = (logits.gather(-1, token_ids[index].unsqueeze(-1)) - normalizer).squeeze(-1)
            if scores.candidate_log_probs is not None and candidate_ids is not None:
                scores.candidate_log_probs[index] = logits.gather(-1, candidate_ids[index]) - normalizer
        if finite and not bool(torch.cat(finite).all()):
            bad = int((~torch.cat(finite)).nonzero()[0])
            row, token = int(row_index[bad]), first + int(column_index[bad])
            message = f"the {self.role} returned NaN or infinite logits at row {row}, token {token} of this block"
            raise NonFiniteLogitsError(message, row=row, token=token)
        return scores

    def check_context(self, tokens: int) -> None:
        context = self.context_length
        if context is not None and tokens > context:
            raise InputError(
                f"the {self.role}'s context holds {context} tokens, and a sequence of {tokens} would have to be read: "
                "lower max_new_tokens or shorten the prompts"
            )

    def known_ids(self, ids: Tensor, counts: Tensor, *, of_prompt: bool = False) -> Tensor:
        """`ids`, with 0 for unknown ones, as padding may be; an `InputError` where they count. Prompts may hold excluded ids."""
        unknown, excluded = (ids < 0) | (ids >= self.vocab_size), None if of_prompt else self._excluded
        if excluded is not None:
            unknown |= torch.isin(ids, excluded.to(ids.device))
        wrong = ids[unknown & counts]
        if wrong.numel():
            known = self.vocab_size - (0 if excluded is None else len(excluded))
            raise InputError(
                f"token id {int(wrong[0])} is outside the {self.role}'s vocabulary of {known}: teacher "
                "and student must share one tokenizer, and ids that they do not share must not be sampled (suppress_tokens)"
            )
        return ids.masked_fill(unknown, 0)
