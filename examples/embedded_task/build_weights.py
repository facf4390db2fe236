"""Rebuilds the shipped weights: `python examples/embedded_task/build_weights.py --output_dir DIR --seed 1`.

Trains teacher and student, measures both with the package's evaluator, and writes the folder atomically, with prompts to train
on and problems to evaluate on beside them. `--task varied` makes the variant whose good responses differ in length.
"""

import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import torch
import transformers
from recipes import TASKS, Recipe, cold_start_student, train_teacher
from style_b import DriftingTask, is_drifting
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase
from word_tokenizer import build_tokenizer

from prune_opd_hf.errors import ConfigError, PruneOPDError
from prune_opd_hf.evaluation import Estimate, evaluate_model, read_samples
from prune_opd_hf.evaluation.benchmarks import chain_benchmark
from prune_opd_hf.tasks import Problem

README = """\
# The teacher and the student of the embedded task

Made by

    python examples/embedded_task/build_weights.py --output_dir {folder} --seed {seed}{variant}

on {device} with {threads} CPU thread(s): Python {python}, torch {torch}, transformers {transformers}, tokenizers {tokenizers}.
With other versions, devices or numbers of threads the weights differ in rounding, and the figures a little.

Exact match on {problems} problems of the evaluation split, one response each, at most {cap} tokens; sampled at temperature 1
from the whole distribution (seed {seed}) and greedily, with the 95% interval. Guessing is right once in 10.

| model | parameters | decoding | exact match | 95% interval | responses in style B |
|---|---|---|---|---|---|
{rows}

- Task: `{task}`.
- Teacher: {teacher_recipe}.
- Student, before distillation: {student_recipe}.
"""

TRAINING_PROMPTS = 16_384


@dataclass(frozen=True)
class BuildArguments:
    """Train the teacher and the student of the embedded task and write them to a new folder."""

    output_dir: str = field(metadata={"help": "folder to create; it must not exist yet"})
    task: str = field(default="embedded", metadata={"help": f"what they learn: {' or '.join(TASKS)}"})
    seed: int = field(default=0, metadata={"help": "of the weights, the problems and the sampling"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})
    threads: int = field(default=1, metadata={"help": "CPU threads; another number rounds differently"})
    problems: int = field(default=512, metadata={"help": "evaluation problems to measure both models on"})

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        for name in ("threads", "problems"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


def build(
    output: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    problems: int = 512,
    task_name: str = "embedded",
    recipes: tuple[DriftingTask, Recipe, Recipe] | None = None,
) -> None:
    """Train, measure and save both models: `teacher/`, `student/`, `README.md`, `training.jsonl` and `evaluation.jsonl` under
    `output`.

    Args:
        output: the folder to create.
        seed: of the weights, the problems and the sampling.
        device: "cpu" or "cuda".
        problems: number of evaluation problems.
        task_name: what they learn, of `TASKS`.
        recipes: the task and how teacher and student are made, instead of those of `task_name`.

    Raises:
        FileExistsError: `output` exists already; nothing is trained.
        OSError: it cannot be made there; nothing is trained.
        ConfigError: as `train_teacher`.
    """
    task, teacher_recipe, student_recipe = recipes or TASKS[task_name]
    tokenizer = build_tokenizer()
    with _new_folder(output) as folder:
        models = {
            "teacher": train_teacher(task, recipe=teacher_recipe, seed=seed, device=device),
            "student": cold_start_student(task, recipe=student_recipe, seed=seed, device=device),
        }
        for name, model in models.items():
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)  # before it pads a batch, which it would remember in its file
        rows = [
            row for name, model in models.items() for row in _table_rows(name, model, tokenizer, task, problems, seed)
        ]
        readme = README.format(
            folder=output.name,
            seed=seed,
            variant="" if task_name == "embedded" else f" --task {task_name}",
            device=device,
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
            tokenizers=tokenizers.__version__,
            problems=problems,
            cap=task.longest_response_tokens,
            task=task,
            rows="\n".join(rows),
            teacher_recipe=_describe(teacher_recipe),
            student_recipe=_describe(student_recipe),
        )
        (folder / "README.md").write_text(readme, encoding="utf-8")
        task.dataset(TRAINING_PROMPTS, seed).to_json(folder / "training.jsonl")
        task.dataset(problems, seed + 1, split="evaluation").to_json(folder / "evaluation.jsonl")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 with one line on stderr where it cannot start."""
    try:
        (options,) = HfArgumentParser(BuildArguments).parse_args_into_dataclasses(arguments)
        torch.set_num_threads(options.threads)
        build(
            Path(options.output_dir),
            seed=options.seed,
            device=options.device,
            problems=options.problems,
            task_name=options.task,
        )
    except (OSError, PruneOPDError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.output_dir}")
    return 0


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> tuple[Estimate, float]:
    """Exact match of one response to each problem, and the share of responses in style B."""
    with tempfile.TemporaryDirectory() as folder:
        report = evaluate_model(
            model,
            [chain_benchmark(problems)],
            processing_class=tokenizer,
            num_generations=1,
            temperature=temperature,
            top_p=1.0,
            max_completion_length=max_new_tokens,
            seed=seed,
            slots=128,
            output_dir=folder,
            model_name="embedded",
            progress=False,
        )
        drifting = sum(is_drifting(sample.response) for sample in read_samples(folder)) / len(problems)
    return report["chain"].metrics["avg@1"], drifting


def _table_rows(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: DriftingTask, problems: int, seed: int
) -> list[str]:
    questions = task.problems(problems, seed, split="evaluation")
    rows = []
    for decoding, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        exact, drifting = measure(
            model,
            tokenizer,
            questions,
            max_new_tokens=task.longest_response_tokens,
            temperature=temperature,
            seed=seed,
        )
        rows.append(
            f"| {name} | {model.num_parameters():,} | {decoding} | {exact.value:.1%} | {exact.low:.1%} to {exact.high:.1%} "
            f"| {drifting:.1%} |"
        )
    return rows


def _describe(recipe: Recipe) -> str:
    return (
        f"{recipe.clean_steps} steps of style A and {recipe.mixed_steps} of mixed traces, batch {recipe.batch_size}, "
        f"AdamW, learning rate {recipe.learning_rate:g} ({recipe.schedule}, {recipe.warmup_steps} warm-up steps)"
    )


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write into, which takes its name at the end, or disappears where anything fails."""
    if output.exists():
        raise FileExistsError(f"the output folder exists already: {output}; name a new one or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes it private
        folder.rename(output)
    except BaseException:
        shutil.rmtree(folder)
        raise


if __name__ == "__main__":
    sys.exit(main())
