"""Generation with the drift monitor against plain `generate`: ratios of medians of interleaved runs, with the floor beside them.

    python examples/benchmarks/generation.py                       # CPU, one thread, a few minutes
    python examples/benchmarks/generation.py --only b c            # some of its parts
    python examples/benchmarks/generation.py --tiny                # a few seconds, only to see that it runs

Random weights: nothing here depends on what is generated, only on how much. Absolute times are printed to judge the machine by,
not to be quoted.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM, StoppingCriteria

from prune_opd_hf import DriftConfig, DriftMonitor, Teacher, pruned_generate
from prune_opd_hf.models.kv_cache import use_growing_layers_inplace
from prune_opd_hf.teachers.local import MAX_LOGIT_ELEMENTS

NEVER_DRIFT = DriftConfig("overlap", top_k=16, threshold=0.01, weight_drop=0.0)


@dataclass(frozen=True)
class Sizes:
    """Shapes of one run of the benchmark."""

    student: tuple[int, int]  # hidden size, layers
    teacher: tuple[int, int]
    vocabulary: int
    prompt: int
    new_tokens: int
    repeats: int


ROWS, KEPT_SHARE = 32, 0.22  # of parts b and c
BIG_VOCABULARY, BIG_ROWS, BIG_BLOCK = 151_936, 256, 32  # of part d

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


def exponential_lengths(rows: int, longest: int, kept: float) -> torch.Tensor:
    """Stops at the quantiles of an exponential, cut at `longest`, whose scale is such that a share `kept` of the tokens stays."""
    quantiles = -torch.log1p(-(torch.arange(rows) + 0.5) / rows)
    low, high = 0.0, float(longest)
    for _ in range(60):
        scale = (low + high) / 2
        lengths = (quantiles * scale).round().clamp(1, longest)
        low, high = (scale, high) if lengths.mean() < kept * longest else (low, scale)
    return lengths.long()[torch.randperm(rows, generator=torch.Generator().manual_seed(0))]


def dropping(sizes: Sizes, student: Qwen3ForCausalLM) -> tuple[dict[str, float], torch.Tensor]:
    """b, c. Batch 32, stops from an exponential: unpruned, the criterion in plain generate, and the loop that drops rows."""
    prompts = torch.randint(1, sizes.vocabulary, (ROWS, sizes.prompt), generator=torch.Generator().manual_seed(0))
    lengths = exponential_lengths(ROWS, sizes.new_tokens, KEPT_SHARE)
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
    return interleaved(ways, 2 * sizes.repeats + 1), lengths  # short runs, so more of them


def step_milliseconds(sizes: Sizes, student: Qwen3ForCausalLM) -> dict[int, float]:
    """Median of one bare forward pass of the student by rows, half of the new tokens in its cache: the floor of a loop that
    drops rows is their sum over the rows that live."""
    milliseconds = {}
    for rows in (1, 2, 4, 8, 16, ROWS):
        cache = DynamicCache(config=student.config)
        use_growing_layers_inplace(cache)
        length = sizes.prompt + sizes.new_tokens // 2
        with torch.inference_mode():
            student(torch.randint(1, sizes.vocabulary, (rows, length)), past_key_values=cache, use_cache=True)
            seconds = []
            for _ in range(24):
                token = torch.randint(1, sizes.vocabulary, (rows, 1))
                started = time.perf_counter()
                student(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                seconds.append(time.perf_counter() - started)
        milliseconds[rows] = 1e3 * statistics.median(seconds)
    return milliseconds


def interpolated(milliseconds: dict[int, float], rows: int) -> float:
    """Milliseconds of a step with any number of rows, linear between those measured."""
    known = sorted(milliseconds)
    above = next(count for count in known if count >= rows)
    below = max((count for count in known if count <= rows), default=above)
    share = 0.0 if above == below else (rows - below) / (above - below)
    return milliseconds[below] * (1 - share) + milliseconds[above] * share


def scoring_memory(way: str, tiny: bool) -> float:
    """d. MiB by which this process grows at its peak while one block is scored, by the teacher's slices or all logits at once."""
    vocabulary, rows, block = (4096, 32, 8) if tiny else (BIG_VOCABULARY, BIG_ROWS, BIG_BLOCK)
    network = model((64, 1), vocabulary, 0)
    prompts = torch.randint(1, vocabulary, (rows, 2))
    tokens = torch.randint(1, vocabulary, (rows, block))
    candidates = torch.randint(1, vocabulary, (rows, block, 16))
    teacher = Teacher(network, top_k=16)
    teacher.start(prompts)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        if way == "slices":
            teacher.score(tokens, candidates)
        else:
            logits = network(torch.cat([prompts, tokens], dim=1)).logits[:, 1:-1].float()
            log_probs = logits.log_softmax(dim=-1)
            log_probs.topk(16, dim=-1)
            log_probs.gather(-1, candidates)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def measured_memory(way: str, tiny: bool) -> float:
    """The same in a process of its own, whose peak nothing else has raised before."""
    command = [sys.executable, __file__, "--memory-of", way, *(["--tiny"] if tiny else [])]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


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
    parser.add_argument("--only", nargs="+", choices=["a", "b", "c", "d"], default=["a", "b", "c", "d"])
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument(
        "--output", default=None, help="write the figures as JSON too; parts that are there already stay"
    )
    parser.add_argument("--memory-of", choices=["slices", "all logits"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(scoring_memory(arguments.memory_of, arguments.tiny))
        return
    sizes = TINY if arguments.tiny else SIZES
    if arguments.repeats is not None:
        sizes = replace(sizes, repeats=arguments.repeats)
    student, teacher = model(sizes.student, sizes.vocabulary, 1), model(sizes.teacher, sizes.vocabulary, 2)
    print(f"student {sizes.student}, teacher {sizes.teacher} (hidden size, layers), vocabulary {sizes.vocabulary}")
    print(f"prompt {sizes.prompt}, {sizes.new_tokens} new tokens, {arguments.threads} thread(s)")
    print(f"medians of {sizes.repeats} interleaved runs, in b and c of {2 * sizes.repeats + 1}")
    figures: dict[str, object] = {}
    if "a" in arguments.only:
        figures["a"] = report_watching(watching(sizes, student, teacher))
    if "b" in arguments.only or "c" in arguments.only:
        figures["b, c"] = report_dropping(sizes, student)
    if "d" in arguments.only:
        figures["d"] = report_memory(arguments.tiny)
    if arguments.output:
        path = Path(arguments.output)
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**earlier, **figures}, indent=1) + "\n", encoding="utf-8")


