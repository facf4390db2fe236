"""Two teachers, two domains: each knows one answer style, and the student must learn both.

    python examples/teachers/two_domains.py --output_dir examples/results/teachers/two_domains

Domain "worked":  , +3 , x7 = 4      ->  +3 7 x7 9           the shipped teacher's style
Domain "terse":   so , +3 , x7 = 4   ->  7 9 ANS 9           its style after fine-tuning on that alone
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from tasks import distil, fine_tune

from prune_opd_hf.tasks import ChainTask, load_student, load_teacher
from prune_opd_hf.tasks.chain import ANSWER, DIGITS, END

TASK = ChainTask(operations=6)
TEACHER_STEPS, STUDENT_STEPS = 400, 120
STEPS, ROWS = 120, 8192
ARMS = ("routed", "worked", "terse")


def row(problem, domain):
    """One problem as a row of a domain."""
    if domain == "worked":
        return {"prompt": problem.prompt, "trace": problem.trace}
    values = [DIGITS[value] for value in problem.values]
    return {"prompt": f"so {problem.prompt}", "trace": " ".join([*values, ANSWER, problem.answer, END])}


def rows(count, seed, split="train"):
    """Both domains in turn, each with its teacher."""
    problems = TASK.problems(count, seed, split)
    domains = [("worked", "terse")[number % 2] for number in range(count)]
    return [
        {**row(problem, domain), "domain": domain, "teacher": domain}
        for problem, domain in zip(problems, domains, strict=True)
    ]


def batches(domains, size=32, seed=100):
    """Pairs of prompt and trace for fine-tuning."""

    def pairs(step):
        problems = TASK.problems(size, seed * 1000 + step)
        made = [row(problem, domains[number % len(domains)]) for number, problem in enumerate(problems)]
        return [(one["prompt"], one["trace"]) for one in made]

    return pairs


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teachers = {
        "worked": fine_tune(load_teacher(), batches(["worked"]), TEACHER_STEPS),
        "terse": fine_tune(load_teacher(), batches(["terse"]), TEACHER_STEPS),
    }
    start = fine_tune(load_student(), batches(["worked", "terse"]), STUDENT_STEPS).state_dict()
    found = []
    for seed in arguments.seeds:
        train, evaluation = Dataset.from_list(rows(ROWS, seed)), Dataset.from_list(rows(512, seed + 1, "evaluation"))
        for arm in ARMS:
            student = load_student()
            student.load_state_dict(start)
            teacher = teachers if arm == "routed" else teachers[arm]
            _, curve = distil(
                student, teacher, train, evaluation, seed=seed, steps=arguments.steps, max_completion_length=32,
                budget_initial=32, budget_minimum=8, budget_step=4, budget_margin=4, learning_rate=5e-4,
            )  # fmt: skip
            found.append({"arm": arm, "seed": seed, "curve": curve})
            print(arm, seed, curve[0], curve[-1], flush=True)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "two_domains.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
