"""The update of a step whose responses differ in length: micro-batches of rows, padded, against micro-batches of tokens, packed.

    python examples/benchmarks/packing.py            # CPU, one thread, about ten minutes
    python examples/benchmarks/packing.py --tiny     # half a minute, only to see that it runs

Lengths are log-normal with spread 1.0, as they are after pruning. Rows of like length go together where rows are counted, as the
trainer has them, and in the order they come, as other trainers have them. Both ways make the same number of passes. Beside it
stands the floor: the same tokens in rows of one length, which need no padding. Peak memory is that of a process of its own, above
what it held before the update.

Then whole training steps against TRL's DistillationTrainer on responses that end by themselves at such lengths: a student that
counts down from the last word of its prompt.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from evaluation_throughput import Sizes as CountingSizes
from evaluation_throughput import counting_model, word_tokenizer
from training_step import StepTimes, model, tokenizer

from prune_opd_hf import DriftConfig, PruneOPDConfig, PruneOPDTrainer
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.training.micro_batches import rows_by_tokens

PROMPT_TOKENS, TOP_K = 24, 16


@dataclass(frozen=True)
class Sizes:
    """Sizes of one run.

    Attributes:
        student: hidden, intermediate, layers.
        vocabulary: of both models.
        rows: responses of a step.
        passes: micro-batches of a step.
        median: response length.
        longest: cap on it.
    """

    student: tuple[int, int, int] = (256, 768, 4)
    vocabulary: int = 32_768
    rows: int = 64
    passes: int = 4
    median: int = 64
    longest: int = 1024


TINY = Sizes((64, 192, 2), 512, 16, 2, 12, 96)


def lengths(sizes: Sizes) -> list[int]:
    """Log-normal with spread 1.0: the standard deviation of the logarithm."""
    drawn = np.random.default_rng(0).lognormal(np.log(sizes.median), 1.0, sizes.rows)
    return np.clip(np.round(drawn), 1, sizes.longest).astype(int).tolist()


def rollouts_of(responses: list[int], sizes: Sizes) -> Rollouts:
    """Random tokens and candidates."""
    generator = torch.Generator().manual_seed(1)
    rows, width = len(responses), max(responses)
    mask = torch.arange(width) < torch.tensor(responses).unsqueeze(-1)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(3, sizes.vocabulary, shape, generator=generator)

    scores = {
        name: torch.full((rows, width, TOP_K), -3.0)
        for name in ("teacher_topk_log_probs", "student_topk_log_probs", "teacher_log_probs")
    }
    return Rollouts(
        prompt_ids=ids(rows, PROMPT_TOKENS),
        prompt_mask=torch.ones(rows, PROMPT_TOKENS, dtype=torch.bool),
        response_ids=ids(rows, width) * mask,
        response_mask=mask,
        teacher_token_log_probs=torch.full((rows, width), -2.0),
        token_log_probs=torch.full((rows, width), -2.0),
        overlap=torch.ones(rows, width),
        teacher_topk_ids=ids(rows, width, TOP_K),
        student_topk_ids=ids(rows, width, TOP_K),
        drift_events=mask & False,
        reliability=mask.float(),
        stop_reason=("length",) * rows,
        config=DriftConfig("overlap", top_k=TOP_K),
        **scores,
    )


def ways(sizes: Sizes, folder: str) -> dict[str, Callable[[], None]]:
    """Forward and backward passes over the same tokens."""
    student = model(sizes.student, sizes.vocabulary, 1)

    def trainer(limit: int | None) -> PruneOPDTrainer:
        args = PruneOPDConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            num_generations=1,
            max_completion_length=sizes.longest,
            max_tokens_per_micro_batch=limit,
            pruning="none",
            max_steps=1,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        one = Dataset.from_list([{"prompt": "w3"}] * 64)
        teacher = model((16, 16, 1), sizes.vocabulary, 2)
        return PruneOPDTrainer(student, teacher, args, one, processing_class=tokenizer(sizes.vocabulary))

    responses = lengths(sizes)
    whole = rollouts_of(responses, sizes)
    totals = [length + PROMPT_TOKENS for length in responses]
    packed = rows_by_tokens(totals, 10**9, packed=True, least=sizes.passes)
    ordered = sorted(range(sizes.rows), key=lambda row: -totals[row])
    each = sizes.rows // sizes.passes
    even = rollouts_of([sum(responses) // sizes.rows] * sizes.rows, sizes)
    objectives = {limit: trainer(limit).objective for limit in (None, 10**9)}
    assert objectives[10**9].packs
    student.train()

    def update(rollouts: Rollouts, parts: list[list[int]], limit: int | None) -> Callable[[], None]:
        batches = [rollouts.select(torch.tensor(rows)) for rows in parts]
        count = rollouts.response_mask.sum().float()

        def passes() -> None:
            student.zero_grad()
            for batch in batches:
                objectives[limit](student, batch, count).loss.backward()

        return passes

    slices = [slice(first, first + each) for first in range(0, sizes.rows, each)]
    return {
        "packed": update(whole, packed, 10**9),
        "padded, like lengths together": update(whole, [ordered[part] for part in slices], None),
        "padded, as they come": update(whole, [list(range(sizes.rows))[part] for part in slices], None),
        "floor: equal lengths": update(even, [list(range(sizes.rows))[part] for part in slices], None),
    }


def seconds(sizes: Sizes, turns: int) -> dict[str, float]:
    """Medians of interleaved runs, in CPU seconds of the one thread."""
    with tempfile.TemporaryDirectory() as folder:
        every = ways(sizes, folder)
        times: dict[str, list[float]] = {name: [] for name in every}
        for turn in range(turns + 1):
            for name, way in every.items():
                started = time.process_time()
                way()
                if turn:  # the first one warms up
                    times[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(name: str, sizes: Sizes) -> int:
    """Peak memory of a process that makes one update, above what it held before; gradients are held in both."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_peak, args=(sender, name, sizes))
    process.start()
    peak = receiver.recv()
    process.join()
    assert peak > 0
    return peak


