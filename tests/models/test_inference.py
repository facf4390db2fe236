"""Which context forward passes run in, and that nothing made in it reaches a training graph."""

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from prune_opd_hf import DriftConfig, DriftMonitor, pruned_generate
from prune_opd_hf.models.lm_head import MARKS_OF_SHARDS, forward_context


@pytest.mark.parametrize("mark", MARKS_OF_SHARDS)
def test_models_with_sharded_parameters_get_no_grad(mark):
    layer = nn.Linear(2, 2)
    setattr(layer.weight, mark, "of a mesh")
    with forward_context(layer)():
        made = layer(torch.ones(1, 2))
    assert not made.is_inference()
    assert not made.requires_grad


def test_a_record_of_watched_generation_can_enter_a_graph():
    student, teacher = tiny_model("qwen3", seed=1), tiny_model("qwen3", seed=2)
    monitor = DriftMonitor(teacher, DriftConfig("overlap", top_k=4), check_every=3)
    prompts = torch.tensor([[5, 6, 7], [8, 9, 10]])
    sequences = student.generate(
        prompts, max_new_tokens=7, do_sample=False, custom_generate=pruned_generate, drift_monitor=monitor
    )
    rollouts = monitor.finish(sequences)
    values = [value for value in vars(rollouts).values() if isinstance(value, torch.Tensor)]
    assert len(values) > 8
    assert not any(value.is_inference() for value in [sequences, *values])
    student.train()
    log_probs = student(sequences).logits[:, 2:-1].log_softmax(dim=-1).gather(-1, rollouts.student_topk_ids)
    (log_probs * rollouts.teacher_log_probs.exp()).sum().backward()  # saves the record's tensors for backward
    assert all(parameter.grad is not None for parameter in student.parameters())
