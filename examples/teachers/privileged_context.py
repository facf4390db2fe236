"""Self-distillation with privileged context: the teacher is the student itself, and reads the worked values before the prompt.

    python examples/teachers/privileged_context.py --output_dir examples/results/teachers/privileged_context

    the student reads   , +3 , x7 = 4
    the teacher reads   ANS 7 9 , +3 , x7 = 4

A cold start teaches the model to use the values where they stand there; without them it learns from traces of which `SLIPS` of the
values are wrong (the chain goes on from there), so that it is weak. Arms: the base with
and without the context, and a moving average of the student with it. Drift events of unpruned rollouts are counted by what the
student's token is: an operation that is copied from the prompt, a value before the first wrong one, that one, and values behind it.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from tasks import Runs, accuracy, distil, fine_tune, interval

from prune_opd_hf import DriftConfig
from prune_opd_hf.generation import DriftMonitor, LoopEngine, Request, Sampling
from prune_opd_hf.preflight.replay import drift_events
from prune_opd_hf.records.figures import COLOURS, HATCHES, Line, draw_lines, new_figure, save_figure
from prune_opd_hf.records.files import write_json
from prune_opd_hf.tasks import ChainTask, load_student, load_tokenizer
from prune_opd_hf.tasks.chain import ANSWER, DIGITS, END, apply_operation
from prune_opd_hf.teachers.base import TeacherContext
from prune_opd_hf.teachers.local import LocalTeacher

TASK = ChainTask()
COLD_START, STEPS, ROWS = 400, 60, 8192
WITHOUT_CONTEXT, SLIPS = 0.4, 0.2
"""Share of the cold start without the context, and of the values that are wrong there."""

ARMS = {
    "with context": {"teacher_model_kind": "base", "teacher_prompt_template": "{solution} {prompt}"},
    "moving average": {
        "teacher_model_kind": "ema",
        "teacher_update_rate": 0.05,
        "teacher_prompt_template": "{solution} {prompt}",
    },
    "without context": {"teacher_model_kind": "base"},
}
RECORDED = 4
METRICS = {
    "overlap of the top 2 at 0.5": DriftConfig("overlap", 2, 0.5),
    "overlap of the top 1": DriftConfig("overlap", 1, 1.0),
    "mass of the top 4 at 0.5": DriftConfig("mass", 4, 0.5),
    "nucleus at 0.95": DriftConfig("nucleus", 4, 0.95),
}
KINDS = ("operation", "value before the first wrong one", "first wrong value", "value behind it")


def solution(problem):
    """The values of a chain, as the teacher reads them."""
    return " ".join([ANSWER, *(DIGITS[value] for value in problem.values)])


def rows(count, seed, split="train"):
    problems = TASK.problems(count, seed, split)
    return [{"prompt": one.prompt, "trace": one.trace, "solution": solution(one)} for one in problems]


def slipping_trace(problem, generator):
    """A trace in style A in which some values are any digit."""
    value, words = problem.start, []
    for operation in problem.operations:
        value = apply_operation(value, operation)
        if torch.rand(1, generator=generator) < SLIPS:
            value = int(torch.randint(len(DIGITS), (1,), generator=generator))
        words += [operation, DIGITS[value]]
    return " ".join([*words, END])


def pairs(step, size=32):
    """Pairs of prompt and trace of the cold start, most of them behind the values."""
    problems, generator = TASK.problems(size, 100_000 + step), torch.Generator().manual_seed(step)
    bare = int(size * WITHOUT_CONTEXT)
    weak = [(one.prompt, slipping_trace(one, generator)) for one in problems[:bare]]
    return weak + [(f"{solution(one)} {one.prompt}", one.trace) for one in problems[bare:]]


def kinds_of(problem, words):
    """What each word of a response is, as far as it follows the style."""
    found, wrong = [], False
    for number, word in enumerate(words[: 2 * len(problem.values)]):
        if number % 2 == 0:
            found.append(KINDS[0])
        elif wrong:
            found.append(KINDS[3])
        else:
            wrong = word != DIGITS[problem.values[number // 2]]
            found.append(KINDS[2] if wrong else KINDS[1])
    return found


def drift_by_kind(model, count=256):
    """Share of drift events among the student's tokens of each kind, and their number, by metric, with and without the context."""
    tokenizer, problems, found = load_tokenizer(), TASK.problems(count, 7, "evaluation"), []
    ends = (tokenizer.eos_token_id,)
    engine = LoopEngine(model, Sampling(32, ends, tokenizer.pad_token_id), slots=64)
    requests = [Request(tuple(tokenizer(one.prompt)["input_ids"]), number) for number, one in enumerate(problems)]
    contexts = [TeacherContext(tuple(tokenizer(f"{solution(one)} {one.prompt}")["input_ids"])) for one in problems]
    for name, given in (("with context", contexts), ("without context", ())):
        monitor = DriftMonitor(
            LocalTeacher(model, top_k=RECORDED),
            DriftConfig("overlap", top_k=RECORDED, weight_drop=0.0),
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
            truncate=False,
        )
        watch = monitor.begin(contexts=given)
        list(engine.generate(requests, watch))
        rollouts = watch.rollouts()
        rows_of_words = [
            tokenizer.convert_ids_to_tokens(ids[mask])
            for ids, mask in zip(rollouts.response_ids, rollouts.response_mask, strict=True)
        ]
        for metric, config in METRICS.items():
            events, flags = drift_events(rollouts, config), {kind: [] for kind in KINDS}
            for row, (problem, words) in enumerate(zip(problems, rows_of_words, strict=True)):
                for column, kind in enumerate(kinds_of(problem, words)):
                    flags[kind].append(bool(events[row, column]))
            found += [
                {
                    "teacher": name,
                    "metric": metric,
                    "kind": kind,
                    "tokens": len(of),
                    "events": sum(of) / max(1, len(of)),
                }
                for kind, of in flags.items()
            ]
    return found


