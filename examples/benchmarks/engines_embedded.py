"""Does the embedded task learn through vLLM as it does through the loop? Both engines, some seeds, accuracy by step.

    make test-vllm                                                               # once, for an environment with vLLM
    python examples/benchmarks/engines_embedded.py --vllm_python .venv-vllm/bin/python --output_dir DIR
    python examples/benchmarks/engines_embedded.py --steps 2 --problems 8 --seeds 0 ...    # only to see that it runs

Both train the same student on the same prompts with the settings of the demo; they differ in `rollout_engine` alone. What a student
has learned after some steps is measured through the loop, whichever engine it was trained with, and the last student's through its
own engine as well. The heads are padded to 32 numbers, for vLLM's CPU kernels know no 16. A server starts once for each seed.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from engines import server
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parents[1] / "embedded_task"))
from servable import with_heads_of_32

from prune_opd_hf import PruneOPDConfig, PruneOPDTrainer
from prune_opd_hf.records.figures import Line, draw_lines
from prune_opd_hf.records.files import write_json
from prune_opd_hf.study.arm_training import exact_match
from prune_opd_hf.study.demo import TRAINING
from prune_opd_hf.tasks import ChainTask, load_student, load_teacher, load_tokenizer


class Snapshots(TrainerCallback):
    """The student's weights before training and after every so many steps.

    Attributes:
        weights: by step.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before training."""
        self._take(0, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a step."""
        if state.global_step % self.every == 0:
            self._take(state.global_step, kwargs["model"])

    def _take(self, step: int, model: torch.nn.Module) -> None:
        self.weights[step] = {name: value.detach().clone() for name, value in model.state_dict().items()}


def trainer_of(engine: dict[str, Any], seed: int, arguments: argparse.Namespace, folder: str) -> PruneOPDTrainer:
    """A trainer of the embedded pair that samples with this engine."""
    settings = {
        **TRAINING,
        "pruning": "drift",
        "output_dir": folder,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_steps": arguments.steps,
        **engine,
    }
    task = ChainTask()
    trainer = PruneOPDTrainer(
        with_heads_of_32(load_student()),
        load_teacher(),
        PruneOPDConfig(**settings),
        task.dataset(64 * arguments.steps, seed=seed),
        task.dataset(arguments.problems, seed=seed + 1, split="evaluation"),
        processing_class=load_tokenizer(),
        compute_metrics=exact_match,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def run(engine: dict[str, Any], seed: int, arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """One training run: accuracy by step, tokens and seconds."""
    trainer, snapshots = trainer_of(engine, seed, arguments, folder), Snapshots(arguments.eval_steps)
    trainer.add_callback(snapshots)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    through_engine = trainer.evaluate()["eval_accuracy"]
    through_loop = trainer_of({"rollout_engine": "loop"}, seed, arguments, folder)
    points = {}
    for step, weights in snapshots.weights.items():
        through_loop.model.load_state_dict(weights)
        points[step] = through_loop.evaluate()["eval_accuracy"]
    return {
        "accuracy": points,
        "last_through_its_engine": through_engine,
        "kept_tokens": trainer.counts.kept,
        "seconds": seconds,
    }


def write_results(results: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> str:
    """The numbers, the figure and the table of what is there so far; returns the table."""
    write_json(arguments.output_dir / "embedded.json", results)
    curves = [
        Line(f"{name}, seed {seed}", list(found["accuracy"]), [100 * share for share in found["accuracy"].values()])
        for name, runs in results.items()
        for seed, found in zip(arguments.seeds, runs, strict=False)
    ]
    axes = {"x_label": "optimizer steps", "y_label": "exact match, percent"}
    draw_lines(arguments.output_dir / "embedded.png", curves, title="The embedded task through two engines", **axes)
    lines = ["| step | " + " | ".join(curve.label for curve in curves) + " |", "|---" * (len(curves) + 1) + "|"]
    for index, step in enumerate(curves[0].x):
        lines.append(f"| {step} | " + " | ".join(f"{curve.y[index]:.1f}" for curve in curves) + " |")
    return "\n".join(lines)


def main() -> int:
    """Train, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm_python", default=".venv-vllm/bin/python", help="of an environment with vLLM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--eval_steps", type=int, default=20)
    parser.add_argument("--problems", type=int, default=256, help="held-out problems of each accuracy")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    results: dict[str, list[dict[str, Any]]] = {"loop": [], "vllm": []}
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            results["loop"].append(run({"rollout_engine": "loop"}, seed, arguments, folder))
            print("loop", seed, json.dumps(results["loop"][-1]), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            with_heads_of_32(load_student()).save_pretrained(folder)
            with server(arguments.vllm_python, Path(folder), max_model_len=512) as url:
                engine = {"rollout_engine": "vllm", "vllm_mode": "server", "vllm_server_base_url": url}
                results["vllm"].append(run(engine, seed, arguments, f"{folder}/run"))
            print("vllm", seed, json.dumps(results["vllm"][-1]), flush=True)
        print(write_results(results, arguments), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
