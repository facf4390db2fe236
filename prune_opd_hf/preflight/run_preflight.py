"""The preflight: checks of a pair, one set of unpruned rollouts, and everything that follows from it by replay."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from prune_opd_hf.algorithm.drift import DriftConfig, agreement
from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.generation import ENGINES, LoopEngine, Request, Sampling, VLLMSettings
from prune_opd_hf.models.compatibility import (
    context_length,
    ensure_pad_token,
    special_token_ids,
)
from prune_opd_hf.models.end_tokens import find_end_tokens, shared_end_tokens
from prune_opd_hf.models.loading import (
    as_tokenizer,
    ensure_trainable,
    load_causal_lm,
    load_tokenizer,
    published_name,
)
from prune_opd_hf.models.prompts import PromptEncoder
from prune_opd_hf.preflight.falling_agreement import confirm_falling_agreement
from prune_opd_hf.preflight.pair_checks import (
    Check,
    check_contexts,
    check_end_tokens,
    check_families,
    check_rollout_end_tokens,
    check_thoughts,
    check_tokenizers,
)
from prune_opd_hf.preflight.preflight_report import EventSummary, PositionBand, PreflightReport
from prune_opd_hf.preflight.replay import drift_events
from prune_opd_hf.preflight.settings_grid import (
    Recommendation,
    agreed_tokens,
    metric_name,
    recommend,
    settings_grid,
    try_settings,
    unpruned_seconds,
)
from prune_opd_hf.preflight.step_cost import StepCost, generate_unpruned, time_update
from prune_opd_hf.preflight.step_memory import available_bytes, step_memory
from prune_opd_hf.records.environment import describe_hardware, package_versions
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.tasks.pair import EMBEDDED, resolve_embedded
from prune_opd_hf.teachers.base import Teacher, require
from prune_opd_hf.teachers.local import LocalTeacher
from prune_opd_hf.teachers.served import ServedTeacher
from prune_opd_hf.training.pair import freeze_unread_parts

BANDS = 12

FIXED_LENGTH = 0.5
"""A setting that flags more than this share of the agreed tokens ends rows by counting tokens, wherever they drift."""

OPENINGS, OPENING_TOKENS = 16, 8
"""The teacher's own answers to so many prompts, and so many tokens of each, show whether it thinks first."""

GIB = 2**30


