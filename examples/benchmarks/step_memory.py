"""Peak memory of a training step against what the preflight predicts.

On a CPU, where it is the resident memory of a process of its own, over a whole second step (sampling, update, optimizer), above
what it held before models were loaded.

    python examples/benchmarks/step_memory.py --output_dir examples/results/packing

Students and teachers have random weights. Quantized ones need bitsandbytes, and are saved as such: a file that is quantized as
it is loaded stays mapped, and counts as resident. "disk" is Accelerate's offload.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from training_step import PROMPT_TOKENS, Case, model, prompts, tokenizer

ROWS, CAP = 24, 64
FEW, MANY = 4 * (PROMPT_TOKENS + CAP), 12 * (PROMPT_TOKENS + CAP)
"""Tokens of a pass, where no row ends early."""

LARGE, SMALL = (256, 768, 4), (128, 384, 2)
EIGHT_BIT = {"quant_method": "bitsandbytes", "load_in_8bit": True}
FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@dataclass(frozen=True)
class Setting:
    """What is trained, and how.

    Attributes:
        vocabulary: of both models.
        budget: `max_tokens_per_micro_batch`.
        student, teacher: hidden, intermediate, layers.
        lora: whether an adapter is trained.
        student_quantized, teacher_quantized: how they are saved; empty for float32.
        more: further settings of the trainer.
    """

    vocabulary: int
    budget: int
    student: tuple[int, int, int] = LARGE
    teacher: tuple[int, int, int] = SMALL
    lora: bool = False
    student_quantized: dict[str, Any] = field(default_factory=dict)
    teacher_quantized: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


WIDE = (1024, 3072, 8)


def teacher_in(dtype: str, **more: Any) -> dict[str, Any]:
    """How a teacher is loaded."""
    return {"teacher_model_init_kwargs": {"dtype": dtype, **more}}


CHECKPOINTING, BF16 = {"gradient_checkpointing": True}, {"bf16": True}
SETTINGS = {
    "full, 8k, few tokens": Setting(8192, FEW),
    "full, 8k, many tokens": Setting(8192, MANY),
    "full, 32k, few tokens": Setting(32_768, FEW),
    "full, 32k, many tokens": Setting(32_768, MANY),
    "full, 32k, many tokens, checkpointing": Setting(32_768, MANY, more=CHECKPOINTING),
    "full, 8k, many tokens, bf16": Setting(8192, MANY, more=BF16),
    "full, 8k, many tokens, bf16, checkpointing": Setting(8192, MANY, more={**CHECKPOINTING, **BF16}),
    "LoRA, 8k, many tokens": Setting(8192, MANY, lora=True),
    "LoRA, 32k, few tokens, checkpointing": Setting(32_768, FEW, lora=True, more=CHECKPOINTING),
    "QLoRA, 8k, few tokens": Setting(8192, FEW, WIDE, lora=True, student_quantized=FOUR_BIT),
    "full, 4k, few tokens, teacher float32": Setting(4096, FEW, teacher=WIDE, more=teacher_in("float32")),
    "full, 4k, few tokens, teacher bfloat16": Setting(4096, FEW, teacher=WIDE, more=teacher_in("bfloat16")),
    "full, 4k, few tokens, teacher 8-bit": Setting(4096, FEW, teacher=WIDE, teacher_quantized=EIGHT_BIT),
    "full, 4k, few tokens, teacher on the disk": Setting(
        4096, FEW, teacher=WIDE, more=teacher_in("float32", device_map={"": "disk"})
    ),
}


def save_models(setting: Setting, folder: Path) -> None:
    """Random student and teacher, with their tokenizer, quantized where they are to be."""
    from transformers import AutoModelForCausalLM

    from prune_opd_hf.models.loading import quantized

    kinds = {
        "student": (setting.student, setting.student_quantized),
        "teacher": (setting.teacher, setting.teacher_quantized),
    }
    for seed, (name, (shape, how)) in enumerate(kinds.items()):
        made, place = model(shape, setting.vocabulary, seed), folder / name
        made.save_pretrained(place)
        if how:
            loading = quantized({}, how, torch.device("cpu"))
            made = AutoModelForCausalLM.from_pretrained(place, **loading)
            made.save_pretrained(place)
        tokenizer(setting.vocabulary).save_pretrained(place)


def resident(name: str) -> int:
    """A line of the process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def measure(setting: Setting, folder: Path) -> dict[str, Any]:
    """Predicted and measured bytes of the second step of a run."""
    from peft import LoraConfig
    from transformers import TrainerCallback

    from prune_opd_hf import PruneOPDConfig, PruneOPDTrainer
    from prune_opd_hf.preflight.step_memory import step_memory

    class Peak(TrainerCallback):
        measured = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.measured = resident("VmHWM")
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading has freed is not held
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew from here

    torch.set_num_threads(1)

    def trainer(where: Path, vocabulary: int, peak: Peak, rows: int, cap: int, budget: int) -> PruneOPDTrainer:
        more = dict(setting.more)
        if "device_map" in more.get("teacher_model_init_kwargs", {}):
            offloaded = str(where / "offloaded")
            more["teacher_model_init_kwargs"] = {**more["teacher_model_init_kwargs"], "offload_folder": offloaded}
        args = PruneOPDConfig(
            output_dir=str(where / "run"), use_cpu=True, max_steps=2, per_device_train_batch_size=rows, num_generations=1,
            max_completion_length=cap, pruning="none", save_strategy="no", report_to="none", disable_tqdm=True,
            max_tokens_per_micro_batch=budget, **more,
        )  # fmt: skip
        return PruneOPDTrainer(
            str(where / "student"), str(where / "teacher"), args, prompts(Case(vocabulary, ROWS, CAP)), callbacks=[peak],
            peft_config=LoraConfig(r=8, target_modules="all-linear") if setting.lora else None,
        )  # fmt: skip

    trainer(folder / "tiny", 512, Peak(), 2, 4, 64).train()  # code is loaded
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, peak = resident("VmRSS"), Peak()
    run = trainer(folder, setting.vocabulary, peak, ROWS, CAP, setting.budget)
    run.train()
    for layer in run.model.modules():
        layer.gradient_checkpointing = False  # it is asked what it keeps without
    largest = max(
        int(part["rollouts"].prompt_mask.sum() + part["rollouts"].lengths.sum()) for part in run.step.micro_batches
    )
    how = {name: setting.more.get(name, False) for name in ("bf16", "gradient_checkpointing")}
    every = run.monitor.settings.check_every
    tokens = PROMPT_TOKENS + CAP
    predicted = step_memory(
        run.model, run.teacher.model, rows=ROWS, tokens=tokens, pass_tokens=largest, check_every=every, **how
    )
    parts = {name: getattr(predicted, name) for name in ("always", "generation", "update")}
    return {"predicted": predicted.peak, "measured": peak.measured - before, "parts": parts}


