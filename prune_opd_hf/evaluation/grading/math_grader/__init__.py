r"""Grading of mathematical answers: find the answer, rewrite it, compare it with the gold answer.

Pure functions of text. This package imports nothing from `prune_opd_hf`, so that grading processes start without loading
torch; see `worker.py`.
"""
