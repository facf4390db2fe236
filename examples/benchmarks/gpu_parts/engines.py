"""Transformers' continuous batching beside the loops, and whether `pruned_generate` chooses the tokens of plain `generate`."""

import copy
from time import perf_counter

import torch
from generation import exponential_lengths
from shared import Deadline
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.utils import WorkloadHints

from gpu_parts.bench import GUESSED_STEP_MS, KEPT_SHARE, Bench, Pair, greedy
from gpu_parts.models import generation_bytes, parameter_count
from prune_opd_hf import pruned_generate

SMALL_CACHE = {"num_blocks": 16, "max_batch_tokens": 64}
"""For continuous batching on a CPU, where it would fill the host's memory; on a device it sizes itself, as for any user."""

COMPARED_TOKENS = 64


def continuous_batching(
    student: PreTrainedModel, prompts: Tensor, lengths: Tensor, section: Deadline
) -> tuple[float, float, list[list[int]], str]:
    """Transformers' continuous batching as `generate_batch` drives it, but with a length for each request.

    Returns:
        Seconds of setting up (its cache, its CUDA graphs), seconds of generating, the tokens of each row, and the attention used.

    Raises:
        TimeoutError: it is still at work when the section's time is over.
        RuntimeError: it gave up.
    """
    config = GenerationConfig(max_new_tokens=int(lengths.max()), do_sample=False, eos_token_id=-1, pad_token_id=0)
    hints = WorkloadHints(
        max_prompt_length=prompts.shape[1], max_generated_length=int(lengths.max()), num_requests=len(prompts)
    )
    tokens: dict[str, list[int]] = {}
    started = perf_counter()
    with student.continuous_batching_context_manager(
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(**({} if prompts.is_cuda else SMALL_CACHE)),
        block=True,
        timeout=30,
        workload_hints=hints,
    ) as manager:
        set_up = perf_counter() - started
        attention = student.config._attn_implementation
        for row, (ids, length) in enumerate(zip(prompts.tolist(), lengths.tolist(), strict=True)):
            manager.add_request(ids, request_id=str(row), max_new_tokens=length)
        while len(tokens) < len(prompts):
            output = manager.get_result(timeout=1)
            if output is not None and output.is_finished():
                if output.error is not None:
                    raise RuntimeError(f"continuous batching failed on a request: {output.error}")
                tokens[output.request_id] = list(output.generated_tokens)
            elif output is None and not manager.is_running():
                raise RuntimeError("continuous batching stopped by itself; the log of transformers says why")
            if section.left < 0:
                raise TimeoutError(f"continuous batching was cut off with {len(prompts) - len(tokens)} requests to go")
        generating = perf_counter() - started - set_up
    return set_up, generating, [tokens[str(row)] for row in range(len(prompts))], attention


def other_engine(bench: Bench, pair: Pair, seconds: float) -> None:
    """Tokens a second of continuous batching, with equal lengths and with those of 75% drifted; plain generation stands beside."""
    section, step = Deadline(seconds), bench.step_ms.get((pair.student, pair.rows), GUESSED_STEP_MS) / 1e3
    case = f"{pair.student}, {pair.rows} rows, {pair.prompt} + {pair.new} tokens"
    bench.keep_only(pair.student)
    student, shape = bench.model(pair.student), bench.shapes[pair.student]
    needed = generation_bytes(shape, pair.rows, pair.prompt, pair.prompt + pair.new, bench.dtype.itemsize)
    if not bench.fits(f"continuous batching, {case}", needed):
        return
    prompts = bench.prompts(pair.student, pair.rows, pair.prompt)
    drawn, compared = exponential_lengths(pair.rows, pair.new, KEPT_SHARE), min(COMPARED_TOKENS, pair.new)
    plain = greedy(student, prompts, compared)[:, pair.prompt :].tolist()
    for name, lengths in (("0% drifted", torch.full_like(drawn, pair.new)), ("75% drifted (requests end)", drawn)):
        if not bench.in_time(f"continuous batching, {case}, {name}", 1.3 * pair.new * step, section):
            continue
        bench.free()
        set_up, generating, tokens, attention = continuous_batching(student, prompts, lengths, section)
        pairs = zip(tokens, plain, strict=True)
        row = {
            "case": case,
            "way": name,
            "seconds": generating,
            "set-up seconds": set_up,
            "tokens": sum(len(row) for row in tokens),
            "tokens/s": sum(len(row) for row in tokens) / generating,
            "attention": attention,
            f"rows that begin as plain generate's ({compared} tokens)": sum(
                mine[:compared] == theirs[: len(mine)] for mine, theirs in pairs
            ),
        }
        bench.report.add("Continuous batching (generate_batch's engine)", row)
    bench.free()


def same_tokens(bench: Bench, pair: Pair, seconds: float) -> None:
    """Greedy tokens of `pruned_generate` and plain `generate`: in this benchmark's dtype, and in float32."""
    section = Deadline(seconds)
    step = bench.step_ms.get((pair.student, pair.rows), GUESSED_STEP_MS) / 1e3
    for dtype in (bench.dtype, torch.float32):
        name = str(dtype).removeprefix("torch.")
        if not bench.in_time(f"greedy tokens in {name}", 3 * pair.new * step, section):
            continue
        needed = parameter_count(bench.shapes[pair.student]) * dtype.itemsize if dtype != bench.dtype else 0
        if not bench.fits(f"greedy tokens in {name}", needed):
            continue
        student = bench.model(pair.student)
        student = student if dtype == bench.dtype else copy.deepcopy(student).to(dtype)
        prompts = bench.prompts(pair.student, pair.rows, pair.prompt)
        plain = greedy(student, prompts, pair.new)
        pruned = greedy(student, prompts, pair.new, custom_generate=pruned_generate)
        differs = (plain != pruned).any(dim=1)
        same = int((~differs).sum())
        gap = None if same == pair.rows else largest_gap(student, plain, pruned)
        row = {"student": pair.student, "dtype": name, "rows": pair.rows, "new tokens": pair.new, "equal rows": same}
        bench.report.add("Greedy tokens of pruned_generate and plain generate", {**row, "largest gap of logits": gap})
        text = f"{same} of {pair.rows} rows"
        bench.judge("greedy tokens are identical", f"{pair.student}, {name}", text, same == pair.rows)


def largest_gap(student: PreTrainedModel, plain: Tensor, pruned: Tensor, rows: int = 4) -> float:
    """Where rows first differ: how far apart one full pass puts the logits of the two tokens. Rounding, or another result?"""
    gaps = []
    for row in (plain != pruned).any(dim=1).nonzero().squeeze(-1)[:rows].tolist():
        place = int((plain[row] != pruned[row]).nonzero()[0])
        with torch.inference_mode():
            logits = student(plain[row : row + 1, :place], use_cache=False).logits[0, -1].float()
        gaps.append(abs(float(logits[plain[row, place]] - logits[pruned[row, place]])))
    return max(gaps)
