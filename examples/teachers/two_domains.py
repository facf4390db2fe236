"""Two teachers, two domains: each knows one answer style, and the student must learn both.

    python examples/teachers/two_domains.py --output_dir examples/results/teachers/two_domains

Domain "worked":  , +3 , x7 = 4      ->  +3 7 x7 9             the shipped teacher's style
Domain "named":   so +3 so x7 = 4    ->  +3 7 x7 9 ANS 9       its style after fine-tuning on that alone

The student knows both styles, and not which belongs where: its cold start draws the style of each prompt at random. (A student that
gives a style no probability at all cannot find it: it learns from its own samples.)
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from tasks import distil, fine_tune

from prune_opd_hf.tasks import ChainTask, load_student, load_teacher
from prune_opd_hf.tasks.chain import ANSWER, END, SEPARATOR

TASK = ChainTask()
TEACHER_STEPS, STUDENT_STEPS = 400, 120
STEPS, ROWS = 60, 8192
DOMAINS = ("worked", "named")
ARMS = ("routed", *DOMAINS)


def row(problem, domain):
    """One problem as a row of a domain."""
    if domain == "worked":
        return {"prompt": problem.prompt, "trace": problem.trace}
    worked = problem.trace.removesuffix(END)
    return {"prompt": problem.prompt.replace(SEPARATOR, "so"), "trace": f"{worked}{ANSWER} {problem.answer} {END}"}


def rows(count, seed, split="train"):
    """Both domains in turn, each with its teacher."""
    problems = TASK.problems(count, seed, split)
    domains = [DOMAINS[number % 2] for number in range(count)]
    return [
        {**row(problem, domain), "domain": domain, "teacher": domain}
        for problem, domain in zip(problems, domains, strict=True)
    ]


def named_pairs(step, size=32):
    """Pairs of prompt and trace of the domain "named"."""
    made = [row(problem, "named") for problem in TASK.problems(size, 100_000 + step)]
    return [(one["prompt"], one["trace"]) for one in made]


def mixed_pairs(step, size=32):
    """Prompts of either domain with traces of either."""
    problems = TASK.problems(size, 200_000 + step)
    kinds = [(DOMAINS[number % 2], DOMAINS[number // 2 % 2]) for number in range(size)]
    both = zip(problems, kinds, strict=True)
    return [(row(problem, asked)["prompt"], row(problem, style)["trace"]) for problem, (asked, style) in both]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teachers = {"worked": load_teacher(), "named": fine_tune(load_teacher(), named_pairs, TEACHER_STEPS)}
    start = fine_tune(load_student(), mixed_pairs, STUDENT_STEPS).state_dict()
    found = []
    for seed in arguments.seeds:
        train, evaluation = Dataset.from_list(rows(ROWS, seed)), Dataset.from_list(rows(512, seed + 1, "evaluation"))
        for arm in ARMS:
            student = load_student()
            student.load_state_dict(start)
            teacher = teachers if arm == "routed" else teachers[arm]
            _, curve = distil(student, teacher, train, evaluation, seed=seed, steps=arguments.steps)
            found.append({"arm": arm, "seed": seed, "curve": curve})
            print(arm, seed, curve[0], curve[-1], flush=True)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "two_domains.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
