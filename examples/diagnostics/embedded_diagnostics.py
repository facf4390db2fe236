"""Does agreement say where the signal is? The diagnostics on the embedded task.

    python examples/diagnostics/embedded_diagnostics.py --prompts 96 --output examples/results/diagnostics

Full rollouts of the embedded student before distillation and after some steps of plain OPD. Gradients are exact and of all
parameters. The gold reference is the gradient of the negative log-likelihood of gold traces of other prompts.
"""

import argparse
from pathlib import Path

import torch
from diagnose import DiagnosticsReport, diagnose
from drift_metrics import after_steps, sample
from token_gradients import gold_gradient

from prune_opd_hf import DriftConfig
from prune_opd_hf.preflight.replay import replay
from prune_opd_hf.records.environment import describe_hardware, package_versions
from prune_opd_hf.records.figures import COLOURS, Line, draw_lines, new_figure, save_figure
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.tasks import ChainTask, is_correct, load_student, load_teacher, load_tokenizer

EVENTS = DriftConfig("overlap", 2, 0.5, 0.25)
"""Events are counted under the setting that the embedded task is trained with."""

GOLD_PROMPTS = 64


def examine(student, teacher, problems, others, seed: int):
    """The report of one state of the student, and its rollouts."""
    tokenizer = load_tokenizer()
    rollouts = sample(student, teacher, problems, seed)
    responses = [
        tokenizer.decode(ids[:length])
        for ids, length in zip(rollouts.response_ids.tolist(), rollouts.lengths.tolist(), strict=True)
    ]
    right = torch.tensor(
        [is_correct(response, problem.answer) for response, problem in zip(responses, problems, strict=True)]
    )
    gold = tokenizer([problem.trace for problem in problems], add_special_tokens=False).input_ids
    reference = gold_gradient(
        student,
        tokenizer([problem.prompt for problem in others]).input_ids,
        tokenizer([problem.trace for problem in others], add_special_tokens=False).input_ids,
    )
    report = diagnose(
        rollouts,
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        correct=right,
        gold=gold,
        references={"gold": reference},
        judged_by="gold",
        events=EVENTS,
    )
    return report, rollouts, right


def page(state: str, report: DiagnosticsReport, right: torch.Tensor) -> list[str]:
    """The report as Markdown."""
    signals = list(dict.fromkeys(item.signal for item in report.correlations))
    metrics = list(dict.fromkeys(item.metric for item in report.correlations))
    found = {(item.metric, item.signal, item.where): item.spearman for item in report.correlations}
    lines = [
        f"## {state[0].upper()}{state[1:]}",
        "",
        f"{report.rollouts} rollouts, {report.tokens:,} tokens, {float(right.float().mean()):.0%} of the rollouts right. Gradients "
        f"of {report.parameters:,} parameters ({'all' if report.whole_model else 'a part'}).",
        "",
        "Spearman's rank correlation of agreement with each signal, over all tokens [95%, bootstrap of whole rollouts]:",
        "",
        "| agreement | " + " | ".join(signals) + " |",
        "|---" * (len(signals) + 1) + "|",
    ]
    for metric in metrics:
        cells = " | ".join(str(found[metric, signal, "all tokens"]) for signal in signals)
        lines.append(f"| {metric} | {cells} |")
    for by, title in (
        ("events so far", f"By drift events so far ({report.event_setting})"),
        ("position", "By position"),
    ):
        bands = [item for item in report.bands if item.by == by]
        ranges = list(dict.fromkeys((item.first, item.last) for item in bands))
        shown = [*signals, "mass of the top 16", "overlap of the top 2"]
        table = {(item.first, item.last, item.signal): item for item in bands}
        lines += ["", f"{title}: mean over rollouts [95%]", "", f"| {by} | tokens | " + " | ".join(shown) + " |"]
        lines.append("|---" * (len(shown) + 2) + "|")
        for first, last in ranges:
            name = f"{first}" if first == last else f"from {first}" if last is None else f"{first}-{last}"
            tokens = max(item.tokens for item in bands if (item.first, item.last) == (first, last))
            cells = []
            for signal in shown:
                item = table.get((first, last, signal))
                cells.append(_band(item))
            lines.append(f"| {name} | {tokens:,} | " + " | ".join(cells) + " |")
    within = [item for item in report.correlations if item.where != "all tokens" and item.signal == "cosine with gold"]
    lines += [
        "",
        "Within ranges, agreement against the cosine with the gold gradient:",
        "",
        "| range | " + " | ".join(metrics) + " |",
    ]
    lines.append("|---" * (len(metrics) + 1) + "|")
    for where in dict.fromkeys(item.where for item in within):
        cells = {item.metric: item.spearman for item in within if item.where == where}
        lines.append(f"| {where} | " + " | ".join(str(cells[metric]) for metric in metrics) + " |")
    lines += ["", "Where agreement and signal contradict each other (one case a rollout, worst first):", ""]
    lines += ["| kind | shared mass | cosine with gold | text |", "|---|---|---|---|"]
    lines += [
        f"| {case.kind} | {case.mass:.2f} | {case.cosine:.2f} | {case.text_before} **{case.token}** {case.text_after} |"
        for case in report.failures
    ]
    return [*lines, ""]


