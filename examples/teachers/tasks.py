"""What the studies of teachers share: fine-tuning of the embedded models, runs of the trainer that are kept as they
come, exact match by domain."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback

from prune_opd_hf import PruneOPDConfig, PruneOPDTrainer
from prune_opd_hf.generation import LoopEngine, Request, Sampling
from prune_opd_hf.records.files import write_json
from prune_opd_hf.tasks import load_tokenizer
from prune_opd_hf.tasks.chain import END

IGNORED_LABEL = -100
ASK_EVERY = 100
SETTINGS = {
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "num_generations": 1,
    "max_prompt_length": 64,
    "max_completion_length": 112,
    "drift_metric": "overlap",
    "drift_top_k": 2,
    "drift_threshold": 0.5,
    "drift_weight_drop": 0.25,
    "drift_min_length": 0,
    "check_every": 8,
    "loss_top_k": 16,
    "budget_initial": 112,
    "budget_minimum": 16,
    "budget_step": 16,
    "budget_margin": 16,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
"""Those of examples/configs/study_embedded.yaml."""


def fine_tune(
    model: Any,
    pairs: Callable[[int], Sequence[tuple[str, str]]],
    steps: int,
    *,
    learning_rate: float = 1e-3,
    is_done: Callable[[Any], bool] = lambda model: False,
) -> Any:
    """Teach a model the responses of (prompt, response) pairs in place: `pairs(step)` gives a batch. It ends early where `is_done`
    says so, which is asked every `ASK_EVERY` steps."""
    tokenizer, optimizer = load_tokenizer(), torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    model.train()
    for step in range(steps):
        ids, labels = [], []
        for prompt, response in pairs(step):
            asked = tokenizer(prompt)["input_ids"]
            answer = tokenizer(response, add_special_tokens=False)["input_ids"]
            ids.append(torch.tensor(asked + answer))
            labels.append(torch.tensor([IGNORED_LABEL] * len(asked) + answer))
        batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        target = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 20)
        loss = model(input_ids=batch, labels=target).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % ASK_EVERY == 0 and is_done(model.eval()):
            break
        model.train()
    return model.eval()


def accuracy(model: Any, pairs: Sequence[tuple[str, str]], seed: int = 0) -> float:
    """The share of prompts whose response, sampled at temperature 1, is the trace beside it."""
    tokenizer = load_tokenizer()
    sampling = Sampling(SETTINGS["max_completion_length"], (tokenizer.eos_token_id,), tokenizer.pad_token_id)
    requests = [
        Request(tuple(tokenizer(prompt)["input_ids"]), seed + number) for number, (prompt, _) in enumerate(pairs)
    ]
    answers = {
        done.request: tokenizer.decode(done.token_ids) for done in LoopEngine(model, sampling).generate(requests)
    }
    return sum(answers[number].split() == trace.split() for number, (_, trace) in enumerate(pairs)) / len(pairs)


class Runs:
    """Runs as they come, in a JSON file: one that is there already is not repeated.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.runs: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def missing(self, arms: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
        """What has not run yet, a seed at a time."""
        there = {(run["arm"], run["seed"]) for run in self.runs}
        return [(arm, seed) for seed in seeds for arm in arms if (arm, seed) not in there]

    def add(self, **run: Any) -> None:
        """Keep a run."""
        self.runs.append(run)
        write_json(self.path, self.runs)
        print(json.dumps(run), flush=True)

    def last(self, arm: str, name: str = "accuracy") -> list[float]:
        """What the runs of an arm ended with, by seed."""
        return [run["curve"][-1][name] for run in sorted(self.runs, key=lambda run: run["seed"]) if run["arm"] == arm]


def exact_match(prediction: Any) -> dict[str, float]:
    """The share of responses that are the trace of their row, word by word; apart for each value of a column `domain`."""
    hits: dict[str, list[bool]] = {"accuracy": []}
    for completion, row in zip(prediction.predictions, prediction.label_ids, strict=True):
        hit = completion.ended and completion.text.split() == [word for word in row["trace"].split() if word != END]
        hits["accuracy"].append(hit)
        if "domain" in row:
            hits.setdefault(f"accuracy_{row['domain']}", []).append(hit)
    return {name: sum(values) / len(values) for name, values in hits.items()}


def distil(
    student: Any,
    teacher: Any,
    train: Dataset,
    evaluation: Dataset,
    *,
    seed: int,
    steps: int,
    points: int = 4,
    **settings: Any,
) -> tuple[PruneOPDTrainer, list[dict[str, float]]]:
    """Train, and return the trainer with what evaluations found at equal steps, the first before any step."""
    curve = []
    with tempfile.TemporaryDirectory() as folder:
        how: Mapping[str, Any] = {
            **SETTINGS,
            "output_dir": folder,
            "seed": seed,
            "data_seed": seed,
            "max_steps": steps,
            **settings,
        }
        trainer = PruneOPDTrainer(
            student,
            teacher,
            PruneOPDConfig(**how, eval_strategy="steps", eval_steps=max(1, steps // points), eval_on_start=True),
            train,
            evaluation,
            processing_class=load_tokenizer(),
            compute_metrics=exact_match,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    for entry in trainer.state.log_history:
        if "eval_accuracy" in entry:
            found = {
                name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_accuracy")
            }
            curve.append({"step": entry["step"], **found})
    return trainer, curve


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of a few seeds, by Student's t."""
    quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}[len(values)]
    numbers = torch.tensor(values, dtype=torch.float64)
    half = quantile * float(numbers.std()) / len(values) ** 0.5
    return float(numbers.mean()), float(numbers.mean()) - half, float(numbers.mean()) + half
