"""Which drift metric finds drift? All of them as detectors on the embedded task, with token labels from the problems.

    python examples/diagnostics/drift_metrics.py --prompts 384 --output examples/results/metrics

Every response is sampled in full by the embedded student, before distillation and after some steps of plain OPD. A token is
*clean* where it is what comes next in the chain given what the response itself wrote, *wrong* where it is not, and *drift*
from the first hesitation on. A detector should flag wrong and drifting tokens and leave clean ones alone, and of a model that is
its own teacher it should flag nothing: how unsure a model is is no drift.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from rank_statistics import Interval, auc
from token_gradients import response_log_probs
from token_labels import CLEAN, DRIFT, PADDING, WRONG, label_rollouts
from token_signals import disagreement, settings_by_name

from prune_opd_hf import DriftConfig, DriftMonitor, Teacher, pruned_generate
from prune_opd_hf.algorithm.drift import events_to_exhaustion
from prune_opd_hf.preflight.replay import drift_events, find_stops
from prune_opd_hf.records.environment import describe_hardware, package_versions
from prune_opd_hf.records.figures import Line, draw_lines
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.tasks import ChainTask, load_student, load_teacher, load_tokenizer
from prune_opd_hf.training import PruneOPDConfig, PruneOPDTrainer

RECORDED = 16
CAP = 112
WEIGHT_DROP = 0.25
SETTINGS = (
    *(
        ("overlap", k, t)
        for k, ts in ((1, (0.5,)), (2, (0.5, 0.9)), (4, (0.5, 0.7)), (8, (0.5, 0.7)), (16, (0.5, 0.7)))
        for t in ts
    ),
    *(("weighted_overlap", k, t) for k, ts in ((2, (0.5,)), (16, (0.3, 0.5, 0.7))) for t in ts),
    *(
        ("mass", k, t)
        for k, ts in ((2, (0.3, 0.5, 0.6, 0.8)), (4, (0.5,)), (8, (0.5,)), (16, (0.3, 0.5, 0.6, 0.8)))
        for t in ts
    ),
    *(("nucleus", 16, t) for t in (0.8, 0.9, 0.95, 0.99)),
    *(("tail", 16, t) for t in (0.95, 0.99)),
)


def sample(student, teacher, problems, seed: int, temperature: float = 1.0) -> Rollouts:
    """Unpruned rollouts of problems, with both models' candidates."""
    inputs = load_tokenizer()([problem.prompt for problem in problems], return_tensors="pt", padding=True)
    return sample_inputs(student, teacher, inputs, seed, temperature, CAP)


def sample_inputs(student, teacher, inputs, seed: int, temperature: float, cap: int) -> Rollouts:
    """Unpruned rollouts of encoded prompts, with both models' candidates."""
    monitor = DriftMonitor(
        Teacher(teacher, top_k=RECORDED), DriftConfig("tail", RECORDED, weight_drop=0.0), truncate=False
    )
    torch.manual_seed(seed)
    sequences = student.generate(
        **inputs,
        max_new_tokens=cap,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        custom_generate=pruned_generate,
        drift_monitor=monitor,
    )
    return monitor.finish(sequences)


def flagged_of_itself(models, problems, seed: int) -> list[dict]:
    """Share of the tokens that each metric flags at its default where a model is its own teacher."""
    rows = []
    for name, model in models.items():
        for temperature in (1.0, 0.7):
            rollouts = sample(model, model, problems, seed, temperature)
            found = {
                name: share(drift_events(rollouts, config), rollouts.response_mask)
                for name, config in settings_by_name(RECORDED).items()
            }
            rows.append(
                {"model": name, "temperature": str(temperature), "tokens": int(rollouts.lengths.sum()), **found}
            )
    return rows