def preflight(
    model: str | nn.Module,
    teacher_model: str | nn.Module | Teacher,
    prompts: Sequence[Any],
    *,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    teacher_processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    num_generations: int = 4,
    max_completion_length: int = 4096,
    max_prompt_length: int | None = 1024,
    generation_batch_size: int = 64,
    drift_top_k: int = 16,
    drift_min_length: int = 0,
    check_every: int = 32,
    temperature: float = 1.0,
    seed: int = 0,
    model_init_kwargs: Mapping[str, Any] | None = None,
    teacher_model_init_kwargs: Mapping[str, Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    final_assistant_message: str = "refuse",
    allow_renamed_special_tokens: bool = False,
    max_tokens_per_micro_batch: int | None = None,
    bf16: bool = False,
    rollout_dtype: str | None = None,
    compile_decoding: bool = False,
    gradient_checkpointing: bool = False,
    engine: str = "loop",
    vllm: VLLMSettings = VLLMSettings(),
    rollouts_path: str | Path | None = None,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> PreflightReport:
    """Look at a pair before distilling it: does it fit, what would pruning save, with which settings?

    One set of rollouts is generated, without pruning, while the teacher scores it; every other setting is replayed on it.

    Args:
        model, teacher_model: causal LMs, PEFT models, or Hub ids or folders to load either from; the teacher may be a `Teacher`
            that lies elsewhere, such as a served one that scores given candidates.
        prompts: text, or conversations as lists of messages.
        processing_class, teacher_processing_class: the tokenizers, loaded with models given by name; a missing teacher's one is
            taken to be the student's.
        num_generations: responses sampled to each prompt.
        max_completion_length: cap on the response: that of the training.
        max_prompt_length: longer prompts are left out; None keeps all.
        generation_batch_size: sequences generated together: as many as training ever has, in an evaluation too.
        drift_top_k: candidates recorded at each position; settings with more cannot be replayed.
        drift_min_length: the replayed settings stop no sequence before it has so many tokens.
        check_every: tokens between two teacher passes.
        temperature: of the sampling; 0 is greedy.
        seed: of the sampling.
        model_init_kwargs, teacher_model_init_kwargs: for loading models given by name, which run on an accelerator if there is
            one. A teacher without its own is loaded with the student's.
        chat_template_kwargs, final_assistant_message, allow_renamed_special_tokens: as in training.
        eos_token_id: the tokens that end a response; by default all that either model or its tokenizer names.
        max_tokens_per_micro_batch, bf16, gradient_checkpointing, rollout_dtype, compile_decoding: as in training; what a step holds
            in memory. None: one row in a pass.
        engine, vllm: who samples, and where vLLM runs, as in training; the times are then of that engine.
        rollouts_path: where the rollouts are saved (.safetensors), for the viewer and the diagnostics; None keeps none.
        on_progress: called with rollouts done, rollouts in all, and tokens sampled so far, after every teacher pass.

    Returns:
        The report. Where a finding rules the pair out, nothing is generated and the report has no rollouts.

    Raises:
        ConfigError, InputError: settings or prompts that cannot be worked with, or a model that cannot be loaded.

    Example:
        >>> from prune_opd_hf.tasks import ChainTask, load_student, load_teacher, load_tokenizer
        >>> prompts = [problem.prompt for problem in ChainTask().problems(16, seed=0)]
        >>> report = preflight(load_student(), load_teacher(), prompts, processing_class=load_tokenizer(),
        ...                    max_completion_length=48, num_generations=1, check_every=8)
        >>> report.works, report.rollouts
        (True, 16)
    """
    batches = {"batch_size": generation_batch_size, "check_every": check_every}
    lengths = {"num_generations": num_generations, "max_completion_length": max_completion_length}
    budgets = {"max_tokens_per_micro_batch": 1 if max_tokens_per_micro_batch is None else max_tokens_per_micro_batch}
    for name, value in {**lengths, **batches, **budgets}.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if engine not in ENGINES:
        raise ConfigError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    if rollout_dtype not in (None, "bfloat16"):
        raise ConfigError(f"rollout_dtype must be bfloat16 or left out, got {rollout_dtype!r}")
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature must be a finite number of at least 0, got {temperature}")
    usual = [
        DriftConfig(metric, drift_top_k, min_length=drift_min_length) for metric in (DriftConfig.metric, "overlap")
    ]
    if not prompts:
        raise InputError("preflight needs at least one prompt")
    own = model_init_kwargs or {}
    theirs = own if teacher_model_init_kwargs is None else teacher_model_init_kwargs
    tokenizer = _tokenizer(model, processing_class, "student", own)
    if tokenizer is None:
        raise ConfigError("processing_class is needed where the student is given as an object: its tokenizer")
    encode = PromptEncoder(tokenizer, chat_template_kwargs or {}, final_assistant_message)
    encode.check_settings_act(prompts)
    rows = [encode(prompt, f"prompt {number}") for number, prompt in enumerate(prompts)]
    rows = [row for row in rows if max_prompt_length is None or len(row) <= max_prompt_length]
    left_out = len(prompts) - len(rows)
    if not rows:
        raise InputError(
            f"no prompt is left: all {len(prompts)} have more than max_prompt_length={max_prompt_length} tokens"
        )
    elsewhere = None if isinstance(teacher_model, str | nn.Module) else teacher_model
    if elsewhere is not None:
        remedy = "take a server on a GPU (vLLM scores given ids there), or a copy of the teacher in this process"
        require(elsewhere, "scores_candidates", "the preflight", remedy)
    is_same = teacher_model == model and theirs == own
    teacher_tokenizer = teacher_processing_class or tokenizer
    if not is_same:
        teacher_tokenizer = _tokenizer(teacher_model, teacher_processing_class, "teacher", theirs)
    student = _load(model, "student", own)
    teacher = student if is_same else _load(teacher_model, "teacher", theirs)
    untrained = None
    try:
        ensure_trainable(student)  # a part of an update is timed
    except ConfigError as error:
        message = f"{error}; memory and times are told without an update of it: no gradients, no moments of AdamW"
        untrained = Check("what is trained", "warning", message)
        student.requires_grad_(False)  # of quantized weights, what is not quantized
    freeze_unread_parts(student)
    teacher_end_token_ids = special_token_ids("eos_token_id", teacher, teacher_tokenizer)
    both_end = shared_end_tokens((student, tokenizer), (teacher, teacher_tokenizer))
    allowed = {"allow_renamed_special_tokens": allow_renamed_special_tokens}
    checks, shared = check_tokenizers(tokenizer, teacher_tokenizer or tokenizer, both_end, **allowed)
    if teacher_tokenizer is None:
        checks[0] = Check("vocabulary", "note", "not compared: no tokenizer of the teacher was given")
    if untrained is not None:
        checks.append(untrained)
    if left_out:
        limit = f"max_prompt_length={max_prompt_length}"
        message = f"{left_out} of {len(prompts)} prompts have more than {limit} tokens and were left out"
        checks.append(Check("prompts", "note", message))
    end_token_ids: tuple[int, ...] = ()
    known: dict[str, Any] = {} if shared is None else {"shared": shared.size, "excluded": shared.excluded_ids}
    try:
        found = find_end_tokens(
            student,
            tokenizer,
            role="student",
            teacher_ids=teacher_end_token_ids,
            teacher_tokenizers=[teacher_tokenizer],
            given=eos_token_id,
            **known,
        )
        end_token_ids = found.token_ids
        teacher_end_token_ids = found.named_by_role("teacher") or end_token_ids
        checks.append(check_end_tokens(found, tokenizer))
    except ConfigError as error:
        checks.append(Check("end tokens", "stop", str(error)))
    pad_token_id = ensure_pad_token(tokenizer)
    ids = [row for row in rows for _ in range(num_generations)]
    longest_prompt = max(map(len, ids))
    of_teacher = context_length(teacher) if elsewhere is None else elsewhere.context_length
    contexts = {"student": context_length(student), "teacher": of_teacher}
    checks += check_contexts(contexts, longest_prompt, max_completion_length)
    sampling = Sampling(max_completion_length, end_token_ids, pad_token_id, temperature)
    if all(check.level != "stop" for check in checks):
        checks += check_families(student, student if elsewhere is not None else teacher, sampling, longest_prompt)
    together, tokens = min(generation_batch_size, len(ids)), longest_prompt + max_completion_length
    here = teacher if elsewhere is None else None
    available = available_bytes()
    memory = step_memory(
        student,
        here,
        rows=together,
        tokens=tokens,
        pass_tokens=max_tokens_per_micro_batch,
        rollouts=len(ids),
        check_every=check_every,
        top_k=drift_top_k,
        bf16=bf16,
        rollout_dtype=rollout_dtype,
        compile_decoding=compile_decoding,
        gradient_checkpointing=gradient_checkpointing,
        available=None if available is None else available[1],
    )
    if available is not None and memory.peak > available[1]:
        message = (
            f"a training step holds about {memory.peak / GIB:.1f} GiB, {available[0]} has {available[1] / GIB:.1f}: fewer rows at "
            "once, fewer tokens in a pass, an adapter (peft_config), a quantized teacher, or more devices"
        )
        checks.append(Check("memory", "warning", message))
    obstacles = [f"This pair will not work: {check.name}: {check.message}" for check in checks if check.level == "stop"]
    report = PreflightReport(
        student=_name(model, "student"),
        teacher=_name(teacher_model, "teacher"),
        checks=tuple(checks),
        memory=memory,
        memory_available=available,
        recommendation=Recommendation(False, None, tuple(obstacles)),
        top_k=drift_top_k,
        check_every=check_every,
        min_length=drift_min_length,
        hardware=describe_hardware(),
        versions=package_versions(),
    )
    if obstacles:
        return report
    assert shared is not None  # otherwise there is an obstacle
    scorer = LocalTeacher(teacher, top_k=drift_top_k) if elsewhere is None else elsewhere
    scorer.restrict_vocabulary(shared.size, shared.excluded_ids)
    rollouts, blocks = generate_unpruned(
        student,
        scorer,
        ids,
        sampling,
        seed=seed,
        on_progress=on_progress,
        engine=engine,
        vllm=vllm,
        **batches,
    )
    if rollouts_path is not None:
        rollouts.save(rollouts_path)
    asked = ids[::num_generations][:OPENINGS]
    first_tokens = []  # one that lies elsewhere scores, and does not answer
    if elsewhere is None:
        greedy = Sampling(OPENING_TOKENS, end_token_ids, pad_token_id, temperature=0)
        answers = LoopEngine(teacher, greedy, slots=OPENINGS).generate(Request(tuple(prompt)) for prompt in asked)
        first_tokens = [tokenizer.decode(done.token_ids) for done in answers]
    thoughts = check_thoughts(
        [tokenizer.decode(prompt) for prompt in asked],
        [tokenizer.decode(row[:OPENING_TOKENS]) for row in rollouts.response_ids],
        first_tokens,
        tokenizer,
        teacher_tokenizer or tokenizer,
    )
    anew = not scorer.capabilities.is_incremental
    cost = StepCost.fit(blocks, per_kept_token=time_update(student, rollouts), reads_anew=anew)
    grid = tuple(try_settings(rollouts, settings_grid(drift_top_k, drift_min_length), cost, **batches))
    bands = position_bands(rollouts, BANDS)
    shared_mass = {"early_agreement": early_agreement(rollouts), "taken_away": probability_taken_away(rollouts)}
    advice = confirm_falling_agreement(recommend(grid, rollouts=len(rollouts), **shared_mass), rollouts)
    summarized = usual if advice.row is None else [*usual, advice.row.config]
    return replace(
        report,
        checks=(
            *checks,
            *check_rollout_end_tokens(rollouts, teacher_end_token_ids),
            thoughts,
            *(check for config in usual for check in check_fixed_length(rollouts, config)),
        ),
        rollouts=len(rollouts),
        tokens=int(rollouts.lengths.sum()),
        mean_length=float(rollouts.lengths.float().mean()),
        longest=int(rollouts.lengths.max()),
        stop_reasons={reason: rollouts.stop_reason.count(reason) for reason in ("eos", "length")},
        bands=bands,
        events=tuple(summarize_events(rollouts, config, bands) for config in summarized),
        cost=cost,
        unpruned_seconds=unpruned_seconds(rollouts, cost, **batches),
        grid=grid,
        recommendation=advice,
    )


def position_bands(rollouts: Rollouts, bands: int) -> tuple[PositionBand, ...]:
    """Agreement in equal ranges of response positions."""
    assert rollouts.overlap is not None  # a preflight observes the student
    mass, agreed, mask = _mass(rollouts), agreed_tokens(rollouts), rollouts.response_mask
    found = []
    for columns in torch.arange(mask.shape[1]).split(-(-mask.shape[1] // bands)):
        inside = mask[:, columns]
        band = PositionBand(
            first=int(columns[0]),
            last=int(columns[-1]),
            rollouts=int(inside.any(dim=-1).sum()),
            overlap=_over_rollouts(rollouts.overlap[:, columns], inside),
            mass=_over_rollouts(mass[:, columns], inside),
            agreed=float(agreed[:, columns][inside].float().mean()),
        )
        found.append(band)
    return tuple(found)


def early_agreement(rollouts: Rollouts) -> float:
    """Shared mass on the first tenth of the positions, in the rollout at the 90th percentile: how well the best ones begin."""
    tenth = max(1, int(rollouts.lengths.max()) // 10)
    return _over_rollouts(_mass(rollouts)[:, :tenth], rollouts.response_mask[:, :tenth])[2]


def probability_taken_away(rollouts: Rollouts) -> float:
    """Probability of the student's recorded candidates that the teacher does not share, Σ_{v in S_t} max(p_v - q_v, 0): the mean
    over tokens. 0 where the two are the same model, however unsure it is."""
    return float((_own_mass(rollouts) - _mass(rollouts))[rollouts.response_mask].mean())


def summarize_events(rollouts: Rollouts, config: DriftConfig, bands: Sequence[PositionBand]) -> EventSummary:
    """Drift events of unpruned rollouts under one setting."""
    events = drift_events(rollouts, config)
    counts, so_far = events.sum(dim=-1), events.long().cumsum(dim=-1).float()
    some = counts > 0
    return EventSummary(
        setting=metric_name(config),
        events_per_rollout=_percentiles(counts),
        first_event=_percentiles(events.long().argmax(dim=-1)[some]) if bool(some.any()) else None,
        without_events=float((~some).float().mean()),
        cumulative=tuple(float(so_far[rollouts.response_mask[:, at.first], at.last].mean()) for at in bands),
    )


def check_fixed_length(rollouts: Rollouts, config: DriftConfig) -> list[Check]:
    """A warning where a setting flags most of the agreed tokens as well, so that it ends every row after about as many tokens."""
    events, agreed, mask = drift_events(rollouts, config), agreed_tokens(rollouts), rollouts.response_mask
    of_agreed = int((events & agreed).sum()) / max(int(agreed.sum()), 1)
    if config.events_to_exhaustion is None or of_agreed <= FIXED_LENGTH:
        return []
    share = int(events.sum()) / int(mask.sum())
    length = max(config.min_length, round(config.events_to_exhaustion / share))
    message = (
        f"with {metric_name(config)}, {share:.0%} of the tokens are events, and {of_agreed:.0%} of those that the teacher agrees "
        f"with: drop {config.weight_drop:g} stops every row that gets there at about {length} tokens, as a fixed length would"
    )
    return [Check("drift setting", "warning", message)]


def _tokenizer(model: Any, given: Any, role: str, arguments: Mapping[str, Any]) -> Any:
    if given is not None:
        return as_tokenizer(given, "processing_class" if role == "student" else "teacher_processing_class")
    return load_tokenizer(model, role, **arguments) if isinstance(model, str) else None


def _load(model: Any, role: str, arguments: Mapping[str, Any]) -> Any:
    """A model given by name; an object stays as it is."""
    if not isinstance(model, str):
        return model
    loaded = load_causal_lm(model, role, **{"dtype": "auto", **arguments}).eval()
    if not hasattr(loaded, "hf_device_map"):
        loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    return loaded


def _name(model: Any, role: Literal["student", "teacher"]) -> str:
    """A model's name as it may be published, the package's own as "embedded"."""
    if isinstance(model, ServedTeacher):
        return f"{published_name(model.name)}, on vLLM servers"
    folder = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    if folder and os.path.realpath(folder) == os.path.realpath(resolve_embedded(EMBEDDED, role)):
        return EMBEDDED
    return published_name(model) or f"unnamed {role}"


def _mass(rollouts: Rollouts) -> Tensor:
    """Probability that both models share on the student's recorded candidates, Σ_{v in S_t} min(p_v, q_v)."""
    return _own_mass(rollouts) * agreement("mass", rollouts.teacher_topk_ids.shape[-1], rollouts.positions)


def _own_mass(rollouts: Rollouts) -> Tensor:
    assert rollouts.student_topk_log_probs is not None  # a preflight observes the student
    return rollouts.student_topk_log_probs.float().exp().sum(dim=-1)


def _over_rollouts(values: Tensor, inside: Tensor) -> tuple[float, float, float]:
    """Of each rollout's mean over its positions inside: the mean over rollouts that have any, 10th and 90th percentile."""
    rows = inside.any(dim=-1)
    means = (values * inside).sum(dim=-1)[rows] / inside.sum(dim=-1)[rows]
    low, _, high = _percentiles(means)
    return float(means.mean()), low, high


def _percentiles(values: Tensor) -> tuple[float, float, float]:
    low, middle, high = np.percentile(values.cpu().numpy(), [10, 50, 90])
    return float(low), float(middle), float(high)
