"""Does pruning by drift pay on a small real language model? Arms with one budget of CPU seconds each, and what they learn.

    python examples/real_pair/study.py run --arm none --seed 0
    python examples/real_pair/study.py report

A run trains the cold-started student (cold_start.py) and measures it on held-out questions, whose answers are sampled in full: the
reverse KL per token, the teacher's log-probability of them, and the share that ends by itself. Measured at both halves of the
CPU seconds, which leave measuring out, and at a number of steps. Runs that are there already are not repeated.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cold_start import cold_start
from datasets import Dataset
from prompts import questions
from transformers import TrainerCallback

from prune_opd_hf import PruneOPDConfig, PruneOPDTrainer
from prune_opd_hf.records.files import atomic_path, write_json, write_text
from prune_opd_hf.study.study_report import SeedMean

RESULTS = Path(__file__).parents[1] / "results" / "real_pair"
CPU_SECONDS, STEPS = 600.0, 20
DUE = (("cpu 1/2", 0.5, 0.0), ("cpu 2/2", 1.0, 0.0), ("steps", 0.0, 1.0))
"""When to measure: name, share of the CPU seconds, share of the steps."""

ARMS: dict[str, dict[str, Any]] = {
    "none": {"pruning": "none"},
    "published": {"pruning": "drift", "drift_metric": "overlap", "drift_threshold": 0.7},
    "weighted": {"pruning": "drift", "drift_metric": "weighted_overlap"},
    "fixed": {"pruning": "fixed", "pruning_match": "kept"},
}
LABELS = {
    "none": "plain OPD",
    "published": "overlap of the top 16 at 0.7, the published setting",
    "weighted": "weighted overlap of the top 16 at 0.5, the metric's default",
    "fixed": "fixed length, matched to the published setting's",
}
SETTINGS = {
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 1,
    "max_completion_length": 64,
    "check_every": 8,
    "drift_top_k": 16,
    "drift_weight_drop": 0.25,
    "drift_min_length": 8,
    "budget_initial": 64,
    "budget_minimum": 16,
    "loss_type": "reverse_kl",
}
MEASURED = {
    "kl": "reverse KL per token, nats",
    "teacher_log_prob": "teacher's log-probability per token, nats",
    "ended": "share of answers that end by themselves",
    "overlap": "overlap of the top 16",
}


class Measuring(TrainerCallback):
    """Asks for evaluations at shares of the budgets, and stops the training when all are spent."""

    def __init__(self, due: list[tuple[str, float, float]]) -> None:
        """`due`: when to measure, each with its name, CPU seconds and steps that must have been spent."""
        self.spent, self.mark, self.points, self.due = 0.0, time.process_time(), [], due

    def on_train_begin(self, *args, **_):
        self.mark = time.process_time()

    def on_step_end(self, args, state, control, **_):
        now = time.process_time()
        self.spent += now - self.mark
        self.mark = now
        at = [name for name, cpu_seconds, steps in self.due if self.spent >= cpu_seconds and state.global_step >= steps]
        self.due = [due for due in self.due if due[0] not in at]
        if at:
            self.points.append({"at": at, "step": state.global_step, "cpu_seconds": self.spent})
        control.should_evaluate = bool(at)
        control.should_training_stop = not self.due

    def on_evaluate(self, args, state, control, metrics, **_):
        self.points[-1] |= measured(metrics)
        print(json.dumps(self.points[-1]), flush=True)
        self.mark = time.process_time()


def measured(metrics: dict[str, float]) -> dict[str, float]:
    """What is compared, of the metrics of an evaluation."""
    return {
        "kl": metrics["eval_kl"],
        "teacher_log_prob": metrics["eval_teacher_log_prob"],
        "ended": 1 - metrics["eval_truncated_share"],
        "overlap": metrics["eval_overlap"],
        "mean_tokens": metrics["eval_mean_tokens"],
    }


def run(
    arm: str,
    seed: int,
    results: Path,
    cpu_seconds: float = CPU_SECONDS,
    student_folder: Path | None = None,
    steps: int | None = None,
) -> Path:
    """Train one arm with one seed, and save the student where told; the file of what was measured. With `steps` the run ends
    after so many, whatever they take, and its learning rate falls to 0 in a straight line."""
    target = results / "runs" / f"{arm}-seed{seed}.json"
    if target.exists():
        if student_folder is not None:
            raise SystemExit(f"{target} is there already: remove it to train this student again")
        return target
    changes = dict(ARMS[arm])
    if arm == "fixed":
        changes["pruning_length"] = kept_length(run("published", seed, results, cpu_seconds))
    torch.set_num_threads(1)
    teacher, student = cold_start()
    train, held_out = (
        Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in questions(count, held_out)])
        for count, held_out in ((240, False), (32, True))
    )
    due = [(name, cpu_seconds * of_cpu, STEPS * of_steps) for name, of_cpu, of_steps in DUE]
    if steps is not None:
        changes["lr_scheduler_type"] = "linear"
        due = [("steps 1/2", 0.0, steps / 2), ("steps 2/2", 0.0, steps)]
    measuring = Measuring(due)
    with tempfile.TemporaryDirectory() as output:
        args = PruneOPDConfig(
            **SETTINGS | changes,
            output_dir=output,
            seed=seed,
            max_steps=steps or 100_000,
            per_device_eval_batch_size=32,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            rollout_engine="loop",
        )
        trainer = PruneOPDTrainer(
            str(student), str(teacher), args=args, train_dataset=train, eval_dataset=held_out, callbacks=[measuring]
        )
        start = start_of(seed, results)
        measuring.points.append(start or {"at": ["start"], "step": 0, "cpu_seconds": 0.0})
        if start is None:
            trainer.evaluate()
        trainer.train()
        if student_folder is not None:
            trainer.save_model(str(student_folder))
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
    settings = SETTINGS | changes
    record = {"arm": arm, "seed": seed, "cpu_seconds": cpu_seconds, "settings": settings}
    record |= {"points": measuring.points, "history": history}
    write_json(target, record)
    return target


def start_of(seed: int, results: Path) -> dict[str, Any] | None:
    """What another arm with this seed measured before training: the same student and the same random numbers."""
    for path in (results / "runs").glob(f"*-seed{seed}.json"):
        return point_at(json.loads(path.read_text()), "start")
    return None


def kept_length(path: Path) -> float:
    """Tokens that a run kept of each rollout, on average."""
    history = json.loads(path.read_text())["history"]
    rows = SETTINGS["per_device_train_batch_size"] * SETTINGS["gradient_accumulation_steps"]
    return float(np.mean([entry["prune/kept_tokens"] for entry in history])) / rows


def report(results: Path) -> None:
    """Tables and a figure of the runs that there are."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted((results / "runs").glob("*.json")):
        record = json.loads(path.read_text())
        runs.setdefault(record["arm"], {})[record["seed"]] = record
    arms = [arm for arm in ARMS if arm in runs]
    lines = [
        "# A small real pair",
        "",
        "Teacher: SmolLM2-135M-Instruct. Student: the same without layers 16 to 18 (of 30, counted from 0), after a few steps on "
        "the teacher's samples. Made by `make real-study`; the plan that was written first: plan.md; how to read it: reading.md.",
        "",
        f"Answers of up to {SETTINGS['max_completion_length']} tokens to 32 held-out questions, sampled at temperature 1 without "
        "pruning. Means over seeds [95% interval of Student's t]; differences are paired by seed.",
        "",
    ]
    places = {
        "start": "Before training",
        "cpu 1/2": f"After {CPU_SECONDS / 2:g} CPU seconds",
        "cpu 2/2": f"After {CPU_SECONDS:g} CPU seconds",
        "steps": f"After {STEPS} steps",
    }
    for at, title in places.items():
        lines += [f"## {title}", ""]
        lines += ["| arm | seeds | steps | " + " | ".join(MEASURED.values()) + " |", "|---" * (3 + len(MEASURED)) + "|"]
        found = {arm: {seed: point for seed, run in runs[arm].items() if (point := point_at(run, at))} for arm in arms}
        for arm, points in found.items():
            if points:
                cells = [shown([point[name] for point in points.values()]) for name in MEASURED]
                steps = f"{np.mean([point['step'] for point in points.values()]):.0f}"
                lines.append(f"| {LABELS[arm]} | {len(points)} | {steps} | " + " | ".join(cells) + " |")
        plain = found.get("none", {})
        for arm, points in found.items():
            seeds = sorted(points.keys() & plain.keys())
            if arm != "none" and seeds and at != "start":
                cells = [shown([points[seed][name] - plain[seed][name] for seed in seeds], "+") for name in MEASURED]
                lines.append(f"| {LABELS[arm]}, minus plain OPD | {len(seeds)} | | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["![Learning](learning.png)", ""]
    if (results / "reading.md").exists():
        lines[4:4] = [(results / "reading.md").read_text(encoding="utf-8").strip(), ""]
    write_text(results / "README.md", "\n".join(lines))
    figure(runs, arms, results / "learning.png")


def point_at(run: dict[str, Any], at: str) -> dict[str, Any] | None:
    """What a run measured at this share of a budget."""
    return next((point for point in run["points"] if at in point["at"]), None)


def shown(values: list[float], sign: str = "") -> str:
    """Mean with its interval, where there are several."""
    found = SeedMean.of(values)
    if found.low is None:
        return f"{found.mean:{sign}.3f}"
    return f"{found.mean:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def figure(runs: dict[str, dict[int, dict[str, Any]]], arms: list[str], path: Path) -> None:
    """Held-out KL over CPU seconds and over steps, and the overlap of the training rollouts by position at both ends."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(12, 4), layout="constrained")
    axes = picture.subplots(1, 3)
    for number, arm in enumerate(arms):
        for place, (axis, name) in enumerate(zip(axes, ("cpu_seconds", "step"), strict=False)):
            for record in runs[arm].values():
                points = sorted(record["points"], key=lambda point: point[name])
                label = LABELS[arm] if place == 0 and record is next(iter(runs[arm].values())) else None
                axis.plot(
                    [p[name] for p in points], [p["kl"] for p in points], color=f"C{number}", marker=".", label=label
                )
            axis.set_xlabel(("CPU seconds of training", "steps")[place])
            axis.set_ylabel("held-out reverse KL, nats per token")
    picture.legend(loc="outside lower center", ncols=2, fontsize=8)
    for number, arm in enumerate(arms):
        for ends, style in ((slice(0, 4), "--"), (slice(-4, None), "-")):
            by_position: dict[int, list[float]] = {}
            for record in runs[arm].values():
                for entry in record["history"][ends]:
                    for key, value in entry.items():
                        if key.startswith("prune/overlap_by_position/"):
                            by_position.setdefault(int(key.rsplit("/", 1)[1]), []).append(value)
            places = sorted(by_position)
            axes[2].plot(places, [np.mean(by_position[place]) for place in places], style, color=f"C{number}")
    axes[2].set_xlabel("response position")
    axes[2].set_title("dashed: first four steps, solid: last four", fontsize=9)
    axes[2].set_ylabel("overlap of the top 16")
    for axis in axes:
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        picture.savefig(temporary, dpi=110, format="png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("--arm", choices=ARMS, required=True)
    one.add_argument("--seed", type=int, required=True)
    one.add_argument(
        "--cpu_seconds", type=float, default=CPU_SECONDS, help="a longer run belongs into --results of its own"
    )
    one.add_argument(
        "--student_folder", type=Path, default=None, help="where the trained student is saved; left out, nowhere"
    )
    one.add_argument("--steps", type=int, help="end after so many, the learning rate falling to 0; likewise of its own")
    commands.add_parser("report")
    arguments = parser.parse_args()
    if arguments.command == "run":
        at = arguments.results, arguments.cpu_seconds, arguments.student_folder, arguments.steps
        print(run(arguments.arm, arguments.seed, *at))
    else:
        report(arguments.results)
