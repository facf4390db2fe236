"""A teacher that waits in the CPU's memory: when it comes to its device, and when it leaves."""

import pytest
import torch
from generation_helpers import CONFIG, padded_prompts
from tiny_models import tiny_model

from prune_opd_hf import Teacher
from prune_opd_hf.generation import DriftMonitor, LoopEngine, Request, Sampling
from prune_opd_hf.models.forward_pass import lay_out
from prune_opd_hf.teachers.offloaded import OffloadedTeacher


@pytest.fixture
def moves(monkeypatch):
    """Every device that a model is moved to, in order."""
    seen, real = [], torch.nn.Module.to

    def to(model, *arguments, **settings):
        seen.append(str(arguments[0]))
        return real(model, *arguments, **settings)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    return seen


def offloaded(model):
    teacher = OffloadedTeacher(model, torch.device("cpu"), top_k=4)
    teacher._resting_device = torch.device("cpu", 0)  # the same memory under another name
    return teacher


def test_it_is_on_its_device_while_it_scores_and_leaves_when_it_is_released(moves):
    model = tiny_model("llama", 7)
    teacher, plain = offloaded(model), Teacher(model, top_k=4)
    ids, mask = padded_prompts((3, 5))
    responses = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(1))
    scores = []
    for each in (teacher, plain):
        each.start(ids, mask)
        scores.append(each.score(responses))
        each.release()
    assert moves == ["cpu", "cpu:0"]
    assert torch.equal(scores[0].token_log_probs, scores[1].token_log_probs)


def test_a_loss_over_whole_distributions_brings_it_back(moves):
    model, student = tiny_model("llama", 7), tiny_model("llama", 1)
    teacher = offloaded(model)
    monitor = DriftMonitor(teacher, CONFIG, truncate=False, eos_token_id=1, pad_token_id=0)
    watch = monitor.begin()
    list(LoopEngine(student, Sampling(6, (1,), 0)).generate([Request((5, 6), 1)], watch))
    rollouts = watch.rollouts()
    teacher.release()
    del moves[:]
    hidden = teacher.hidden_states(lay_out(rollouts))
    assert moves == ["cpu"]
    assert torch.equal(hidden, Teacher(model, top_k=4).hidden_states(lay_out(rollouts)))
