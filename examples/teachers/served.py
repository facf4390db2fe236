"""Does a student learn from a served teacher what it learns from a local one? The embedded task, several seeds.

    python examples/teachers/served.py --teacher_url http://127.0.0.1:8000 --output_dir examples/results/teachers/served

The server has the shipped teacher; where its kernels do not take heads of 24 numbers (vLLM on a CPU), one with heads of 96 that
computes the same: `with_heads_of` of examples/embedded_task/servable.py. With --student_url the student's rollouts are sampled by a
server as well, started with that student's folder. A server for CPUs scores its own candidates alone, so both teachers are asked
for those: loss_support "teacher".
"""

import argparse
import json
import time
from pathlib import Path

import torch
from tasks import distil, interval

from prune_opd_hf.tasks import ChainTask, load_student, load_teacher

STEPS = 40
ON_TEACHERS_CANDIDATES = {"loss_support": "teacher"}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--teacher_url", required=True)
    parser.add_argument("--student_url", help="also sample there, with the student of --student_model")
    parser.add_argument("--student_model", help="folder that the student's server was started with")
    parser.add_argument("--arms", nargs="+", default=["local", "served"], choices=["local", "served", "both served"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {
        "local": {},
        "served": {"teacher_model_server_url": arguments.teacher_url},
        "both served": {
            "teacher_model_server_url": arguments.teacher_url,
            "rollout_engine": "vllm",
            "vllm_mode": "server",
            "vllm_server_base_url": arguments.student_url,
        },
    }
    task, runs = ChainTask(), []
    for seed in arguments.seeds:
        train, evaluation = task.dataset(8192, seed=seed), task.dataset(256, seed=seed + 1, split="evaluation")
        for arm in arguments.arms:
            student = arguments.student_model if arm == "both served" else load_student()
            teacher, started = load_teacher() if arm == "local" else None, time.time()
            how = {**ON_TEACHERS_CANDIDATES, **settings[arm]}
            trainer, curve = distil(
                student, teacher, train, evaluation, seed=seed, steps=arguments.steps, points=2, **how
            )
            counts, seconds = trainer.counts, time.time() - started
            run = {"arm": arm, "seed": seed, "curve": curve, "seconds": seconds}
            runs.append({**run, "generated": counts.generated, "kept": counts.kept})
            print(json.dumps(runs[-1]), flush=True)
    summary = {}
    for arm in arguments.arms:
        values = [run["curve"][-1]["accuracy"] for run in runs if run["arm"] == arm]
        summary[arm] = interval(values) if len(values) > 1 else values
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "served.json").write_text(json.dumps({"runs": runs, "mean_low_high": summary}, indent=2) + "\n")


if __name__ == "__main__":
    main()