def _band(item) -> str:
    if item is None:
        return "-"
    return f"{item.mean:.2f}" if item.rollouts < 2 else f"{item.mean:.2f} [{item.low:.2f}, {item.high:.2f}]"


def cosine_line(label: str, report: DiagnosticsReport) -> Line:
    """Mean cosine with the gold gradient by events so far."""
    bands = [item for item in report.bands if item.by == "events so far" and item.signal == "cosine with gold"]
    return Line(
        label, [item.first for item in bands], [b.mean for b in bands], [b.low for b in bands], [b.high for b in bands]
    )


def draw_rollout(path: Path, rollouts: Rollouts, row: int, *, title: str) -> None:
    """Draw one rollout: overlap as dots, drift events as ticks at the bottom, reliability as a line, the end of it marked."""
    length = int(rollouts.lengths[row])
    overlap, reliability = rollouts.overlap[row, :length].tolist(), rollouts.reliability[row, :length].tolist()
    events = rollouts.drift_events[row, :length].tolist()
    figure, axes = new_figure(title, "response position", "overlap, reliability")
    positions = list(range(length))
    axes.scatter(positions, overlap, color=COLOURS[0], s=16, label=f"overlap of the top {rollouts.config.top_k}")
    axes.plot(positions, reliability, color=COLOURS[1], linewidth=2, label="reliability")
    at = [position for position, event in enumerate(events) if event]
    axes.scatter(at, [-0.06] * len(at), color=COLOURS[6], marker="|", s=60, label="drift event")
    axes.axvline(length - 1, color=COLOURS[3], linestyle="--", linewidth=1.2, label=f"end: {rollouts.stop_reason[row]}")
    axes.set_ylim(-0.12, 1.06)
    axes.legend(frameon=False, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.16))
    rows = [
        {"position": position, "overlap": overlap[position], "drift event": int(events[position]), "reliability": r}
        for position, r in enumerate(reliability)
    ]
    save_figure(figure, path, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="examples/results/diagnostics")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    problems = ChainTask().problems(arguments.prompts, seed=700 + arguments.seed, split="evaluation")
    others = ChainTask().problems(GOLD_PROMPTS, seed=800 + arguments.seed)
    teacher, text, lines, shown = load_teacher(), [], [], None
    for state, student in (("before distillation", load_student()), (f"after {arguments.steps} steps of OPD", None)):
        student = after_steps(arguments.steps, arguments.seed) if student is None else student
        report, rollouts, right = examine(student, teacher, problems, others, arguments.seed)
        (output / f"{state.split()[0]}.json").write_text(report.to_json(), encoding="utf-8")
        text += page(state, report, right)
        lines.append(cosine_line(state, report))
        shown = shown or replay(rollouts, DriftConfig(EVENTS.metric, EVENTS.top_k, EVENTS.threshold, weight_drop=0.02))
    draw_lines(
        output / "cosine_by_events.png",
        lines,
        title="Cosine of a token's gradient with the gold gradient, mean and 95% band",
        x_label="drift events so far (lower end of the range)",
        y_label="cosine",
    )
    # The one that went well for longest before it drifted.
    drifted = [row for row in range(len(shown)) if shown.stop_reason[row] == "drift"]
    row = max(drifted, key=lambda row: int(shown.drift_events[row].long().argmax()))
    draw_rollout(
        output / "rollout.png",
        shown,
        row,
        title="Overlap, events and reliability of one rollout (weight_drop 0.02 to see it fall)",
    )
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    head = [
        "# Diagnostics: does agreement say where the signal is?",
        "",
        f"Command: `python examples/diagnostics/embedded_diagnostics.py --prompts {arguments.prompts} --steps "
        f"{arguments.steps} --seed {arguments.seed}`. {describe_hardware()}; {versions}.",
        "",
        "Agreement: overlap O_t, shared mass M_t, and 1 minus the teacher's mass before the sampled token (nucleus). Signals: "
        "cosine of the token's gradient of the centred top-k loss with the gradient of gold traces of other prompts, and with "
        "the sum over all other rollouts; variance of the top-k reward; the teacher's entropy; log q of the gold token while "
        "the response still follows the gold one; whether the rollout's answer is right.",
        "",
    ]
    reading = output / "reading.md"  # what the figures say, by hand; it stays when they are measured again
    tail = ["![Cosine by events](cosine_by_events.png)", "", "![One rollout](rollout.png)", ""]
    words = [reading.read_text(encoding="utf-8")] if reading.is_file() else []
    (output / "README.md").write_text("\n".join([*head, *words, *text, *tail]), encoding="utf-8")
    print("\n".join(text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
