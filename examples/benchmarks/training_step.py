"""One training step of this package against TRL's DistillationTrainer: same models, prompts and completion length, in turns.

    python examples/benchmarks/training_step.py            # CPU, one thread, about ten minutes
    python examples/benchmarks/training_step.py --compiled # the same ways again with compile_decoding beside them
    python examples/benchmarks/training_step.py --tiny     # half a minute, only to see that it runs

Random weights: what is measured depends on how much is generated, not on what. Completions are exactly as long as allowed,
since the end token is suppressed on both sides. "Half of the tokens drifted" comes in two kinds: every row ends half-way, or
each row ends at a random token (geometric, clipped, the mean half-way), which is how drift falls and is harder: the loop runs
on for the last row. All go through the real monitor; only which tokens count as drift events is given.

In the case with fewer slots than rollouts another rollout takes the slot of one that ended. TRL generates all rollouts of a step
at once; with the same number of rows in memory it needs as many steps as there are micro-batches, and that is what ours is
compared with. Beside it stands TRL with all rollouts at once, which holds several times as many rows.

The floor is what a step cannot do without: decoding with the bare loop, one teacher pass over the finished sequences, one
forward and backward pass of the student.
"""

import argparse
import contextlib
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from transformers.utils import logging as transformers_logging

import prune_opd_hf.generation.watch as watch_module
from prune_opd_hf import PruneOPDConfig, PruneOPDTrainer, pruned_generate
from prune_opd_hf.training.pruning import stop_probability

ALL_AT_ONCE = "TRL, all rollouts at once"

EOS, PAD = 1, 0
PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison.

    Attributes:
        vocabulary: of both models.
        batch: rollouts of one micro-batch, and of one generation.
        completion: response tokens.
        accumulation: micro-batches of a step.
    """

    vocabulary: int
    batch: int
    completion: int
    accumulation: int = 1


CASES = (Case(512, 8, 128), Case(32_768, 4, 128), Case(512, 8, 128, accumulation=4))
TINY = (Case(512, 4, 32), Case(512, 2, 16, accumulation=2))
STUDENT, TEACHER = (64, 192, 2), (256, 896, 4)  # hidden, intermediate, layers: 0.17M and 4.1M at a vocabulary of 512


def model(shape: tuple[int, int, int], vocabulary: int, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3-shaped model with random weights."""
    hidden, intermediate, layers = shape
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=hidden // 4,
            tie_word_embeddings=False,
            eos_token_id=EOS,
            pad_token_id=PAD,
            bos_token_id=None,
        )
    )


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Words w3, w4, ... as tokens, behind padding, end and unknown."""
    special = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2}
    words = special | {f"w{index}": index for index in range(len(special), vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )


def prompts(case: Case, count: int = 64) -> Dataset:
    """Random prompts of one length."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, case.vocabulary, (count, PROMPT_TOKENS), generator=generator)
    return Dataset.from_list([{"prompt": " ".join(f"w{token}" for token in row)} for row in ids.tolist()])


class StepTimes(TrainerCallback):
    """Seconds from one optimizer step's end to the next; the first of a run, with its set-up, is left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last: float | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """A new run."""
        self.last = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The end of a step."""
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now


def common(case: Case, folder: str, steps: int) -> dict[str, Any]:
    """Settings that both sides share."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "max_steps": steps,
        "per_device_train_batch_size": case.batch,
        "gradient_accumulation_steps": case.accumulation,
        "max_completion_length": case.completion,
        "temperature": 1.0,
        "gradient_checkpointing": False,
        "generation_kwargs": {"suppress_tokens": [EOS]},
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def ours(case: Case, folder: str, steps: int, **changes: Any) -> PruneOPDTrainer:
    """This package's trainer."""
    args = PruneOPDConfig(
        **common(case, folder, steps),
        **{
            "num_generations": 1,
            "generation_batch_size": case.batch,
            "pruning": "none",
            "budget_minimum": 1,
            "drift_min_length": 0,
            **changes,
        },
    )
    return PruneOPDTrainer(
        model(STUDENT, case.vocabulary, 1),
        model(TEACHER, case.vocabulary, 2),
        args,
        prompts(case),
        processing_class=tokenizer(case.vocabulary),
    )


def theirs(case: Case, folder: str, steps: int) -> Any:
    """TRL's trainer."""
    from trl import DistillationConfig, DistillationTrainer

    return DistillationTrainer(
        model=model(STUDENT, case.vocabulary, 1),
        teacher_model=model(TEACHER, case.vocabulary, 2),
        args=DistillationConfig(**common(case, folder, steps)),
        train_dataset=prompts(case),
        processing_class=tokenizer(case.vocabulary),
    )


@contextlib.contextmanager
def random_events(case: Case) -> Iterator[None]:
    """While this lasts, each token is a drift event with the probability that makes half of the tokens the mean kept."""
    stop = stop_probability(case.completion / 2, 1, case.completion)
    generator = torch.Generator().manual_seed(4)
    before = watch_module.find_drift_events

    def events(config: Any, mask: torch.Tensor, positions: Any) -> torch.Tensor:
        return (torch.rand(mask.shape, generator=generator) < stop) & mask

    watch_module.find_drift_events = events
    try:
        yield
    finally:
        watch_module.find_drift_events = before


