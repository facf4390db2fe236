"""Two teachers, two domains: each knows one answer style, and the student must learn both.

    python examples/teachers/two_domains.py --output_dir examples/results/teachers/two_domains

Domain "worked":  , +3 , x7 = 4      ->  +3 7 x7 9             the shipped teacher's style
Domain "named":   so +3 so x7 = 4    ->  +3 7 x7 9 ANS 9       its style after fine-tuning on that alone

The second teacher is trained until it answers its own domain (`LEAST_ACCURACY`); otherwise nothing is distilled. The student knows
both styles, and not which belongs where: its cold start draws the style of each prompt at random. (A student that gives a style no
probability at all cannot find it: it learns from its own samples.) Runs that are in runs.json are not repeated.
"""

import argparse
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tasks import Runs, accuracy, distil, fine_tune

from prune_opd_hf.records.figures import Line, draw_lines
from prune_opd_hf.records.files import write_json
from prune_opd_hf.tasks import ChainTask, load_student, load_teacher
from prune_opd_hf.tasks.chain import ANSWER, END, SEPARATOR

TASK = ChainTask()
TEACHER_STEPS, STUDENT_STEPS = 2000, 600
LEAST_ACCURACY = 0.95
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


def pairs_of(domain, problems):
    """Pairs of prompt and trace of a domain."""
    return [tuple(row(problem, domain).values()) for problem in problems]


def named_pairs(step, size=32):
    """A batch of the domain "named"."""
    return pairs_of("named", TASK.problems(size, 100_000 + step))


def mixed_pairs(step, size=32):
    """Prompts of either domain with traces of either."""
    problems = TASK.problems(size, 200_000 + step)
    kinds = [(DOMAINS[number % 2], DOMAINS[number // 2 % 2]) for number in range(size)]
    both = zip(problems, kinds, strict=True)
    return [(row(problem, asked)["prompt"], row(problem, style)["trace"]) for problem, (asked, style) in both]


def draw(path, runs):
    lines = []
    for arm in ARMS:
        curves = [run["curve"] for run in runs if run["arm"] == arm]
        name = "each row's own teacher" if arm == "routed" else f'teacher "{arm}" alone'
        for domain in DOMAINS:
            points = list(zip(*curves, strict=True))
            means = [100 * sum(at[f"accuracy_{domain}"] for at in point) / len(point) for point in points]
            lines.append(Line(f"{name}: {domain}", [point[0]["step"] for point in points], means))
    axes = {"x_label": "optimizer steps", "y_label": "exact match, percent", "y_range": (0, 100)}
    draw_lines(path, lines, title="Two domains, one teacher each", **axes)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder, held_out = Path(arguments.output_dir), TASK.problems(256, 5, "evaluation")

    def is_good(teacher):
        found = accuracy(teacher, pairs_of("named", held_out))
        print("the second teacher answers its own domain:", found, flush=True)
        return found > LEAST_ACCURACY

    teachers = {
        "worked": load_teacher(),
        "named": fine_tune(load_teacher(), named_pairs, TEACHER_STEPS, is_done=is_good),
    }
    known = {
        f"{name} teacher, {domain}": accuracy(teacher, pairs_of(domain, held_out))
        for name, teacher in teachers.items()
        for domain in DOMAINS
    }
    print(known, flush=True)
    if known["named teacher, named"] <= LEAST_ACCURACY:
        return 1
    start = fine_tune(load_student(), mixed_pairs, STUDENT_STEPS).state_dict()
    runs = Runs(folder / "runs.json")
    write_json(folder / "teachers.json", known)
    for arm, seed in runs.missing(ARMS, arguments.seeds):
        train, evaluation = Dataset.from_list(rows(ROWS, seed)), Dataset.from_list(rows(256, seed + 1, "evaluation"))
        student = load_student()
        student.load_state_dict(start)
        teacher = teachers if arm == "routed" else teachers[arm]
        _, curve = distil(student, teacher, train, evaluation, seed=seed, steps=arguments.steps)
        runs.add(arm=arm, seed=seed, curve=curve)
    draw(folder / "accuracy.png", runs.runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
