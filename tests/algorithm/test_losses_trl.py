"""Parity with TRL 1.16: the full-vocabulary losses equal those of its DistillationTrainer, which are called here, not copied."""

import pytest
import torch

from prune_opd_hf.algorithm.losses import generalized_jsd_loss
from prune_opd_hf.models.chunked_head import divergence_from_hidden
from prune_opd_hf.models.lm_head import HeadParameters, LogitTransform

trl_loss = pytest.importorskip("trl.trainer.distillation_trainer")._chunked_divergence_loss  # TRL needs Python 3.11
BETAS, TEMPERATURES = (0.0, 0.1, 0.5, 1.0), (1.0, 0.7)
WITHOUT_PRUNING = torch.tensor([[True] * 6, [True, True, True, False, False, False]])
ONES = WITHOUT_PRUNING.float()  # L_t = 1


def inputs():
    generator = torch.Generator().manual_seed(7)
    shapes = [(2, 6, 16), (300, 16), (300,), (2, 6, 24), (300, 24)]
    hidden, weight, bias, teacher_hidden, teacher_weight = (torch.randn(shape, generator=generator) for shape in shapes)
    student = [hidden, 0.5 * weight, bias]
    return [values.requires_grad_() for values in student], teacher_hidden, 0.5 * teacher_weight


def assert_equal_to_1e_5(received, expected):
    """Values to 1e-5 of each other, gradients to 1e-5 of their length. (Against float64, TRL's are off by up to 7e-6 here.)"""
    assert float(received[0].detach()) == pytest.approx(float(expected[0].detach()), rel=1e-5)
    for ours, theirs in zip(received[1:], expected[1:], strict=True):
        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


@pytest.mark.parametrize("token_count", [None, 40])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", BETAS)
def test_value_and_gradient_equal_trls(beta, temperature, token_count):
    (hidden, weight, bias), teacher_hidden, teacher_weight = student, *_ = inputs()
    expected, entropy, _ = trl_loss(
        hidden,
        teacher_hidden,
        weight,
        teacher_weight,
        WITHOUT_PRUNING,
        beta,
        token_count,
        student_lm_head_bias=bias,
        temperature=temperature,
    )
    theirs = [expected, *torch.autograd.grad(expected, student)]
    chunked = divergence_from_hidden(
        hidden,
        HeadParameters(weight, bias),
        teacher_hidden,
        HeadParameters(teacher_weight),
        ONES,
        WITHOUT_PRUNING,
        beta=beta,
        temperature=temperature,
        token_count=token_count,
        max_logit_elements=1000,  # three tokens at once
    )
    assert_equal_to_1e_5([chunked.loss, *torch.autograd.grad(chunked.loss, student)], theirs)
    assert float(chunked.entropy.sum()) == pytest.approx(float(entropy), rel=1e-5)
    dense = generalized_jsd_loss(
        hidden @ weight.T + bias,
        teacher_hidden @ teacher_weight.T,
        ONES,
        WITHOUT_PRUNING,
        beta=beta,
        temperature=temperature,
        token_count=token_count,
    )
    assert_equal_to_1e_5([dense, *torch.autograd.grad(dense, student)], theirs)


@pytest.mark.parametrize("beta", BETAS)
def test_capped_and_scaled_logits_equal_trls(beta):
    (hidden, weight, bias), teacher_hidden, teacher_weight = student, *_ = inputs()
    expected, *_ = trl_loss(
        hidden,
        teacher_hidden,
        weight,
        teacher_weight,
        WITHOUT_PRUNING,
        beta,
        student_lm_head_bias=bias,
        student_logit_scale=0.6,
        student_final_logit_softcapping=3.0,
        teacher_logit_scale=1 / 4,
    )
    received = divergence_from_hidden(
        hidden,
        HeadParameters(weight, bias, LogitTransform(soft_cap=3.0, scale=0.6)),
        teacher_hidden,
        HeadParameters(teacher_weight, None, LogitTransform(divisor=4.0)),
        ONES,
        WITHOUT_PRUNING,
        beta=beta,
    ).loss
    assert_equal_to_1e_5(
        [received, *torch.autograd.grad(received, student)], [expected, *torch.autograd.grad(expected, student)]
    )