def main() -> None:
    """Measure each setting in a process of its own, and write down what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--only", nargs="+", default=[*SETTINGS], choices=[*SETTINGS])
    parser.add_argument("--measure", help="a folder of models; for the processes that this one starts")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(SETTINGS[arguments.only[0]], Path(arguments.measure))))
        return
    output = Path(arguments.output_dir) / "memory.json"
    found = json.loads(output.read_text()) if output.is_file() else {}
    # Freed tensors are given back at once, whatever was freed before them.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for name in arguments.only:
        setting = SETTINGS[name]
        if find_spec("bitsandbytes") is None and (setting.student_quantized or setting.teacher_quantized):
            print(f"{name}: left out, bitsandbytes is not installed")
            continue
        with tempfile.TemporaryDirectory() as folder:
            save_models(setting, Path(folder))
            tiny = Setting(
                512, 64, (64, 128, 1), (64, 128, 1), setting.lora, setting.student_quantized, setting.teacher_quantized
            )
            save_models(tiny, Path(folder) / "tiny")
            command = [sys.executable, __file__, "--output_dir", "-", "--measure", folder, "--only", name]
            result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if result.returncode:
            print(name, result.stderr[-2000:], file=sys.stderr)
            continue
        found[name] = row = json.loads(result.stdout.splitlines()[-1])
        print(
            f"{name}: predicted {row['predicted']:,}, measured {row['measured']:,}: {row['measured'] / row['predicted']:.2f}",
            flush=True,
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
