"""Does every loss learn the embedded task? One short run of each, from the same student, on the same prompts.

    python examples/benchmarks/losses_embedded.py                # CPU, one thread, about ten minutes
    python examples/benchmarks/losses_embedded.py --steps 2 --problems 16    # only to see that it runs

One seed, one learning rate for all: the table tells which losses learn and which leak, not which is best.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

from prune_opd_hf import PruneOPDConfig, PruneOPDTrainer
from prune_opd_hf.study.arm_training import exact_match
from prune_opd_hf.study.demo import TRAINING
from prune_opd_hf.tasks import ChainTask, load_student, load_teacher, load_tokenizer

POLICY = {"loss_type": "topk_policy_gradient"}
LOSSES: dict[str, dict[str, Any]] = {
    "top-16 policy gradient, centred (default)": {**POLICY},
    "top-16 policy gradient, literal": {**POLICY, "loss_centered": False},
    "top-8 policy gradient, centred": {**POLICY, "loss_top_k": 8},
    "top-8 policy gradient, literal": {**POLICY, "loss_top_k": 8, "loss_centered": False},
    "top-2 policy gradient, centred": {**POLICY, "loss_top_k": 2},
    "top-2 policy gradient, literal": {**POLICY, "loss_top_k": 2, "loss_centered": False},
    "top-8 KL, reverse, renormalised": {"loss_type": "topk_kl", "loss_top_k": 8},
    "top-8 KL, reverse, tail bucket": {"loss_type": "topk_kl", "loss_top_k": 8, "topk_kl_tail": "bucket"},
    "top-8 KL, forward, tail bucket": {
        "loss_type": "topk_kl",
        "loss_top_k": 8,
        "topk_kl_direction": "forward",
        "topk_kl_tail": "bucket",
        "loss_support": "teacher",
    },
    "sampled token": {"loss_type": "sampled_token"},
    "full vocabulary, reverse KL": {"loss_type": "reverse_kl"},
    "full vocabulary, Jensen-Shannon (beta 0.5)": {"loss_type": "generalized_jsd", "beta": 0.5},
    "full vocabulary, forward KL": {"loss_type": "generalized_jsd", "beta": 0.0},
}


def run(changes: dict[str, Any], arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """One training run: exact match before and after, and what leaked."""
    settings = {
        **TRAINING,
        "pruning": "drift",
        "output_dir": folder,
        "seed": arguments.seed,
        "data_seed": arguments.seed,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        **changes,
    }
    task, student = ChainTask(), load_student()
    if arguments.untrained:
        torch.manual_seed(arguments.seed)
        student = student.__class__(student.config)
    trainer = PruneOPDTrainer(
        student,
        load_teacher(),
        PruneOPDConfig(**settings),
        task.dataset(64 * arguments.steps, seed=arguments.seed),
        task.dataset(arguments.problems, seed=arguments.seed + 1, split="evaluation"),
        processing_class=load_tokenizer(),
        compute_metrics=exact_match,
    )
    trainer.remove_callback(PrinterCallback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = trainer.evaluate()["eval_accuracy"]
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        after = trainer.evaluate()["eval_accuracy"]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    last = logged[-1]
    return {
        "before": before,
        "after": after,
        "seconds": seconds,
        "first entropy": logged[0]["student/entropy"],
        "last entropy": last["student/entropy"],
        "first mass": logged[0].get("student/topk_mass"),
        "last mass": last.get("student/topk_mass"),
        "leak warned": any("leaks out of the candidate set" in str(warning.message) for warning in caught),
    }


def line(name: str, found: dict[str, Any]) -> str:
    """One row of the table, in Markdown."""
    masses = "" if found["last mass"] is None else f"{found['first mass']:.2f} to {found['last mass']:.2f}"
    entropy = f"{found['first entropy']:.2f} to {found['last entropy']:.2f}"
    cells = [name, f"{found['before']:.1%}", f"{found['after']:.1%}", entropy, masses]
    return "| " + " | ".join([*cells, "yes" if found["leak warned"] else "", f"{found['seconds']:.0f}"]) + " |"


def main() -> int:
    """Run each loss, print the table, and write the numbers where told."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--problems", type=int, default=256, help="held-out problems of each accuracy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--untrained", action="store_true", help="from random weights, so without the cold start of the student"
    )
    parser.add_argument("--only", default="", help="only the losses whose name has these words in it")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print("| loss | exact match before | after | student entropy | mass in the set | leak warned of | seconds |")
    print("|---|---|---|---|---|---|---|")
    results = {}
    for name, changes in LOSSES.items():
        if arguments.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            results[name] = run(changes, arguments, folder)
        print(line(name, results[name]), flush=True)
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
