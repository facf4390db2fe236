"""Generation with the drift monitor against plain `generate`: ratios of medians of interleaved runs, with the floor beside them.

    python examples/benchmarks/generation.py                       # CPU, one thread, a few minutes
    python examples/benchmarks/generation.py --tiny                # a few seconds, only to see that it runs

Random weights: nothing here depends on what is generated, only on how much. Absolute times are printed to judge the machine by,
not to be quoted.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, StoppingCriteria

from prune_opd_hf import DriftConfig, DriftMonitor, Teacher, pruned_generate

NEVER_DRIFT = DriftConfig(top_k=16, threshold=0.01, weight_drop=0.0)


@dataclass(frozen=True)
class Sizes:
    """Shapes of one run of the benchmark."""

    student: tuple[int, int]  # hidden size, layers
    teacher: tuple[int, int]
    vocabulary: int
    prompt: int
    new_tokens: int
    repeats: int


SIZES = Sizes((256, 6), (512, 8), 8192, 32, 256, 3)
TINY = Sizes((32, 2), (64, 2), 256, 8, 32, 2)


def model(shape: tuple[int, int], vocabulary: int, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3-shaped model with random weights and no EOS token."""
    hidden, layers = shape
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 128),
        head_dim=64 if hidden >= 64 else hidden,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval()


class StopAtLengths(StoppingCriteria):
    """Ends each row at a length drawn beforehand: a stand-in for drift of a known amount."""

    eos_token_id = 0  # its presence makes `generate` pad finished rows

    def __init__(self, lengths: torch.Tensor, prompt: int) -> None:
        self.lengths, self.prompt = lengths, prompt

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return self.lengths <= input_ids.shape[1] - self.prompt


def interleaved(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each way, taken in turn so that a slow moment of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def monitored(
    student: Qwen3ForCausalLM, teacher: Teacher, prompts: torch.Tensor, new_tokens: int, every: int, loop: bool
) -> None:
    """One watched generation, finished."""
    monitor = DriftMonitor(teacher, NEVER_DRIFT, check_every=every, pad_token_id=0, eos_token_id=[])
    arguments = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    if loop:
        sequences = student.generate(prompts, **arguments, custom_generate=pruned_generate, drift_monitor=monitor)
    else:
        sequences = student.generate(
            prompts,
            **arguments,
            logits_processor=[monitor.logits_processor],
            stopping_criteria=[monitor.stopping_criterion],
        )
    monitor.finish(sequences)


def watching(sizes: Sizes, student: Qwen3ForCausalLM, teacher_model: Qwen3ForCausalLM) -> dict[str, float]:
    """a. Batch 8, nothing drifts: what watching costs, against generation plus one teacher pass over the finished sequences."""
    prompts = torch.randint(1, sizes.vocabulary, (8, sizes.prompt))
    teacher = Teacher(teacher_model)
    plain = {"max_new_tokens": sizes.new_tokens, "do_sample": False}
    whole = student.generate(prompts, **plain)

    def teacher_pass() -> None:
        with torch.no_grad():
            teacher_model(whole, use_cache=False)

    ways: dict[str, Callable[[], object]] = {
        "plain generate": lambda: student.generate(prompts, **plain),
        "one teacher pass": teacher_pass,
    }
    for every in (1, 8, 32, 128):
        ways[f"pair, check_every {every}"] = lambda every=every: monitored(
            student, teacher, prompts, sizes.new_tokens, every, loop=False
        )
        ways[f"loop, check_every {every}"] = lambda every=every: monitored(
            student, teacher, prompts, sizes.new_tokens, every, loop=True
        )
    return interleaved(ways, sizes.repeats)


def dropping(sizes: Sizes, student: Qwen3ForCausalLM) -> tuple[dict[str, float], float]:
    """b. Batch 32, stops drawn from an exponential: unpruned, the criterion in plain generate, and the loop that drops rows."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, sizes.vocabulary, (32, sizes.prompt), generator=generator)
    draws = -torch.rand(32, generator=generator).log() * 0.22 * sizes.new_tokens
    lengths = draws.round().clamp(1, sizes.new_tokens).long()
    kept = float(lengths.float().mean() / sizes.new_tokens)
    plain = {"max_new_tokens": sizes.new_tokens, "do_sample": False}
    ways = {
        "unpruned generate": lambda: student.generate(prompts, **plain),
        "criterion in generate": lambda: student.generate(
            prompts, **plain, stopping_criteria=[StopAtLengths(lengths, sizes.prompt)]
        ),
        "pruned_generate": lambda: student.generate(
            prompts, **plain, stopping_criteria=[StopAtLengths(lengths, sizes.prompt)], custom_generate=pruned_generate
        ),
        "pruned_generate, nothing dropped": lambda: student.generate(prompts, **plain, custom_generate=pruned_generate),
    }
    return interleaved(ways, sizes.repeats), kept


def scoring_memory(vocabulary: int, rows: int, block: int) -> tuple[float, float]:
    """d. Megabytes of logits held at once: the teacher's slices against the logits of the whole block."""
    slices = Teacher(model((64, 1), vocabulary, 0)).max_logit_elements
    return min(slices, rows * block * vocabulary) * 4 / 2**20, rows * block * vocabulary * 4 / 2**20


def parameters_bytes(network: torch.nn.Module) -> int:
    """Bytes of weights that one decoding step must read."""
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())


