"""A model split into backbone and LM head reproduces its own logits, in every family and wrapping; where it cannot, it says so."""

import peft
import pytest
import torch
import transformers
from tiny_models import COMMON, FAMILIES, tiny_model

from prune_opd_hf.errors import UnsupportedGenerationError
from prune_opd_hf.models.lm_head import BackboneAndHead, LogitTransform, base_causal_lm, input_device, text_config
from prune_opd_hf.teachers.local import LocalTeacher

FINISHED = {  # families that do something to the logits after the projection
    "Gemma2": {"final_logit_softcapping": 5.0, "head_dim": 8, "query_pre_attn_scalar": 8},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {"logit_scale": 0.25, "sliding_window": 8},
}
IDS = torch.tensor([[5, 11, 3, 40, 22], [7, 7, 2, 30, 9]])


def transformed_model(family, *, tied, **changes):
    settings = {
        **COMMON,
        **FINISHED[family],
        "vocab_size": 48,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        **changes,
    }
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@torch.no_grad()
def assert_parts_make_the_models_logits(parts, model, ids=IDS):
    assert parts.separable
    expected = model(input_ids=ids).logits
    hidden = parts.backbone(input_ids=ids).last_hidden_state
    received = parts.project(hidden.reshape(-1, hidden.shape[-1]))
    assert parts.vocab_size == expected.shape[-1]
    torch.testing.assert_close(received, expected.reshape(received.shape))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_parts_make_the_logits_of_every_family(family):
    model = tiny_model(family, 1)
    assert_parts_make_the_models_logits(BackboneAndHead(model), model)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", sorted(FINISHED))
def test_the_parts_make_logits_that_are_capped_or_scaled(family, tied):
    model = transformed_model(family, tied=tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert_parts_make_the_models_logits(BackboneAndHead(model), model)


@pytest.mark.parametrize("family", sorted(FINISHED))
def test_the_form_is_found_although_the_logits_are_too_small_to_show_it(family):
    # A soft cap bends logits below one by less than any tolerance. The weights of a student grow while it is trained.
    model = transformed_model(family, tied=False)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head *= 1e-3
        parts = BackboneAndHead(model)
        head *= 1e3
    assert_parts_make_the_models_logits(parts, model)


# peft 0.21 still asks Transformers for a property by its old name.
from_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LORA = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "attention and head": {"target_modules": ["q_proj", "lm_head"]},
    "a trained copy of the head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@from_peft
@pytest.mark.parametrize("where", sorted(LORA))
@pytest.mark.parametrize("family", ["qwen3", "Granite"])
def test_adapters_stay_active_in_both_parts(family, where):
    plain = tiny_model("qwen3", 1, pad=None) if family == "qwen3" else transformed_model(family, tied=False)
    before = plain(input_ids=IDS).logits.detach()
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **LORA[where])
    model = peft.get_peft_model(plain, config).eval()
    assert (model(input_ids=IDS).logits - before).abs().max() > 1e-3
    parts = BackboneAndHead(model)
    assert_parts_make_the_models_logits(parts, model)
    with model.disable_adapter():
        assert_parts_make_the_models_logits(parts, model)


@from_peft
def test_learnt_prompts_are_refused_since_only_the_wrapper_adds_them():
    model = peft.get_peft_model(
        tiny_model("llama", 1, pad=None), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(UnsupportedGenerationError, match="PROMPT_TUNING"):
        BackboneAndHead(model)


@pytest.mark.parametrize(
    "transform",
    [LogitTransform(), LogitTransform(soft_cap=2.0), LogitTransform(divisor=3.0), LogitTransform(scale=0.25)],
)
def test_the_slope_of_a_transform_is_its_derivative(transform):
    raw = torch.linspace(-5, 5, 11, dtype=torch.float64, requires_grad=True)
    transformed = transform(raw)
    (derivative,) = torch.autograd.grad(transformed.sum(), raw)
    torch.testing.assert_close(
        torch.as_tensor(transform.slope(transformed.detach())).expand(11).to(raw.dtype), derivative
    )
    assert transform.is_plain == (transform == LogitTransform())


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", sorted(FINISHED))
def test_the_head_as_tensors_makes_the_models_logits(family, tied):
    model = transformed_model(family, tied=tied)
    parts = BackboneAndHead(model)
    weight, bias, transform, vocab_size, _ = parts.head_parameters(vocab_size=40)
    raw = torch.nn.functional.linear(parts.backbone(input_ids=IDS).last_hidden_state, weight, bias)
    torch.testing.assert_close(transform(raw)[..., :vocab_size], model(input_ids=IDS).logits[..., :40])
    assert parts.head_parameters().vocab_size is None
    assert parts.head_parameters(vocab_size=999).vocab_size == 48


class Squared(transformers.LlamaForCausalLM):
    """A family nobody has heard of: its logits are transformed in a way that no config tells."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + outputs.logits**2 / 8
        return outputs


class Nameless(transformers.LlamaForCausalLM):
    """A model that does not say where its backbone is."""

    base_model_prefix = "elsewhere"


@pytest.mark.parametrize("kind", [Squared, Nameless])
def test_a_model_that_cannot_be_taken_apart_is_scored_by_its_own_forward_pass(kind):
    torch.manual_seed(1)
    model = kind(transformers.LlamaConfig(**COMMON, vocab_size=48)).eval()
    teacher = LocalTeacher(model, top_k=3)
    assert not teacher._parts.separable
    expected = model(input_ids=IDS).logits.log_softmax(-1).detach()
    teacher.start(IDS[:, :2])
    for begin, end in [(2, 4), (4, 5)]:
        scores = teacher.score(IDS[:, begin:end])
        ahead = expected[:, begin - 1 : end - 1]
        torch.testing.assert_close(scores.token_log_probs, ahead.gather(-1, IDS[:, begin:end, None])[..., 0])
        torch.testing.assert_close(scores.topk_log_probs, ahead.topk(3).values)
        assert torch.equal(scores.topk_ids, ahead.topk(3).indices)


@pytest.mark.parametrize("training", [True, False])
def test_taking_a_model_apart_leaves_it_as_it_was(training):
    model = tiny_model("llama", 1, attention_dropout=0.5).train(training)
    model.model.layers[0].eval()  # a part that its owner froze
    modes = [part.training for part in model.modules()]
    random_state = torch.random.get_rng_state()
    parts = BackboneAndHead(model)
    assert parts.separable
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_models_that_cannot_be_a_student_or_teacher_are_refused():
    tiny = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    tiny |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 48}
    with pytest.raises(UnsupportedGenerationError, match="encoder-decoder"):
        base_causal_lm(transformers.BartForConditionalGeneration(transformers.BartConfig(**tiny)))
    with pytest.raises(UnsupportedGenerationError, match="no LM head; load it with AutoModelForCausalLM"):
        base_causal_lm(tiny_model("llama", 1).model)
    with pytest.raises(UnsupportedGenerationError, match="no LM head"):
        base_causal_lm(torch.nn.Linear(2, 2))


def test_the_text_config_and_device_are_those_of_the_language_model():
    model = tiny_model("llama", 1)
    assert text_config(model) is model.config
    assert input_device(model) == torch.device("cpu")