def _send_peak(sender: Any, name: str, sizes: Sizes) -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        every = ways(sizes, folder)
        tiny = ways(TINY, folder)
        tiny[name]()  # code is loaded, gradients are not there yet
        before = peak_so_far()
        every[name]()
        sender.send(peak_so_far() - before)


def peak_so_far() -> int:
    """Peak bytes of this process; what getrusage says begins with the peak of the process that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def against_trl(sizes: Sizes, turns: int, steps: int) -> dict[str, float]:
    """Seconds of whole training steps, in turns."""
    from trl import DistillationConfig, DistillationTrainer

    counting = CountingSizes(
        sizes.student[0], sizes.student[2], sizes.vocabulary, (8, 24), 0, min(sizes.longest - 64, sizes.vocabulary - 1)
    )
    rng = np.random.default_rng(2)
    prompts = [
        {"prompt": " ".join(map(str, [*rng.integers(1, sizes.vocabulary, 12), length]))} for length in lengths(sizes)
    ]
    common = {
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-9,
        "max_steps": steps,
        "per_device_train_batch_size": sizes.rows // sizes.passes,
        "gradient_accumulation_steps": sizes.passes,
        "max_completion_length": counting.limit,
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }

    def pair() -> dict[str, Any]:
        student = counting_model(counting)
        (hook,) = student._forward_hooks.values()
        student._forward_hooks.clear()
        student.register_forward_hook(
            lambda *seen: None if torch.is_grad_enabled() else hook(*seen),
            with_kwargs=True,  # TRL samples in training mode
        )
        return {
            "model": student,
            "teacher_model": model((2 * sizes.student[0], 2 * sizes.student[1], sizes.student[2]), sizes.vocabulary, 2),
            "train_dataset": Dataset.from_list(prompts),
            "processing_class": word_tokenizer(sizes.vocabulary),
        }

    with tempfile.TemporaryDirectory() as folder:
        prune = {"num_generations": 1, "pruning": "none"}
        budget = sum(length + 13 for length in lengths(sizes)) // sizes.passes + sizes.longest // 8
        every = {
            "TRL": DistillationTrainer(args=DistillationConfig(output_dir=folder, **common), **pair()),
            "ours, rows": PruneOPDTrainer(args=PruneOPDConfig(output_dir=folder, **common, **prune), **pair()),
            "ours, tokens": PruneOPDTrainer(
                args=PruneOPDConfig(output_dir=folder, **common, **prune, max_tokens_per_micro_batch=budget), **pair()
            ),
        }
        clocks = {name: StepTimes() for name in every}
        for name, trainer in every.items():
            trainer.add_callback(clocks[name])
        for _ in range(turns):
            for trainer in every.values():
                trainer.train()
    return {name: statistics.median(clock.seconds) for name, clock in clocks.items()}


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--passes", type=int, help="micro-batches of a step")
    parser.add_argument("--skip_trl", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    sizes = TINY if arguments.tiny else Sizes()
    if arguments.passes is not None:
        sizes = replace(sizes, passes=arguments.passes)
    responses = lengths(sizes)
    print(
        f"{sizes.rows} responses, {sum(responses)} tokens, longest {max(responses)}, {sizes.passes} passes", flush=True
    )
    result: dict[str, Any] = {"sizes": asdict(sizes), "update": {}, "memory": {}, "step": {}}
    spent = seconds(sizes, arguments.turns)
    for name, value in spent.items():
        result["update"][name] = spent["packed"] / value
        print(f"update, packed / {name}: {spent['packed'] / value:.2f}", flush=True)
    peaks = {name: peak_bytes(name, sizes) for name in spent}
    for name, value in peaks.items():
        result["memory"][name] = peaks["packed"] / value
        print(f"peak memory, packed / {name}: {peaks['packed'] / value:.2f} ({value / 2**20:.0f} MiB)", flush=True)
    if not arguments.skip_trl:
        steps = against_trl(sizes, max(1, arguments.turns // 2), 3)
        for name, value in steps.items():
            result["step"][name] = value / steps["TRL"]
            print(f"step, {name} / TRL: {value / steps['TRL']:.2f}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
