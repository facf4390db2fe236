"""An independent recomputation of everything the drift monitor records: full forward passes and slow, obvious loops.

It shares no code with the package. Each row is run alone, without padding, without any cache.
"""

from dataclasses import dataclass

import torch


@dataclass
class OracleRow:
    """What one sequence should look like in the record."""

    length: int
    stop_reason: str
    student_log_probs: torch.Tensor  # (time, vocab)
    teacher_log_probs: torch.Tensor
    student_topk: list[list[int]]
    teacher_topk: list[list[int]]
    overlap: list[float]
    events: list[bool]
    reliability: list[float]


@torch.no_grad()
def full_log_probs(model, prompt, response, vocab=None):
    """Log-probabilities of every next token of `response` after `prompt`, from one full pass without padding or cache."""
    ids = torch.cat([prompt, response]).unsqueeze(0)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    return logits[:, :vocab].log_softmax(-1)


def oracle_row(
    student,
    teacher,
    prompt,
    response,
    *,
    metric="overlap",
    k,
    threshold,
    weight_drop,
    min_length=0,
    eos=(1,),
    truncate=True,
    teacher_prompt=None,
    vocab=None,
):
    """The record of one row, from its generated tokens (which may run on past the row's end)."""
    length, reason = len(response), "length"
    for position, token in enumerate(response.tolist()):
        if token in eos:
            length, reason = position + 1, "eos"
            break
    response = response[:length]
    p = full_log_probs(student, prompt, response, vocab)
    q = full_log_probs(teacher, prompt if teacher_prompt is None else teacher_prompt, response, vocab)
    student_topk = [row.topk(k).indices.tolist() for row in p]
    teacher_topk = [row.topk(k).indices.tolist() for row in q]
    overlap = [len(set(s) & set(t)) / k for s, t in zip(student_topk, teacher_topk, strict=True)]
    events, reliability, count, cut = [], [], 0, None
    for position in range(length):
        if metric == "overlap":
            event = overlap[position] < threshold
        elif metric == "mass":
            shared = own = 0.0
            for token in student_topk[position]:
                shared += min(float(p[position, token].exp()), float(q[position, token].exp()))
                own += float(p[position, token].exp())
            event = shared / own < threshold
        elif metric == "weighted_overlap":
            shared = own = 0.0
            for token in student_topk[position]:
                own += float(p[position, token].exp())
                if token in teacher_topk[position]:
                    shared += float(p[position, token].exp())
            event = shared / own < threshold
        else:
            nucleus, mass = [], 0.0
            for token in teacher_topk[position]:
                nucleus.append(token)
                mass += float(q[position, token].exp())
                if mass >= threshold:
                    break
            event = int(response[position]) not in nucleus
            if (
                metric == "tail" and mass < threshold
            ):  # k candidates cannot tell, but a whole vocabulary of such tokens may
                event = event and 2**18 * float(q[position, response[position]].exp()) <= 1 - threshold
        count += event
        value = min(max(1 - weight_drop * count, 0.0), 1.0)
        value = 0.0 if value <= 1e-8 else value
        events.append(event)
        reliability.append(value)
        if cut is None and value == 0.0 and position + 1 >= min_length:
            cut = position + 1
    if truncate and cut is not None and (cut < length or reason == "length"):
        length, reason = cut, "drift"
    return OracleRow(length, reason, p, q, student_topk, teacher_topk, overlap, events, reliability)


def assert_record_equals(rollouts, rows, *, atol=2e-4, watched=True):
    """Compare a `Rollouts` with the oracle's rows, field by field."""
    for index, row in enumerate(rows):
        n = row.length
        assert int(rollouts.lengths[index]) == n, f"row {index}: kept {int(rollouts.lengths[index])}, expected {n}"
        assert rollouts.stop_reason[index] == row.stop_reason, f"row {index}"
        assert rollouts.response_mask[index, :n].all()
        assert not rollouts.response_mask[index, n:].any()
        tokens = rollouts.response_ids[index, :n]
        q = row.teacher_log_probs[:n].float()
        torch.testing.assert_close(
            rollouts.teacher_token_log_probs[index, :n], q.gather(1, tokens[:, None])[:, 0], atol=atol, rtol=1e-4
        )
        assert rollouts.teacher_topk_ids[index, :n].tolist() == row.teacher_topk[:n]
        expected = q.gather(1, torch.tensor(row.teacher_topk[:n]))
        torch.testing.assert_close(rollouts.teacher_topk_log_probs[index, :n], expected, atol=atol, rtol=1e-4)
        assert rollouts.drift_events[index, :n].tolist() == row.events[:n]
        assert rollouts.reliability[index, :n].tolist() == pytest_approx(row.reliability[:n])
        for name, tensor in rollouts.tensors().items():
            if "prompt" not in name and name != "response_ids":
                assert not tensor[index, n:].any(), f"{name} holds something past the end of row {index}"
        if not watched:
            continue
        p = row.student_log_probs[:n].float()
        torch.testing.assert_close(
            rollouts.token_log_probs[index, :n], p.gather(1, tokens[:, None])[:, 0], atol=atol, rtol=1e-4
        )
        candidates = torch.tensor(row.student_topk[:n])
        assert rollouts.student_topk_ids[index, :n].tolist() == candidates.tolist()
        torch.testing.assert_close(
            rollouts.student_topk_log_probs[index, :n], p.gather(1, candidates), atol=atol, rtol=1e-4
        )
        torch.testing.assert_close(rollouts.teacher_log_probs[index, :n], q.gather(1, candidates), atol=atol, rtol=1e-4)
        assert rollouts.overlap[index, :n].tolist() == pytest_approx(row.overlap[:n])


def pytest_approx(values):
    import pytest

    return pytest.approx(values, abs=1e-6)
