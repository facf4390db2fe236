"""The embedded task: chains of arithmetic, their tokenizer and grader, and a tiny teacher and student that need no download.

chain.py  problems, the two styles of reasoning as words, and exact match on the digit before the end
pair.py   the shipped weights and tokenizer, and the name "embedded"
"""

from prune_opd_hf.tasks.chain import ChainTask, Problem, extract_answer, is_correct
from prune_opd_hf.tasks.pair import EMBEDDED, WEIGHTS, load_student, load_teacher, load_tokenizer, resolve_embedded

__all__ = [
    "EMBEDDED",
    "WEIGHTS",
    "ChainTask",
    "Problem",
    "extract_answer",
    "is_correct",
    "load_student",
    "load_teacher",
    "load_tokenizer",
    "resolve_embedded",
]
