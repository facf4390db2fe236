"""Random records of two models, for tests of what is computed from stored candidates."""

import torch


def random_record(rows=3, time=7, recorded=5, vocab=11):
    """A record of two random models: ids and log-probabilities of each one's `recorded` most likely tokens."""
    log_p, log_q = torch.randn(2, rows, time, vocab).mul(2).log_softmax(-1)
    student, teacher = log_p.topk(recorded), log_q.topk(recorded)
    tokens = torch.randint(vocab, (rows, time))
    record = {
        "token_ids": tokens,
        "student_topk_ids": student.indices,
        "student_topk_log_probs": student.values,
        "teacher_log_probs": log_q.gather(-1, student.indices),
        "teacher_topk_ids": teacher.indices,
        "teacher_topk_log_probs": teacher.values,
        "teacher_token_log_probs": log_q.gather(-1, tokens.unsqueeze(-1)).squeeze(-1),
    }
    return record, log_p.exp(), log_q.exp()
