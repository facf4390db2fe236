"""Does a preflight's projected time come true? Projected against measured shares of the unpruned time, on the embedded pair.

    python examples/benchmarks/preflight_projection.py --repeats 2

Generation with the teacher alone, in CPU seconds of this process: 128 rollouts in two batches, the same random state for each.
"""

import argparse
import time

import torch

from prune_opd_hf import DriftConfig, DriftMonitor, Teacher, pruned_generate
from prune_opd_hf.generation import Sampling
from prune_opd_hf.preflight.settings_grid import try_settings
from prune_opd_hf.preflight.step_cost import StepCost, generate_unpruned
from prune_opd_hf.tasks import ChainTask, load_student, load_teacher, load_tokenizer

ROLLOUTS, BATCH, CAP, CHECK_EVERY = 128, 64, 112, 8
WEIGHT_DROPS = (0.5, 0.1, 0.02)


def measured_seconds(student, teacher, tokenizer, ids, config: DriftConfig, truncate: bool) -> float:
    """CPU seconds of generating all rollouts under one setting."""
    watcher = Teacher(teacher, top_k=16)
    torch.manual_seed(0)
    started = time.process_time()
    for first in range(0, ROLLOUTS, BATCH):
        batch = tokenizer.pad({"input_ids": ids[first : first + BATCH]}, return_tensors="pt")
        monitor = DriftMonitor(watcher, config, check_every=CHECK_EVERY, truncate=truncate)
        sequences = student.generate(
            **batch, max_new_tokens=CAP, do_sample=True, top_k=0, custom_generate=pruned_generate, drift_monitor=monitor
        )
        monitor.finish(sequences)
    return time.process_time() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    student, teacher, tokenizer = load_student(), load_teacher(), load_tokenizer()
    ids = [tokenizer(problem.prompt).input_ids for problem in ChainTask().problems(ROLLOUTS, seed=0)]
    sampling = Sampling(CAP, (tokenizer.eos_token_id,), tokenizer.pad_token_id)
    settings = {"batch_size": BATCH, "check_every": CHECK_EVERY}
    for _ in range(2):  # the first pass warms up
        rollouts, blocks = generate_unpruned(student, Teacher(teacher, top_k=16), ids, sampling, seed=0, **settings)
    configs = [DriftConfig("overlap", 2, 0.5, drop) for drop in WEIGHT_DROPS]
    rows = list(try_settings(rollouts, configs, StepCost.fit(blocks), **settings))
    measured: list[list[float]] = [[] for _ in configs]
    for _ in range(arguments.repeats):
        whole = measured_seconds(student, teacher, tokenizer, ids, configs[0], truncate=False)
        for config, shares in zip(configs, measured, strict=True):
            shares.append(measured_seconds(student, teacher, tokenizer, ids, config, truncate=True) / whole)
    print("| drop | projected | measured |\n|---|---|---|")
    for config, row, shares in zip(configs, rows, measured, strict=True):
        print(f"| {config.weight_drop:g} | {row.step_share:.2f} | {', '.join(f'{share:.2f}' for share in shares)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
