"""Does a student learn from a served teacher what it learns from a local one? The embedded task, several seeds.

    make test-vllm                                                     # once, for an environment with vLLM
    python examples/teachers/served.py --vllm_python .venv-vllm/bin/python --output_dir examples/results/teachers/served

vLLM's kernels for CPUs do not take heads of 24 numbers (the teacher's) or 16 (the student's), so the servers have models with
wider heads that compute the same (`with_heads_of` of examples/embedded_task/servable.py). In the arm "both served" the rollouts are
sampled by a server too. A server for CPUs scores its own candidates alone, so every teacher is asked for those: loss_support
"teacher". Runs that are in runs.json are not repeated.
"""

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from tasks import Runs, distil, interval

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "embedded_task"))
from engines import metric, server
from servable import with_heads_of

from prune_opd_hf.records.figures import Line, draw_lines
from prune_opd_hf.records.files import write_json
from prune_opd_hf.tasks import ChainTask, load_student, load_teacher

STEPS = 40
ARMS = ("local", "served", "both served")
ON_TEACHERS_CANDIDATES = {"loss_support": "teacher"}
MAX_MODEL_LEN = 256


def draw(path, runs):
    lines = []
    for arm in ARMS:
        for run in (run for run in runs if run["arm"] == arm):
            points = run["curve"]
            values = [100 * point["accuracy"] for point in points]
            lines.append(Line(f"{arm}, seed {run['seed']}", [point["step"] for point in points], values))
    draw_lines(
        path,
        lines,
        title="A teacher in this process and on a server",
        x_label="optimizer steps",
        y_label="exact match, percent",
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--vllm_python", default=".venv-vllm/bin/python", help="of an environment with vLLM")
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    output, task = Path(arguments.output_dir), ChainTask()
    runs = Runs(output / "runs.json")
    with ExitStack() as opened:
        place = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        models, urls = {"teacher": with_heads_of(load_teacher(), 96), "student": with_heads_of(load_student(), 32)}, {}

        def url(role):
            """Of a server that is started when it is first asked for."""
            if role not in urls:
                models[role].save_pretrained(place / role)
                urls[role] = opened.enter_context(server(arguments.vllm_python, place / role, MAX_MODEL_LEN))
            return urls[role]

        for arm, seed in runs.missing(arguments.arms, arguments.seeds):
            train, evaluation = task.dataset(8192, seed=seed), task.dataset(256, seed=seed + 1, split="evaluation")
            student, teacher, how = load_student(), None, dict(ON_TEACHERS_CANDIDATES)
            if arm == "local":
                teacher = load_teacher()
            else:
                how["teacher_model_server_url"] = url("teacher")
            if arm == "both served":
                student = with_heads_of(load_student(), 32)
                how |= {"rollout_engine": "vllm", "vllm_mode": "server", "vllm_server_base_url": url("student")}
            started = time.time()
            trainer, curve = distil(
                student, teacher, train, evaluation, seed=seed, steps=arguments.steps, points=2, **how
            )
            seconds, counts = time.time() - started, trainer.counts
            runs.add(arm=arm, seed=seed, curve=curve, seconds=seconds, generated=counts.generated, kept=counts.kept)
        for role, at in urls.items():
            names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
            print(role, "server:", {name: metric(at, name) for name in names}, flush=True)
    found = {arm: runs.last(arm) for arm in ARMS}
    write_json(output / "accuracy.json", {arm: interval(values) for arm, values in found.items() if len(values) > 1})
    draw(output / "accuracy.png", runs.runs)


if __name__ == "__main__":
    main()
