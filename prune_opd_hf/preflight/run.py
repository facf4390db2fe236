"""The preflight itself: checks, one set of unpruned rollouts, and everything that follows from it by replay."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from prune_opd_hf.algorithm.drift import DriftConfig, agreement
from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.models.lm_head import text_config
from prune_opd_hf.preflight.compatibility import (
    Check,
    check_contexts,
    check_ends,
    check_rollout_ends,
    check_tokenizers,
)
from prune_opd_hf.preflight.cost import StepCost
from prune_opd_hf.preflight.grid import agreed_tokens, recommend, settings_grid, try_settings, unpruned_seconds
from prune_opd_hf.preflight.measuring import generate_unpruned, time_update
from prune_opd_hf.preflight.memory import available_bytes, memory_bytes
from prune_opd_hf.preflight.replay import drift_events
from prune_opd_hf.preflight.report import EventSummary, PositionBand, PreflightReport
from prune_opd_hf.records.environment import describe_hardware, package_versions
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.tasks.pair import WEIGHTS
from prune_opd_hf.teachers.local import LocalTeacher
from prune_opd_hf.training.data import tokenize_prompts

BANDS = 12


def preflight(
    student: str | nn.Module,
    teacher: str | nn.Module,
    prompts: Sequence[Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    rollouts_per_prompt: int = 4,
    max_new_tokens: int = 4096,
    max_prompt_length: int | None = 1024,
    rows_at_once: int = 64,
    top_k: int = 16,
    check_every: int = 32,
    min_length: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    device: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    rollouts_path: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PreflightReport:
    """Look at a pair before distilling it: does it fit, what would pruning save, with which settings?

    One set of rollouts is generated, without pruning, while the teacher watches; every other setting is replayed on it.

    Args:
        student, teacher: causal LMs, or Hub ids or folders to load them from.
        prompts: text, or conversations as lists of messages.
        tokenizer, teacher_tokenizer: loaded with models given by name; a missing teacher's one is taken to be the student's.
        rollouts_per_prompt: responses sampled to each prompt.
        max_new_tokens: cap on the response: that of the training.
        max_prompt_length: longer prompts are left out; None keeps all.
        rows_at_once: sequences generated together.
        top_k: candidates recorded at each position; settings with more cannot be replayed.
        check_every: tokens between two teacher passes.
        min_length: the replayed settings stop no sequence before it has so many tokens.
        temperature: of the sampling; 0 is greedy.
        seed: of the sampling.
        device: where to run models given by name; an accelerator if there is one by default.
        model_kwargs: for loading models given by name.
        chat_template_kwargs: for the chat template.
        rollouts_path: where the rollouts are saved (.safetensors), for the viewer and the diagnostics; None keeps none.
        on_progress: called with rollouts done and rollouts in all.

    Returns:
        The report. A pair that cannot work gives a report that says so, without rollouts where these make no sense.

    Raises:
        ConfigError, InputError: settings or prompts that cannot be worked with.

    Example:
        >>> from prune_opd_hf.tasks import ChainTask, load_student, load_teacher, load_tokenizer
        >>> prompts = [problem.prompt for problem in ChainTask().problems(16, seed=0)]
        >>> report = preflight(load_student(), load_teacher(), prompts, tokenizer=load_tokenizer(), max_new_tokens=48,
        ...                    rollouts_per_prompt=1, check_every=8)
        >>> report.works, report.rollouts
        (True, 16)
    """
    for name, value in (
        ("rollouts_per_prompt", rollouts_per_prompt),
        ("max_new_tokens", max_new_tokens),
        ("rows_at_once", rows_at_once),
        ("top_k", top_k),
        ("check_every", check_every),
    ):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature must be a finite number of at least 0, got {temperature}")
    if min_length < 0:
        raise ConfigError(f"min_length must be at least 0, got {min_length}")
    if not prompts:
        raise InputError("preflight needs at least one prompt")
    names = _name(student, "student"), _name(teacher, "teacher")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    same = teacher is student
    student, tokenizer = _loaded(student, tokenizer, "student", device, model_kwargs)
    if same:
        teacher = student
    teacher, teacher_tokenizer = _loaded(teacher, teacher_tokenizer, "teacher", device, model_kwargs)
    if tokenizer is None:
        raise ConfigError("tokenizer is needed where the student is given as an object")
    checks, shared = check_tokenizers(tokenizer, tokenizer if teacher_tokenizer is None else teacher_tokenizer)
    if teacher_tokenizer is None:
        checks[0] = Check("vocabulary", "note", "not compared: no tokenizer of the teacher was given")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    ends = _ends(student, tokenizer), _ends(teacher, teacher_tokenizer or tokenizer)
    checks.append(check_ends(*ends, tokenizer))
    if tokenizer.chat_template is None and not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(
            "the prompts are conversations and the student's tokenizer has no chat template: set tokenizer.chat_template, or "
            "give the prompts as text"
        )
    rows = tokenize_prompts(
        Dataset.from_dict({"prompt": list(prompts)}),
        tokenizer,
        max_prompt_length=max_prompt_length,
        chat_template_kwargs=dict(chat_template_kwargs or {}),
    )
    ids = [list(row) for row in rows["input_ids"] for _ in range(rollouts_per_prompt)]
    longest_prompt = max(map(len, ids))
    contexts = {
        role: getattr(text_config(model), "max_position_embeddings", None)
        for role, model in (("student", student), ("teacher", teacher))
    }
    checks += check_contexts(contexts, longest_prompt, max_new_tokens)
    memory = memory_bytes(student, teacher, rows=min(rows_at_once, len(ids)), tokens=longest_prompt + max_new_tokens)
    room = available_bytes()
    if room is not None and sum(memory.values()) > room[1]:
        checks.append(
            Check(
                "memory",
                "warning",
                f"a training step holds about {sum(memory.values()) / 2**30:.1f} GiB, {room[0]} has {room[1] / 2**30:.1f}: "
                "fewer rows at once, an adapter (peft_config), a quantized teacher, or more devices",
            )
        )
    common: dict[str, Any] = {
        "student": names[0],
        "teacher": names[1],
        "memory": memory,
        "memory_available": room,
        "step_rollouts": len(ids),
        "top_k": top_k,
        "check_every": check_every,
        "min_length": min_length,
        "hardware": describe_hardware(),
        "versions": package_versions(),
    }
    obstacles = [f"{check.name}: {check.words}" for check in checks if check.level == "stop"]
    if obstacles:
        return PreflightReport(
            **common,
            checks=tuple(checks),
            rollouts=0,
            tokens=0,
            mean_length=0.0,
            longest=0,
            stop_reasons={},
            bands=(),
            events=(),
            cost=None,
            unpruned_seconds=0.0,
            grid=(),
            recommendation=recommend([], obstacles=obstacles, rollouts=0, early_agreement=1.0, taken_away=1.0),
        )
    watcher = LocalTeacher(teacher, top_k=top_k, vocab_size=shared)
    parts, blocks = generate_unpruned(
        student,
        watcher,
        ids,
        pad=tokenizer.pad_token_id,
        ends=ends[0],
        rows_at_once=rows_at_once,
        max_new_tokens=max_new_tokens,
        check_every=check_every,
        temperature=temperature,
        seed=seed,
        on_progress=on_progress,
    )
    together = Rollouts.cat(parts)
    if rollouts_path is not None:
        together.save(rollouts_path)
    checks += check_rollout_ends(together, ends[1])
    cost = StepCost.fit(blocks, per_kept_token=time_update(student, together))
    grid = tuple(try_settings(parts, settings_grid(top_k), cost, check_every=check_every, min_length=min_length))
    bands = position_bands(together, BANDS)
    advice = recommend(
        grid,
        obstacles=[],
        rollouts=len(together),
        early_agreement=early_agreement(together),
        taken_away=probability_taken_away(together),
    )
    shown = [DriftConfig(top_k=top_k)]
    if advice.row is not None:
        shown.append(
            DriftConfig(advice.row.metric, advice.row.top_k, advice.row.threshold, weight_drop=advice.row.weight_drop)
        )
    return PreflightReport(
        **common,
        checks=tuple(checks),
        rollouts=len(together),
        tokens=int(together.lengths.sum()),
        mean_length=float(together.lengths.float().mean()),
        longest=int(together.lengths.max()),
        stop_reasons={reason: together.stop_reason.count(reason) for reason in ("eos", "length")},
        bands=bands,
        events=tuple(summarize_events(together, config, bands) for config in shown),
        cost=cost,
        unpruned_seconds=unpruned_seconds(parts, cost, check_every),
        grid=grid,
        recommendation=advice,
    )


def position_bands(rollouts: Rollouts, bands: int) -> tuple[PositionBand, ...]:
    """Agreement in equal ranges of response positions; ranges that no rollout reaches are left out."""
    assert rollouts.overlap is not None
    overlap, mass, agreed = rollouts.overlap, _mass(rollouts), agreed_tokens(rollouts)
    time_steps = rollouts.response_mask.shape[1]
    width = -(-time_steps // bands)
    found = []
    for first in range(0, time_steps, width):
        inside = rollouts.response_mask[:, first : first + width]
        reached = inside.any(dim=-1)
        if not bool(reached.any()):
            continue
        counts = inside.sum(dim=-1)[reached]
        by_rollout = [
            ((values[:, first : first + width] * inside).sum(dim=-1)[reached] / counts).cpu().numpy()
            for values in (overlap, mass)
        ]
        found.append(
            PositionBand(
                first,
                min(first + width, time_steps) - 1,
                int(reached.sum()),
                *_mean_and_band(by_rollout[0]),
                *_mean_and_band(by_rollout[1]),
                float(agreed[:, first : first + width][inside].float().mean()),
            )
        )
    return tuple(found)


def early_agreement(rollouts: Rollouts) -> float:
    """Shared mass on the first tenth of the positions, in the rollout at the 90th percentile: how well the best ones begin."""
    tenth = max(1, int(rollouts.lengths.max()) // 10)
    inside = rollouts.response_mask[:, :tenth]
    by_rollout = (_mass(rollouts)[:, :tenth] * inside).sum(dim=-1) / inside.sum(dim=-1)
    return float(np.percentile(by_rollout.cpu().numpy(), 90))


def probability_taken_away(rollouts: Rollouts) -> float:
    """Probability of the student's recorded candidates that the teacher does not share, Σ_{v in S_t} max(p_v - q_v, 0): the mean
    over tokens. 0 where the two are the same model, however unsure it is."""
    assert rollouts.student_topk_log_probs is not None
    own = rollouts.student_topk_log_probs.float().exp().sum(dim=-1)
    return float((own - _mass(rollouts))[rollouts.response_mask].mean())


def summarize_events(rollouts: Rollouts, config: DriftConfig, bands: Sequence[PositionBand]) -> EventSummary:
    """Drift events of unpruned rollouts under one setting."""
    events = drift_events(rollouts, config)
    counts = events.sum(dim=-1)
    some = counts > 0
    firsts = events.long().argmax(dim=-1)[some].cpu().numpy()
    so_far = events.long().cumsum(dim=-1)
    cumulative = []
    for band in bands:
        reached = rollouts.response_mask[:, band.first]
        cumulative.append(float(so_far[:, band.last][reached].float().mean()))
    return EventSummary(
        setting=f"{config.metric} of the top {config.top_k} at {config.threshold:g}",
        events_per_rollout=_percentiles(counts.cpu().numpy()),
        first_event=_percentiles(firsts) if len(firsts) else None,
        without_events=float((~some).float().mean()),
        cumulative=tuple(cumulative),
    )


def _loaded(
    model: Any, tokenizer: Any, role: str, device: str, model_kwargs: Mapping[str, Any] | None
) -> tuple[Any, Any]:
    if not isinstance(model, str):
        return model, tokenizer
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, **{"dtype": "auto", **(model_kwargs or {})})
        tokenizer = AutoTokenizer.from_pretrained(model) if tokenizer is None else tokenizer
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the {role} {model!r}: {str(error).strip().splitlines()[0]}") from error
    return (loaded if hasattr(loaded, "hf_device_map") else loaded.to(device)).eval(), tokenizer


def _name(model: Any, role: str) -> str:
    """A model's name as it may be published: a folder of this machine only by its last part, the package's own as "embedded"."""
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name:
        return f"unnamed {role}"
    if Path(name).resolve() == (WEIGHTS / role).resolve():
        return "embedded"
    return Path(name).name if Path(name).is_dir() else name


def _ends(model: Any, tokenizer: Any) -> list[int]:
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = tokenizer.eos_token_id if ids is None else ids
    return [ids] if isinstance(ids, int) else list(ids or [])


def _mass(rollouts: Rollouts) -> Tensor:
    """M_t over all recorded candidates."""
    return agreement("mass", rollouts.teacher_topk_ids.shape[-1], rollouts.positions)


def _mean_and_band(values: np.ndarray) -> tuple[float, float, float]:
    low, high = np.percentile(values, [10, 90])
    return float(values.mean()), float(low), float(high)


def _percentiles(values: np.ndarray) -> tuple[float, float, float]:
    low, middle, high = np.percentile(values, [10, 50, 90])
    return float(low), float(middle), float(high)