def draw(path, found):
    figure, axes = new_figure("Drift events where the teacher reads the values", "the student's token", "share")
    width = 0.8 / len(METRICS)
    for number, metric in enumerate(METRICS):
        shares = [one["events"] for one in found if one["teacher"] == "with context" and one["metric"] == metric]
        places = [place + (number - (len(METRICS) - 1) / 2) * width for place in range(len(KINDS))]
        axes.bar(places, shares, width, label=metric, color=COLOURS[number], hatch=HATCHES[number], edgecolor="white")
    names = [kind.replace(" before", "\nbefore").replace(" behind", "\nbehind") for kind in KINDS]
    axes.set_xticks(range(len(KINDS)), names)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    save_figure(figure, path, found)


def draw_curves(path, runs):
    lines = []
    for arm in ARMS:
        curves = [run["curve"] for run in runs if run["arm"] == arm]
        points = [[100 * at["accuracy"] for at in point] for point in zip(*curves, strict=True)]
        if points:
            steps, middle = [at["step"] for at in curves[0]], [sum(point) / len(point) for point in points]
            lines.append(Line(f"teacher: {arm}", steps, middle, list(map(min, points)), list(map(max, points))))
    axes = {"x_label": "optimizer steps", "y_label": "exact match, percent"}
    draw_lines(path, lines, title="The student as its own teacher, with a context of its own and without", **axes)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=[*ARMS])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = fine_tune(load_student(), pairs, COLD_START)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    held_out = rows(256, 5, "evaluation")
    known = {
        "with context": accuracy(start, [(f"{one['solution']} {one['prompt']}", one["trace"]) for one in held_out]),
        "without context": accuracy(start, [(one["prompt"], one["trace"]) for one in held_out]),
    }
    print(known, flush=True)
    found = drift_by_kind(start)
    write_json(folder / "start.json", {"accuracy": known, "drift_by_kind": found})
    draw(folder / "drift_by_kind.png", found)
    runs, state = Runs(folder / "runs.json"), start.state_dict()
    for arm, seed in runs.missing(arguments.arms, arguments.seeds):
        train, evaluation = Dataset.from_list(rows(ROWS, seed)), Dataset.from_list(rows(256, seed + 1, "evaluation"))
        student = load_student()
        student.load_state_dict(state)
        _, curve = distil(student, None, train, evaluation, seed=seed, steps=arguments.steps, **ARMS[arm])
        runs.add(arm=arm, seed=seed, curve=curve)
    ends = {arm: runs.last(arm) for arm in ARMS}
    write_json(folder / "accuracy.json", {arm: interval(values) for arm, values in ends.items() if len(values) > 1})
    draw_curves(folder / "accuracy.png", runs.runs)


if __name__ == "__main__":
    main()
