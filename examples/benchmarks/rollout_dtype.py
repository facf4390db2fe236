"""Sampling with float32 weights against sampling with a bfloat16 copy of them, the copying counted in.

    python examples/benchmarks/rollout_dtype.py            # CPU, one thread, some minutes
    python examples/benchmarks/rollout_dtype.py --tiny     # seconds, only to see that it runs

Qwen3-shaped students with random weights answer in the loop, without a watch. CPU seconds, medians over turns; the ways alternate.
"""

import argparse
import statistics
import time

import torch
from generation import model

from prune_opd_hf.generation import Request, Sampling, make_engine

SIZES = (((256, 4), 32_768), ((1024, 8), 8_192))
TINY = (((64, 2), 256),)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=24)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| hidden, layers; vocabulary | float32, CPU seconds | bfloat16 | ratio | of single turns |\n|---|---|---|---|---|"
    )
    for student, vocabulary in TINY if arguments.tiny else SIZES:
        weights = model(student, vocabulary, 0)
        requests = [Request((3, 4, 5, 6 + row), row) for row in range(arguments.rows)]
        sampling = Sampling(arguments.new_tokens, (), 0)
        engines = {
            dtype: make_engine("loop", weights, sampling, slots=arguments.rows, dtype=dtype)
            for dtype in (None, "bfloat16")
        }
        seconds: dict[str | None, list[float]] = {dtype: [] for dtype in engines}
        for turn in range(arguments.turns + 1):
            for dtype, engine in engines.items():
                started = time.process_time()
                engine.update_weights(weights, turn)
                for _ in engine.generate(requests):
                    pass
                if turn:  # the first one warms up
                    seconds[dtype].append(time.process_time() - started)
        plain, shorter = seconds.values()
        ratios = [b / a for a, b in zip(plain, shorter, strict=True)]
        print(
            f"| {student}; {vocabulary:,} | {statistics.median(plain):.2f} | {statistics.median(shorter):.2f} "
            f"| {statistics.median(shorter) / statistics.median(plain):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
