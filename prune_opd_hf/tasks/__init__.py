"""The embedded task: chains of arithmetic, their tokenizer and grader, and a tiny teacher and student that need no download.

chain.py      problems and the two styles of reasoning, as words
tokenizer.py  one id for each of the 64 words
grading.py    exact match on the digit before the end
accuracy.py   exact match of a model, with its interval
pair.py       training recipes and the shipped weights
build.py      the command that rebuilds the weights
"""

from prune_opd_hf.tasks.accuracy import Accuracy, measure_accuracy
from prune_opd_hf.tasks.chain import ChainTask, Problem
from prune_opd_hf.tasks.grading import correct_tokens, extract_answer, is_correct, is_drifting
from prune_opd_hf.tasks.pair import (
    EMBEDDED,
    STUDENT_RECIPE,
    TEACHER_RECIPE,
    Recipe,
    cold_start_student,
    load_student,
    load_teacher,
    load_tokenizer,
    resolve_embedded,
    train_teacher,
)
from prune_opd_hf.tasks.tokenizer import build_tokenizer

__all__ = [
    "EMBEDDED",
    "STUDENT_RECIPE",
    "TEACHER_RECIPE",
    "Accuracy",
    "ChainTask",
    "Problem",
    "Recipe",
    "build_tokenizer",
    "cold_start_student",
    "correct_tokens",
    "extract_answer",
    "is_correct",
    "is_drifting",
    "load_student",
    "load_teacher",
    "load_tokenizer",
    "measure_accuracy",
    "resolve_embedded",
    "train_teacher",
]
