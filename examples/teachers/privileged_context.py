"""Self-distillation with privileged context: the teacher is the student itself, and reads the worked values before the prompt.

    python examples/teachers/privileged_context.py --output_dir examples/results/teachers/privileged_context

    the student reads   , +3 , x7 = 4
    the teacher reads   ANS 7 9 , +3 , x7 = 4

A cold start teaches the model to use the values where they stand there, and leaves it weak without them. Arms: the base with
and without the context, and a moving average of the student with it. Drift events of unpruned rollouts are counted by what the
student's token is: an operation that is copied from the prompt, a value before the first wrong one, that one, and values behind it.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from tasks import SETTINGS, distil, fine_tune, interval

from prune_opd_hf import DriftConfig
from prune_opd_hf.generation import DriftMonitor, LoopEngine, Request, Sampling
from prune_opd_hf.records.figures import new_figure, save_figure
from prune_opd_hf.tasks import ChainTask, load_student, load_tokenizer
from prune_opd_hf.tasks.chain import ANSWER, DIGITS
from prune_opd_hf.teachers.base import TeacherContext
from prune_opd_hf.teachers.local import LocalTeacher

TASK = ChainTask()
COLD_START, STEPS, ROWS = 300, 80, 8192
WITHOUT_CONTEXT = 0.2
"""Share of the cold start without the context."""

ARMS = {
    "with context": {"teacher_model_kind": "base", "teacher_prompt_template": "{solution} {prompt}"},
    "moving average": {
        "teacher_model_kind": "ema",
        "teacher_update_rate": 0.05,
        "teacher_prompt_template": "{solution} {prompt}",
    },
    "without context": {"teacher_model_kind": "base"},
}
KINDS = ("operation", "value before the first wrong one", "first wrong value", "value behind it")


def solution(problem):
    """The values of a chain, as the teacher reads them."""
    return " ".join([ANSWER, *(DIGITS[value] for value in problem.values)])


def rows(count, seed, split="train"):
    problems = TASK.problems(count, seed, split)
    return [{"prompt": one.prompt, "trace": one.trace, "solution": solution(one)} for one in problems]


def pairs(step, size=32):
    """Prompts of the cold start, most of them behind the values."""
    made = rows(size, 100_000 + step)
    bare = int(size * WITHOUT_CONTEXT)
    return [
        (one["prompt"] if number < bare else f"{one['solution']} {one['prompt']}", one["trace"])
        for number, one in enumerate(made)
    ]


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
    """Share of drift events among the student's tokens of each kind, and their number, with and without the context."""
    tokenizer, problems, found = load_tokenizer(), TASK.problems(count, 7, "evaluation"), []
    ends = (tokenizer.eos_token_id,)
    engine = LoopEngine(model, Sampling(32, ends, tokenizer.pad_token_id), slots=64)
    requests = [Request(tuple(tokenizer(one.prompt)["input_ids"]), number) for number, one in enumerate(problems)]
    contexts = [TeacherContext(tuple(tokenizer(f"{solution(one)} {one.prompt}")["input_ids"])) for one in problems]
    for name, given in (("with context", contexts), ("without context", ())):
        config = DriftConfig(
            "overlap", top_k=SETTINGS["drift_top_k"], threshold=SETTINGS["drift_threshold"], weight_drop=0.0
        )
        monitor = DriftMonitor(
            LocalTeacher(model, top_k=2), config, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, truncate=False
        )
        watch = monitor.begin(contexts=given)
        list(engine.generate(requests, watch))
        rollouts, events = watch.rollouts(), {kind: [] for kind in KINDS}
        for row, problem in enumerate(problems):
            words = tokenizer.convert_ids_to_tokens(rollouts.response_ids[row][rollouts.response_mask[row]])
            for column, kind in enumerate(kinds_of(problem, words)):
                events[kind].append(bool(rollouts.drift_events[row, column]))
        found += [
            {"teacher": name, "kind": kind, "tokens": len(values), "events": sum(values) / max(1, len(values))}
            for kind, values in events.items()
        ]
    return found


def draw(path, found):
    figure, axes = new_figure("Where drift events fall", "the student's token", "share with a drift event")
    width = 0.4
    for number, name in enumerate(("with context", "without context")):
        shares = [one["events"] for one in found if one["teacher"] == name]
        places = [place + (number - 0.5) * width for place in range(len(KINDS))]
        axes.bar(places, shares, width, label=f"teacher {name}", hatch=("", "//")[number])
    axes.set_xticks(
        range(len(KINDS)), [kind.replace(" before", "\nbefore").replace(" behind", "\nbehind") for kind in KINDS]
    )
    axes.legend()
    save_figure(figure, path, found)


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
    found = drift_by_kind(start)
    draw(folder / "drift_by_kind.png", found)
    print(json.dumps(found), flush=True)
    runs, state = [], start.state_dict()
    for seed in arguments.seeds:
        evaluation = Dataset.from_list(rows(512, seed + 1, "evaluation"))
        for arm in arguments.arms:
            settings = ARMS[arm]
            student = load_student()
            student.load_state_dict(state)
            train = Dataset.from_list(rows(ROWS, seed))
            _, curve = distil(student, None, train, evaluation, seed=seed, steps=arguments.steps, **settings)
            runs.append({"arm": arm, "seed": seed, "curve": curve})
            print(arm, seed, curve[0], curve[-1], flush=True)
    summary = {
        arm: interval([run["curve"][-1]["accuracy"] for run in runs if run["arm"] == arm]) for arm in arguments.arms
    }
    print(json.dumps(summary), flush=True)
    (folder / "privileged_context.json").write_text(
        json.dumps({"runs": runs, "mean_low_high": summary}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
