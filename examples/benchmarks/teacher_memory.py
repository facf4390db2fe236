"""Peak memory of a training step by how the teacher is kept, against what the preflight predicts.

On a CPU, where it is the process's resident memory beyond what it had before models were loaded.

    python examples/benchmarks/teacher_memory.py --output_dir examples/results/teachers/memory

"8-bit" needs bitsandbytes, and is saved as such: a file that is quantized as it is loaded stays mapped, and counts as resident;
"disk" is Accelerate's offload: teacher_model_init_kwargs {device_map: {"": disk}, ...}.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from prune_opd_hf.tasks import load_tokenizer

SHAPES = {"student": (384, 6), "teacher": (1024, 12)}
ROWS, CAP = 4, 48
KINDS = {
    "float32": {"teacher_model_init_kwargs": {"dtype": "float32"}},
    "bfloat16": {"teacher_model_init_kwargs": {"dtype": "bfloat16"}},
    "8-bit": {},
    "disk": {"teacher_model_init_kwargs": {"device_map": {"": "disk"}, "dtype": "float32"}},
}


def make_models(folder):
    """Random models over the embedded task's tokenizer."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from prune_opd_hf.models.loading import quantized

    tokenizer = load_tokenizer()
    for name, (hidden, layers) in SHAPES.items():
        heads = hidden // 64
        config = Qwen3Config(
            vocab_size=4096,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=64,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    if find_spec("bitsandbytes") is not None:
        eight_bit = quantized({}, {"quant_method": "bitsandbytes", "load_in_8bit": True}, torch.device("cpu"))
        AutoModelForCausalLM.from_pretrained(folder / "teacher", **eight_bit).save_pretrained(folder / "8-bit")
        tokenizer.save_pretrained(folder / "8-bit")


def resident(name):
    """A line of the process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def measure(folder, kind):
    """Predicted and measured bytes of the second step of a run."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from prune_opd_hf import PruneOPDConfig, PruneOPDTrainer
    from prune_opd_hf.preflight.step_cost import memory_bytes

    class Peak(TrainerCallback):
        measured = 0

        def on_step_begin(self, args, state, control, **kwargs):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading has freed is not held
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew from here

        def on_step_end(self, args, state, control, **kwargs):
            self.measured = resident("VmHWM")

    how = dict(KINDS[kind])
    if kind == "disk":
        how["teacher_model_init_kwargs"] = {
            **how["teacher_model_init_kwargs"],
            "offload_folder": str(folder / "offloaded"),
        }
    torch.set_num_threads(1)
    if kind == "8-bit":
        import bitsandbytes  # noqa: F401 - its own memory is not the teacher's
    before, peak = resident("VmRSS"), Peak()
    args = PruneOPDConfig(
        output_dir=str(folder / "run"), use_cpu=True, max_steps=2, per_device_train_batch_size=ROWS, num_generations=1,
        max_completion_length=CAP, pruning="none", save_strategy="no", report_to="none", disable_tqdm=True, **how,
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": ", +3 , x7 = 4"}] * 16)
    teacher = folder / ("8-bit" if kind == "8-bit" else "teacher")
    trainer = PruneOPDTrainer(str(folder / "student"), str(teacher), args, prompts, callbacks=[peak])
    trainer.train()
    tokens = len(trainer.train_dataset[0]["input_ids"]) + CAP
    parts = memory_bytes(trainer.model, trainer.teacher.model, rows=ROWS, tokens=tokens, update_rows=ROWS)
    return {"teacher": kind, "predicted": sum(parts.values()), "measured": peak.measured - before, "parts": parts}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=[*KINDS])
    parser.add_argument("--measure", help="a folder of models; for the processes that this one starts")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure), arguments.kinds[0])))
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder))
        for kind in arguments.kinds:
            command = [
                sys.executable,
                __file__,
                "--output_dir",
                arguments.output_dir,
                "--measure",
                folder,
                "--kinds",
                kind,
            ]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                print(kind, result.stderr[-2000:], file=sys.stderr)
                continue
            found.append(json.loads(result.stdout.splitlines()[-1]))
            ratio = found[-1]["measured"] / found[-1]["predicted"]
            print(
                f"{kind}: predicted {found[-1]['predicted']:,}, measured {found[-1]['measured']:,}: {ratio:.2f}",
                flush=True,
            )
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "memory.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