def after_steps(steps: int, seed: int):
    """The embedded student after some steps of plain OPD."""
    args = PruneOPDConfig(
        output_dir="unused",
        pruning="none",
        max_steps=steps,
        learning_rate=2e-4,
        per_device_train_batch_size=64,
        num_generations=1,
        max_prompt_length=27,
        max_completion_length=CAP,
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = PruneOPDTrainer(
        load_student(), load_teacher(), args, ChainTask().dataset(4096, seed=seed), processing_class=load_tokenizer()
    )
    trainer.train()
    return trainer.model.eval()


def measure(rollouts: Rollouts, labels: torch.Tensor) -> list[dict]:
    """One row for each setting."""
    mask = labels != PADDING
    clusters = torch.arange(len(rollouts)).unsqueeze(-1).expand(mask.shape)[mask].numpy()
    positive = (labels != CLEAN)[mask].numpy()
    all_clean = (labels <= CLEAN).all(dim=-1)
    aucs: dict[tuple[str, int], Interval] = {}
    rows = []
    for metric, k, threshold in SETTINGS:
        if (metric, k) not in aucs:
            aucs[metric, k] = auc(
                disagreement(rollouts, metric, k)[mask].double().numpy(), positive, clusters, draws=100
            )
        config = DriftConfig(metric, k, threshold, WEIGHT_DROP)
        events = drift_events(rollouts, config)
        stops = find_stops(rollouts, config, events)
        delays, never = delays_of(events, labels)
        rows.append(
            {
                "metric": metric,
                "top_k": k,
                "threshold": threshold,
                "auc": aucs[metric, k].value,
                "auc_low": aucs[metric, k].low,
                "auc_high": aucs[metric, k].high,
                "clean_flagged": share(events, labels == CLEAN),
                "wrong_flagged": share(events, labels == WRONG),
                "drift_flagged": share(events, labels == DRIFT),
                "delay_median": float(np.median(delays)) if len(delays) else float("nan"),
                "delay_90": float(np.percentile(delays, 90)) if len(delays) else float("nan"),
                "never_noticed": never,
                "clean_rollouts_stopped": share(stops.drifted, all_clean),
                "kept_share": float(stops.lengths.sum() / rollouts.lengths.sum()),
            }
        )
    return rows


def delays_of(events: torch.Tensor, labels: torch.Tensor) -> tuple[np.ndarray, float]:
    """Tokens from the onset of drift (the first hesitation) to the first event at or after it, and the share never noticed."""
    delays, rollouts = [], 0
    for row in range(len(labels)):
        onset = (labels[row] == DRIFT).nonzero()
        if not len(onset):
            continue
        rollouts += 1
        after = events[row, int(onset[0]) :].nonzero()
        if len(after):
            delays.append(int(after[0]))
    return np.array(delays), 1 - len(delays) / max(rollouts, 1)


def share(flags: torch.Tensor, among: torch.Tensor) -> float:
    """How many of them are flagged; NaN where there are none."""
    total = int(among.sum())
    return float((flags & among).sum() / total) if total else float("nan")


@torch.no_grad()
def bounds_of_mass(student, teacher, rollouts: Rollouts) -> list[dict]:
    """How much the recorded mass misses: against the union of both sets, and against the whole vocabulary."""
    p, q = (response_log_probs(model, rollouts).exp() for model in (student, teacher))
    rows, mask = [], rollouts.response_mask
    everything = torch.minimum(p, q).sum(dim=-1)[mask]
    for k in (2, 4, 8, 16):
        own = rollouts.student_topk_log_probs[..., :k].exp().sum(dim=-1)
        recorded = (own * (1 - disagreement(rollouts, "mass", k)))[mask]
        union = torch.zeros_like(p, dtype=torch.bool)
        for ids in (rollouts.student_topk_ids, rollouts.teacher_topk_ids):
            union.scatter_(-1, ids[..., :k], True)
        on_union = torch.where(union, torch.minimum(p, q), 0.0).sum(dim=-1)[mask]
        rows.append(
            {
                "top_k": k,
                "mean_recorded": float(recorded.mean()),
                "mean_union": float(on_union.mean()),
                "mean_whole_vocabulary": float(everything.mean()),
                "largest_gap_to_union": float((on_union - recorded).max()),
                "gap_to_union_99": float((on_union - recorded).quantile(0.99)),
                "other_side_of_0.5": float(((recorded < 0.5) != (on_union < 0.5)).float().mean()),
            }
        )
    return rows


def table(rows: list[dict], columns: dict[str, str]) -> list[str]:
    """Markdown."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(cell(row, name) for name in columns) + " |" for row in rows]


def cell(row: dict, name: str) -> str:
    """One number, shares in percent."""
    value = row[name]
    if name.endswith("auc"):
        return f"{value:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"
    if isinstance(value, (str, int)):
        return str(value)
    if np.isnan(value):
        return "-"
    if name == "threshold" or name.startswith(("delay", "mean", "largest", "gap")):
        return f"{value:.3g}"
    return f"{100 * value:.1f}%"


COLUMNS = {
    "metric": "metric",
    "top_k": "k",
    "threshold": "threshold",
    "auc": "AUC [95%]",
    "clean_flagged": "clean flagged",
    "wrong_flagged": "wrong flagged",
    "drift_flagged": "drift flagged",
    "delay_median": "delay, median",
    "delay_90": "delay, 90th",
    "never_noticed": "never noticed",
    "clean_rollouts_stopped": "clean rollouts stopped",
    "kept_share": "tokens kept",
}
BOUND_COLUMNS = {
    "top_k": "k",
    "mean_recorded": "recorded (student's top k)",
    "mean_union": "union of both sets",
    "mean_whole_vocabulary": "whole vocabulary, 1 - TV",
    "gap_to_union_99": "gap to the union, 99th percentile",
    "largest_gap_to_union": "gap, largest",
    "other_side_of_0.5": "tokens on the other side of 0.5",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=384)
    parser.add_argument("--steps", type=int, default=20, help="steps of plain OPD before the second measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="examples/results/metrics")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    problems = ChainTask().problems(arguments.prompts, seed=500 + arguments.seed, split="evaluation")
    teacher = load_teacher()
    page, everything, figure = [], [], []
    for state, student in (("before distillation", load_student()), (f"after {arguments.steps} steps of OPD", None)):
        student = after_steps(arguments.steps, arguments.seed) if student is None else student
        rollouts = sample(student, teacher, problems, arguments.seed)
        labels = label_rollouts(rollouts, problems, load_tokenizer().convert_ids_to_tokens(range(64)))
        counts = {
            name: int((labels == label).sum()) for name, label in (("clean", CLEAN), ("wrong", WRONG), ("drift", DRIFT))
        }
        total = sum(counts.values())
        rows = measure(rollouts, labels)
        bounds = bounds_of_mass(student, teacher, rollouts)
        everything += [{"state": state, **row} for row in rows]
        shares = ", ".join(f"{100 * count / total:.1f}% {name}" for name, count in counts.items())
        own = flagged_of_itself(
            {"student": student, "teacher": teacher}, problems[: arguments.prompts // 4], arguments.seed
        )
        page += [
            f"## {state[0].upper()}{state[1:]}",
            "",
            f"{len(rollouts)} rollouts, {total:,} tokens: {shares}.",
            "",
            *table(rows, COLUMNS),
            "",
            "What the recorded mass leaves out (means over tokens):",
            "",
            *table(bounds, BOUND_COLUMNS),
            "",
            f"A model that is its own teacher, the top {RECORDED}, each metric at its default: share of the tokens flagged.",
            "",
            *table(own, {name: name.replace("_", " ") for name in own[0]}),
            "",
        ]
        for metric in ("overlap", "weighted_overlap", "mass"):
            seen = {row["top_k"]: row for row in rows if row["metric"] == metric}
            figure.append(
                Line(
                    f"{metric}, {state}",
                    list(seen),
                    [row["auc"] for row in seen.values()],
                    [row["auc_low"] for row in seen.values()],
                    [row["auc_high"] for row in seen.values()],
                )
            )
    draw_lines(
        output / "auc_by_top_k.png",
        figure,
        title="Wrong or drifting tokens against clean ones: AUC by number of candidates",
        x_label="top k",
        y_label="AUC",
    )
    with open(output / "detectors.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(everything[0]))
        writer.writeheader()
        writer.writerows(everything)
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    command = (
        f"python examples/diagnostics/drift_metrics.py --prompts {arguments.prompts} --steps {arguments.steps} "
        f"--seed {arguments.seed}"
    )
    reading = output / "reading.md"  # what the figures say, by hand; it stays when they are measured again
    text = [
        "# Drift metrics as detectors on the embedded task",
        "",
        f"Command: `{command}`. {describe_hardware()}; {versions}.",
        "",
        "Clean: the next step of the chain, given what the response itself wrote. Wrong: any other token before the first "
        "hesitation. Drift: every token from the first hesitation on. Flagged: the metric counts a drift event. AUC: chance that "
        "a wrong or drifting token looks more suspect than a clean one, with a 95% interval from a bootstrap of whole rollouts. "
        "Delay: tokens from the first hesitation to the first event at or after it. Clean rollouts stopped, tokens kept: by "
        f"replay with weight_drop {WEIGHT_DROP} ({events_to_exhaustion(WEIGHT_DROP)} events use the reliability up).",
        "",
        *([reading.read_text(encoding="utf-8")] if reading.is_file() else []),
        *page,
        "![AUC by top k](auc_by_top_k.png)",
        "",
    ]
    (output / "README.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(page))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