def report_watching(seconds: dict[str, float]) -> dict[str, float]:
    """Print part a."""
    floor = seconds["plain generate"] + seconds["one teacher pass"]
    ratios = {name: value / floor for name, value in seconds.items() if "check_every" in name}
    print(f"\na. batch 8, nothing drifts; floor = plain generate + one teacher pass = {floor:.2f} s")
    for name, value in ratios.items():
        print(f"   {name:<24} {value:5.2f} of the floor")
    return ratios


def report_dropping(sizes: Sizes, student: Qwen3ForCausalLM) -> dict[str, float]:
    """Print parts b and c, with the floors: the kept share, and the bare forward passes of the rows that live."""
    seconds, lengths = dropping(sizes, student)
    steps = step_milliseconds(sizes, student)
    whole = seconds["unpruned generate"]
    living = [int((lengths > step).sum()) for step in range(int(lengths.max()))]
    passes = sum(interpolated(steps, rows) for rows in living) / 1e3
    read = parameters_bytes(student) / copy_bandwidth() * 1e3
    ratios = {name: value / whole for name, value in seconds.items() if name != "unpruned generate"}
    kept = float(lengths.float().mean() / sizes.new_tokens)
    print(
        f"\nb. batch {ROWS}, {kept:.0%} of the tokens kept, the longest row {int(lengths.max())} of {sizes.new_tokens}"
    )
    for name in ("criterion in generate", "pruned_generate"):
        print(f"   {name:<28} {ratios[name]:5.2f} of unpruned generate")
    print(f"   floor: tokens kept           {kept:5.2f}")
    print(
        f"   floor: bare forward passes   {passes / whole:5.2f} (the model called for the rows that live, nothing else)"
    )
    shown = ", ".join(f"{rows}: {value:.1f}" for rows, value in steps.items())
    print(f"   ms of a bare pass by rows    {shown}")
    print(
        f"   ms to read the weights       {read:.1f} ({parameters_bytes(student) / 2**20:.0f} MiB at the copy bandwidth)"
    )
    print(f"c. nothing dropped             {ratios['pruned_generate, nothing dropped']:5.2f} of generate")
    return {**ratios, "kept": kept, "floor, bare passes": passes / whole}


def report_memory(tiny: bool) -> dict[str, float]:
    """Print part d."""
    mebibytes = {way: measured_memory(way, tiny) for way in ("slices", "all logits")}
    print(
        "\nd. peak memory of scoring one block of 256 x 32 tokens at vocabulary 151,936, beyond the models (own processes)"
    )
    for way, value in mebibytes.items():
        print(f"   {way:<12} {value:8,.0f} MiB")
    print(f"   floor: the slices of {MAX_LOGIT_ELEMENTS * 4 / 2**20:,.0f} MiB in float32")
    return mebibytes


if __name__ == "__main__":
    main()
