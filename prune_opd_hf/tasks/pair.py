"""The shipped teacher and student of the embedded task, and their one name, "embedded".

Both are ordinary Qwen3 models over the same 64 tokens; examples/embedded_task/ trained them. The teacher knows style A alone. The
student knows how a chain is worked but mostly drifts into style B and guesses: what distillation has to repair.
"""

import os
from pathlib import Path
from typing import Any, Literal

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = Path(__file__).parent / "weights"
"""Holds the folders `teacher` and `student` that are shipped with the package."""

EMBEDDED = "embedded"
"""Name of the embedded task, its student and its teacher, wherever a Hub id or a folder may be given."""


def resolve_embedded(model: Any, role: Literal["student", "teacher"]) -> Any:
    """The folder of the shipped student or teacher for the name "embedded"; any other name, or a model, as it is."""
    return os.fspath(WEIGHTS / role) if model == EMBEDDED else model


def load_teacher() -> PreTrainedModel:
    """The shipped teacher, float32 on the CPU and in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(WEIGHTS / "teacher", local_files_only=True)


def load_student() -> PreTrainedModel:
    """The shipped student before distillation, float32 on the CPU and in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(WEIGHTS / "student", local_files_only=True)


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The shipped tokenizer, which teacher and student share."""
    return AutoTokenizer.from_pretrained(WEIGHTS / "student", local_files_only=True)
