"""The engines: drawing tokens, and that a sample is the same in every batch, beside every neighbour, after every restart."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from prune_opd_hf.errors import ConfigError, NonFiniteLogitsError, UnsupportedGenerationError
from prune_opd_hf.generation.draw import draw_tokens, sample_seed
from prune_opd_hf.generation.refilling_loop import generate_refilling
from prune_opd_hf.generation.requests import Request

EOS = 1


def settings(temperature=1.0, max_new_tokens=24, **changes):
    return SimpleNamespace(
        **{
            "temperature": temperature,
            "top_p": 1.0,
            "max_new_tokens": max_new_tokens,
            "seed": 0,
            "top_k": 0,
            **changes,
        }
    )


def requests(lengths, samples=1, vocab=48):
    generator = torch.Generator().manual_seed(5)
    prompts = [tuple(torch.randint(3, vocab, (length,), generator=generator).tolist()) for length in lengths]
    return [Request(prompt, sample_seed(0, prompt, sample)) for prompt in prompts for sample in range(samples)]


def run(model, asked, how, slots):
    done = sorted(generate_refilling(model, asked, how, [EOS], slots))
    assert [completion.request for completion in done] == list(range(len(asked)))
    return [(completion.token_ids, completion.ended) for completion in done]


def plain_greedy(model, request, max_new_tokens):
    prompt = torch.tensor([request.prompt_ids])
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=EOS
    )
    tokens = output[0, prompt.shape[1] :].tolist()
    return tokens, tokens[-1] == EOS


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_tokens_are_those_of_generate_one_by_one(family):
    model = tiny_model(family, seed=4)
    asked = requests([3, 17, 1, 9, 5, 12, 2])
    expected = [plain_greedy(model, request, 24) for request in asked]
    for slots in (1, 3, 16):
        assert run(model, asked, settings(temperature=0.0), slots) == expected


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "lfm2"])
def test_samples_do_not_depend_on_slots_order_or_neighbours(family):
    model = tiny_model(family, seed=2)
    asked = requests([4, 15, 1, 8, 6], samples=3)
    how = settings(top_p=0.9)
    expected = run(model, asked, how, slots=4)
    assert len({tuple(tokens) for tokens, _ in expected}) > 10
    for slots in (1, 2, 7, 32):
        assert run(model, asked, how, slots) == expected
    backwards = run(model, asked[::-1], how, slots=4)
    assert backwards[::-1] == expected
    assert run(model, asked[7:9], how, slots=4) == expected[7:9]


def test_responses_end_at_eos_or_at_the_limit():
    model = tiny_model("llama", seed=0)
    with torch.no_grad():
        model.get_output_embeddings().bias[EOS] = 3.0
    lengths = [run(model, requests([3] * 40, samples=1), settings(max_new_tokens=limit), 8) for limit in (1, 6, 60)]
    for limit, done in zip((1, 6, 60), lengths, strict=True):
        for tokens, ended in done:
            assert EOS not in tokens[:-1]
            assert (tokens[-1] == EOS) is ended
            assert ended or len(tokens) == limit
    assert {ended for _, ended in lengths[1]} == {True, False}


def test_no_request_gives_nothing():
    assert run(tiny_model("llama", seed=0), [], settings(), 4) == []


def test_slots_are_refilled_so_that_few_steps_are_needed():
    """64 prompts of mixed lengths, responses of random length: padded batches wait for their longest row."""
    model = tiny_model("qwen3", seed=0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.05)
        model.get_output_embeddings().bias[EOS] = 0.3  # ends with a chance of about 1/40 at each token
    asked = requests([3 + 5 * (number % 8) for number in range(64)])
    steps = []
    model.register_forward_hook(lambda module, inputs, output: steps.append(output.logits.shape[0]))
    done = run(model, asked, settings(max_new_tokens=200), slots=16)
    lengths = [len(tokens) for tokens, _ in done]
    padded_steps = sum(max(lengths[first : first + 16]) for first in range(0, 64, 16))
    assert len(steps) < padded_steps / 1.5
    assert sum(lengths) / len(steps) > 0.6 * 16  # rows at work in an average step, the emptying end included


def test_drawn_tokens_have_the_probabilities_of_transformers_warpers():
    logits = torch.randn(1, 2000, generator=torch.Generator().manual_seed(0)) * 3
    grid = (torch.arange(4_000, dtype=torch.float64) + 0.5) / 4_000
    for temperature, top_k, top_p in (
        (1.0, 0, 1.0),
        (0.6, 0, 0.95),
        (1.5, 0, 0.9999),
        (1.0, 7, 1.0),
        (0.8, 50, 0.8),
        (1.0, 0, 1e-6),
    ):
        warped = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
        warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped
        warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
        expected = torch.softmax(warped, dim=-1)[0]
        drawn = draw_tokens(logits.expand(len(grid), -1), grid, temperature=temperature, top_k=top_k, top_p=top_p)
        shares = torch.bincount(drawn, minlength=2000) / len(grid)
        assert (shares - expected).abs().max() < 2 / len(grid)
        assert bool((expected[drawn] > 0).all())


def test_the_largest_random_number_still_draws_a_possible_token():
    logits = torch.tensor([[0.0, -50.0, 0.0, float("-inf"), float("-inf")]])
    largest = torch.tensor([1.0 - 2**-53], dtype=torch.float64)
    assert draw_tokens(logits, largest, temperature=1.0).item() == 2
    assert draw_tokens(logits, largest, temperature=1.0, top_p=0.99).item() == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_impossible_logits_are_refused(bad, temperature):
    with pytest.raises(NonFiniteLogitsError, match="NaN or infinite"):
        draw_tokens(torch.tensor([[0.0, bad]]), torch.tensor([0.5]), temperature=temperature)


def test_seeds_of_samples_differ():
    seeds = {
        sample_seed(seed, name, problem, sample)
        for seed in (0, 1)
        for name in "ab"
        for problem in range(9)
        for sample in range(9)
    }
    assert len(seeds) == 2 * 2 * 81
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_what_cannot_be_decoded_is_refused():
    with pytest.raises(ConfigError, match="at least 1 slot"):
        run(tiny_model("llama", seed=0), requests([3]), settings(), 0)
    model = tiny_model("llama", seed=0)
    model.config.is_encoder_decoder = True
    with pytest.raises(UnsupportedGenerationError, match="encoder-decoder"):
        run(model, requests([3]), settings(), 1)