def floor_seconds(case: Case, repeats: int) -> dict[str, float]:
    """What no trainer can do without, by part: medians."""
    student, teacher = model(STUDENT, case.vocabulary, 1), model(TEACHER, case.vocabulary, 2)
    ids = torch.randint(3, case.vocabulary, (case.batch, PROMPT_TOKENS))

    def generate() -> torch.Tensor:
        return student.generate(
            ids,
            max_new_tokens=case.completion,
            do_sample=True,
            top_k=0,
            suppress_tokens=[EOS],
            custom_generate=pruned_generate,
        )

    whole = generate()

    def teach() -> None:
        with torch.no_grad():
            hidden = teacher.model(whole, use_cache=False).last_hidden_state[:, PROMPT_TOKENS - 1 : -1]
            teacher.lm_head(hidden)

    def update() -> None:
        hidden = student.model(whole, use_cache=False).last_hidden_state
        hidden.sum().backward()

    seconds = {}
    for name, part in (("generate", generate), ("teacher", teach), ("update", update)):
        part()
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            part()
            times.append(time.perf_counter() - started)
        seconds[name] = statistics.median(times)
    return seconds


def settings_of(case: Case) -> dict[str, dict[str, Any]]:
    """This package's ways."""
    half = {"pruning": "drift", "drift_min_length": 0, "budget_initial": case.completion, "budget_hit_ratio": 0.0}
    half_way = {"drift_metric": "overlap", "drift_threshold": 1.0, "drift_weight_drop": 2 / case.completion}
    return {
        "ours, nothing drifts": {},
        "ours, nothing drifts, reverse KL": {"loss_type": "reverse_kl"},
        "ours, every row drifts half-way": half | half_way,  # an event at every token of two unrelated models
        "ours, half of the tokens at random": half | {"drift_weight_drop": 1.0},
    }


def compare(case: Case, turns: int, steps: int, *, compiled: bool = False) -> dict[str, Any]:
    """Steps of every way, in turns; medians, ratios to TRL, and this package's seconds by phase."""
    settings = settings_of(case)
    if compiled:
        how = {"rollout_engine": "loop", "compile_decoding": True}
        settings |= {f"{name}, compiled": {**changes, **how} for name, changes in settings.items()}
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, Any] = {
            "TRL": theirs(replace(case, accumulation=1), folder, steps),
            **({ALL_AT_ONCE: theirs(case, folder, steps)} if case.accumulation > 1 else {}),
            **{name: ours(case, folder, steps, **changes) for name, changes in settings.items()},
        }
        clocks = {name: StepTimes() for name in ways}
        for name, trainer in ways.items():
            trainer.add_callback(clocks[name])
            for callback in list(trainer.callback_handler.callbacks):
                if type(callback).__name__ in ("PrinterCallback", "ProgressCallback", "ProgressLine"):
                    trainer.remove_callback(callback)
        for _ in range(turns):
            for name, trainer in ways.items():
                with random_events(case) if "random" in name else contextlib.nullcontext():
                    trainer.train()
    medians = {name: statistics.median(clock.seconds) for name, clock in clocks.items()}
    medians["TRL"] *= case.accumulation
    result: dict[str, Any] = {"case": asdict(case), "steps": turns * (steps - 1), "seconds": medians}
    result["ratio to TRL"] = {name: seconds / medians["TRL"] for name, seconds in medians.items()}
    result["by phase"], result["kept share"] = {}, {}
    for name, trainer in ways.items():
        if isinstance(trainer, PruneOPDTrainer):
            total = sum(trainer.phase_seconds.values())
            result["by phase"][name] = {phase: seconds / total for phase, seconds in trainer.phase_seconds.items()}
            result["kept share"][name] = trainer.counts.kept / (trainer.counts.rollouts * case.completion)
    floor = floor_seconds(case, turns * 2)
    result["floor"] = {**floor, "ratio to TRL": case.accumulation * sum(floor.values()) / medians["TRL"]}
    return result


def show(result: dict[str, Any]) -> None:
    """One comparison, as a table."""
    case = result["case"]
    rollouts = f"{case['batch'] * case['accumulation']} rollouts, {case['batch']} at a time"
    print(f"\n{rollouts}, {case['completion']} tokens, vocabulary {case['vocabulary']:,}")
    print(f"  medians of {result['steps']} steps, all ways in turns")
    for name, seconds in result["seconds"].items():
        line = f"  {name:<46} {seconds * 1000:8.1f} ms   {result['ratio to TRL'][name]:.2f} of TRL"
        if name in result["by phase"]:
            shares = ", ".join(f"{phase} {share:.0%}" for phase, share in result["by phase"][name].items())
            line += f"   kept {result['kept share'][name]:.0%}; {shares}"
        print(line)
    floor = result["floor"]
    parts = ", ".join(f"{name} {floor[name] * 1000:.1f} ms" for name in ("generate", "teacher", "update"))
    print(f"  floor without pruning: {floor['ratio to TRL']:.2f} of TRL ({parts})")


def main() -> int:
    """Compare, print, and write the numbers where told."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--compiled", action="store_true", help="also with compile_decoding")
    parser.add_argument("--case", type=int, default=None, help="only this case (0, 1 or 2)")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps", type=int, default=5, help="steps of each way in each turn; the first is not counted")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    cases = TINY if arguments.tiny else CASES
    cases = cases if arguments.case is None else cases[arguments.case : arguments.case + 1]
    turns, steps = (1, 3) if arguments.tiny else (arguments.turns, arguments.steps)
    results = []
    for case in cases:
        results.append(compare(case, turns, steps, compiled=arguments.compiled))
        show(results[-1])
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
