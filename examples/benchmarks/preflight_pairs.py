"""Is the preflight's advice right on pairs of which the right advice is known? Five pairs, several seeds, 64 rollouts each.

    python examples/embedded_task/build_weights.py --task varied --output_dir runs/varied --seed 1
    python examples/real_pair/cold_start.py
    python examples/benchmarks/preflight_pairs.py --seeds 0 1 2

Every rollout answers a prompt of its own. A pair's prompts differ from seed to seed.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from prune_opd_hf.preflight import preflight
from prune_opd_hf.records.files import write_text
from prune_opd_hf.tasks import ChainTask, load_student, load_teacher, load_tokenizer

ROLLOUTS = 64
RIGHT = {
    "embedded": "prune",
    "varied": "prune",
    "SmolLM2 without three layers": "do not prune",
    "a student as its own teacher": "do not prune",
    "an untrained student": "will not work",
}


def look(name: str, seed: int, varied: Path, real: Path):
    """The report of one pair."""
    settings = {"num_generations": 1, "seed": seed, "check_every": 8, "generation_batch_size": 32}
    if name.startswith("SmolLM2"):
        lines = (real / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines[ROLLOUTS * seed : ROLLOUTS * (seed + 1)]]
        models = (AutoModelForCausalLM.from_pretrained(real / folder) for folder in ("cold_started", "teacher"))
        tokenizer = AutoTokenizer.from_pretrained(real / "teacher")
        return preflight(*models, prompts, processing_class=tokenizer, max_completion_length=64, **settings)
    task = ChainTask(operations=24, operations_min=4) if name == "varied" else ChainTask()
    student, teacher = load_student(), load_teacher()
    if name == "varied":
        student, teacher = (AutoModelForCausalLM.from_pretrained(varied / folder) for folder in ("student", "teacher"))
    elif name == "a student as its own teacher":
        teacher = student
    elif name == "an untrained student":
        torch.manual_seed(seed)
        student = Qwen3ForCausalLM(student.config).eval()
    prompts = [problem.prompt for problem in task.problems(ROLLOUTS, seed=600 + seed)]
    settings |= {"processing_class": load_tokenizer(), "max_completion_length": 136 if name == "varied" else 112}
    return preflight(student, teacher, prompts, **settings)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--varied", type=Path, default=Path("runs/varied"))
    parser.add_argument("--real", type=Path, default=Path("runs/real"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", nargs="+", choices=RIGHT, default=list(RIGHT))
    parser.add_argument("--output", type=Path, default=Path("examples/results/preflight_pairs/README.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    reading = arguments.output.parent / "reading.md"  # what the table says, written by hand
    lines = [
        "# Five pairs whose right advice is known",
        "",
        *([reading.read_text(encoding="utf-8").strip(), ""] if reading.exists() else []),
        f"Command: `python examples/benchmarks/preflight_pairs.py --seeds {' '.join(map(str, arguments.seeds))}`. {ROLLOUTS} "
        "rollouts of as many prompts each.",
        "",
        "| pair | right advice | seed | advice | its reason |",
        "|---|---|---|---|---|",
    ]
    for name in arguments.pairs:
        for seed in arguments.seeds:
            advice = look(name, seed, arguments.varied, arguments.real).recommendation
            found = "prune" if advice.row else "do not prune" if advice.works else "will not work"
            right = found == RIGHT[name]
            lines.append(
                f"| {name} | {RIGHT[name]} | {seed} | {found if right else f'**{found}**'} | {' '.join(advice.reason[:2])} |"
            )
            print(lines[-1], flush=True)
    write_text(arguments.output, "\n".join([*lines, ""]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