def copy_bandwidth() -> float:
    """Bytes a second that this machine reads and writes in a large copy."""
    source = torch.empty(2**26)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - started)
    return 2 * source.numel() * 4 / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default=None, help="write the figures as JSON too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = TINY if arguments.tiny else SIZES
    student, teacher = model(sizes.student, sizes.vocabulary, 1), model(sizes.teacher, sizes.vocabulary, 2)
    print(f"student {sizes.student}, teacher {sizes.teacher} (hidden size, layers), vocabulary {sizes.vocabulary}")
    print(f"prompt {sizes.prompt}, {sizes.new_tokens} new tokens, {arguments.threads} thread(s)")
    print(f"medians of {sizes.repeats} interleaved runs\n")

    watch = watching(sizes, student, teacher)
    floor = watch["plain generate"] + watch["one teacher pass"]
    print(f"a. batch 8, nothing drifts; floor = plain generate + one teacher pass = {floor:.2f} s")
    ratios = {name: seconds / floor for name, seconds in watch.items() if "check_every" in name}
    for name, value in ratios.items():
        print(f"   {name:<24} {value:5.2f} of the floor")

    drop, kept = dropping(sizes, student)
    print(f"\nb. batch 32, {kept:.0%} of the tokens kept (floor: the kept share, {kept:.2f})")
    whole = drop["unpruned generate"]
    for name in ("criterion in generate", "pruned_generate"):
        print(f"   {name:<24} {drop[name] / whole:5.2f} of unpruned generate")
    print(f"c. nothing dropped:        {drop['pruned_generate, nothing dropped'] / whole:5.2f} of generate")
    weights = parameters_bytes(student) / copy_bandwidth()
    print(
        f"   floor of a step by bytes: weights {parameters_bytes(student) / 2**20:.0f} MiB at this machine's copy bandwidth, "
        f"{weights / (whole / sizes.new_tokens):.2f} of a step of generate at batch 32"
    )

    sliced, dense = scoring_memory(151_936, 256, 32)
    print(
        f"\nd. logits held while scoring 256 x 32 tokens at vocabulary 151,936: {sliced:,.0f} MiB against {dense:,.0f} MiB"
    )
    if arguments.output:
        figures = {"a": ratios, "b": {n: s / whole for n, s in drop.items()}, "kept": kept, "d_mib": [sliced, dense]}
        Path(arguments.output).write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
