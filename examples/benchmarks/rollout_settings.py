"""Sampling in the loop as it stands, with a bfloat16 copy of the weights (the copying counted in), and with a compiled step.

    python examples/benchmarks/rollout_settings.py            # CPU, one thread, some minutes
    python examples/benchmarks/rollout_settings.py --tiny     # seconds, only to see that it runs

Qwen3-shaped students with random weights answer in the loop, without a watch. CPU seconds, medians over turns; the ways alternate.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from generation import model

from prune_opd_hf.generation import Request, Sampling, make_engine

WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("float32", {}),
    ("bfloat16", {"dtype": "bfloat16"}),
    ("compiled", {"compile_decoding": True}),
    ("both", {"dtype": "bfloat16", "compile_decoding": True}),
)
SIZES = (((64, 2), 512), ((256, 4), 32_768), ((1024, 8), 8_192))
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
    print("| hidden, layers; vocabulary | float32, CPU seconds | " + " | ".join(name for name, _ in WAYS[1:]) + " |")
    print("|---" * (len(WAYS) + 1) + "|")
    for student, vocabulary in TINY if arguments.tiny else SIZES:
        weights = model(student, vocabulary, 0)
        requests = [Request((3, 4, 5, 6 + row), row) for row in range(arguments.rows)]
        sampling = Sampling(arguments.new_tokens, (), 0)
        engines = {name: make_engine("loop", weights, sampling, slots=arguments.rows, **how) for name, how in WAYS}
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(arguments.turns + 1):
            for name, engine in engines.items():
                started = time.process_time()
                engine.update_weights(weights, turn)
                for _ in engine.generate(requests):
                    pass
                if turn:  # the first one warms up, and compiles
                    seconds[name].append(time.process_time() - started)
        plain, *others = seconds.values()
        cells = [f"{statistics.median(plain):.2f}"]
        for other in others:
            ratios = [b / a for a, b in zip(plain, other, strict=True)]
            median = statistics.median(other) / statistics.median(plain)
            cells.append(f"{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        print(f"| {student}; {vocabulary:,} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
