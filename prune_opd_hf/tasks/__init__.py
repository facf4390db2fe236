"""The embedded task: chains of arithmetic, their tokenizer and grader, and a tiny teacher and student that need no download.

chain.py      problems and the two styles of reasoning, as words
tokenizer.py  one id for each of the 64 words
grading.py    exact match on the digit before the end
pair.py       the shipped weights, and the name "embedded"
"""

from prune_opd_hf.tasks.chain import ChainTask, Problem
from prune_opd_hf.tasks.grading import extract_answer, is_correct, is_drifting
from prune_opd_hf.tasks.pair import EMBEDDED, WEIGHTS, load_student, load_teacher, load_tokenizer, resolve_embedded
from prune_opd_hf.tasks.tokenizer import build_tokenizer

__all__ = [
    "EMBEDDED",
    "WEIGHTS",
    "ChainTask",
    "Problem",
    "build_tokenizer",
    "extract_answer",
    "is_correct",
    "is_drifting",
    "load_student",
    "load_teacher",
    "load_tokenizer",
    "resolve_embedded",
]
