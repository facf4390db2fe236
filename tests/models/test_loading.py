"""Loading whole weights, adapters and tokenizers by name: what arrives, with which arguments, and one line where nothing does.

Public reports of these kinds: a frozen adapter as student (peft 1340, trl 6700, trl 3926), an adapter as teacher (torchtune 2520),
arguments that stop at the model (trl 1806, sentence-transformers 2404), a dtype under its older name (trl 5717), an adapter of a
tied head merged into the embeddings as well (peft 2018, peft 436), an adapter with tokens that its base lacks (peft 1457).
"""

import json
import os

import peft
import pytest
import torch
import transformers
from tiny_models import tiny_model
from tiny_tokenizers import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from prune_opd_hf.errors import ConfigError, InputError, UnsupportedGenerationError
from prune_opd_hf.models.loading import (
    add_adapter,
    copy_with_shared_weights,
    ensure_trainable,
    find_source,
    load_base,
    load_causal_lm,
    load_tokenizer,
    make_adapter,
    merge_adapter,
    published_name,
)
from prune_opd_hf.tasks.pair import WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.tensor([[3, 4, 5, 6, 7]])


def lora(**changes):
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return peft.LoraConfig(**{**settings, **changes})


def save_adapter(folder, **changes):
    """An adapter on a tiny base, both on disk, with the base's tokenizer beside the base; the adapted model."""
    tiny_model("qwen3", 1, vocab_size=64, pad=None).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(WEIGHTS / "student").save_pretrained(folder / "base")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), lora(**changes)).eval()
    model.save_pretrained(folder / "adapter")
    return model


# ---------------------------------------------------------------------- whole weights


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
@pytest.mark.parametrize(
    "config",
    ["{", "[]", "null", "{}", '{"model_type": "no such model"}', '{"model_type": "qwen3", "hidden_size": "a"}'],
)
def test_what_cannot_be_loaded_is_one_line_that_names_it(tmp_path, load, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match="cannot load the teacher") as refusal:
        load(tmp_path, "teacher")
    assert str(tmp_path) in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert refusal.value.__cause__ is not None


@pytest.mark.parametrize(
    "name", ["./nothing", "../nothing", "~/nothing", "runs/a/nothing", "/nothing", "my model", "a..b", "."]
)
def test_a_path_without_a_folder_is_no_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refusal:
        load_causal_lm(name)
    reason = "no such folder" if name != "." else "Unrecognized model"
    assert str(refusal.value).startswith(f"cannot load the model {name!r}: {reason}")


def test_where_a_name_may_be_an_id_the_message_says_that_there_is_no_such_folder_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"cannot load the model 'runs/nothing': .* \(no folder of this name here\)$"):
        load_causal_lm("runs/nothing")


def test_the_folder_of_a_run_that_saved_no_student_is_refused_with_its_newest_checkpoint(tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (step, step))
    with pytest.raises(
        InputError, match=r"no saved model: name one of them, such as .*checkpoint-10, or call trainer\.save_model"
    ):
        load_causal_lm(tmp_path)


def test_a_file_is_no_model_folder(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(InputError, match=r"model\.bin': it is a file, no folder"):
        load_causal_lm(tmp_path / "model.bin")


def test_weights_cut_short_are_one_line(tmp_path):
    tiny_model("qwen3", 0).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot load the student"):
        load_causal_lm(tmp_path, "student")


def test_arguments_reach_the_loader(tmp_path):
    saved = tiny_model("qwen3", 0)
    saved.save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.get_input_embeddings().weight, saved.get_input_embeddings().weight.bfloat16())


@pytest.mark.parametrize("dtype", ["bf16", "float23", "Tensor"])
def test_an_unknown_dtype_is_refused_with_those_that_are_known(tmp_path, dtype):
    with pytest.raises(ConfigError, match=f"dtype must be auto, float32, bfloat16 or float16, got '{dtype}'"):
        load_causal_lm(WEIGHTS / "student", dtype=dtype)


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_a_dtype_under_its_older_name_is_refused_since_a_default_would_win(tmp_path, name):
    save_adapter(tmp_path)
    with pytest.raises(ConfigError, match="torch_dtype of the student is called dtype: write dtype='bfloat16'"):
        load_causal_lm(tmp_path / name, "student", torch_dtype="bfloat16", dtype=torch.float32)


def test_a_tokenizer_takes_its_part_of_a_models_arguments(monkeypatch):
    seen, tokenizer = {}, byte_tokenizer()

    def load(name, **words):
        seen.update(words, name=name)
        return tokenizer

    monkeypatch.setattr("prune_opd_hf.models.loading.AutoTokenizer.from_pretrained", load)
    words = {"revision": "v1", "trust_remote_code": True, "token": "t", "subfolder": "s", "cache_dir": "c"}
    load_tokenizer("owner/model", "student", **words, dtype="auto", attn_implementation="sdpa", device_map="auto")
    assert seen == {**words, "name": "owner/model"}


def test_a_published_name_holds_no_path_of_this_machine(tmp_path, monkeypatch):
    folder = tmp_path / "team" / "student"
    folder.mkdir(parents=True)
    assert published_name("owner/model") == "owner/model"
    assert published_name("gpt2") == "gpt2"
    monkeypatch.chdir(tmp_path)
    for name in (
        folder,
        "team/student",
        "./team/student/",
        "~/elsewhere/student",
    ):  # the second has the form of a Hub id
        assert published_name(name) == "student"
    monkeypatch.chdir(folder)
    assert published_name(".") == "student"
    model = tiny_model("qwen3", 0)
    assert published_name(model) is None
    model.config._name_or_path = str(folder)
    assert published_name(model) == "student"


# ---------------------------------------------------------------------- adapters


def test_an_adapter_comes_on_the_base_that_it_names(tmp_path):
    expected = save_adapter(tmp_path)(IDS).logits
    loaded = load_causal_lm(tmp_path / "adapter", "student")
    assert isinstance(loaded, peft.PeftModel)
    torch.testing.assert_close(loaded(IDS).logits, expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(IDS).logits
    assert float((plain - expected).detach().abs().max()) > 0.01
    assert load_tokenizer(tmp_path / "adapter").get_vocab() == load_tokenizer(tmp_path / "base").get_vocab()


@pytest.mark.parametrize("trainable", [False, True])
def test_an_adapter_alone_gets_gradients_and_only_where_it_is_to_be_trained(tmp_path, trainable):
    save_adapter(tmp_path)
    source = find_source(tmp_path / "adapter", "student")
    loaded = add_adapter(load_base(source, "student"), source, "student", trainable=trainable)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {
        name for name, _ in loaded.named_parameters() if "lora_" in name and trainable
    }


def test_where_an_adapters_files_are_says_nothing_of_its_base(tmp_path):
    save_adapter(tmp_path)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "revision": "of-the-base"}))
    source = find_source(tmp_path / "adapter", revision="of-the-adapter", subfolder="", dtype="auto", token="t")
    assert source.base == str(tmp_path / "base")
    assert source.arguments == {"revision": "of-the-base", "dtype": "auto", "token": "t"}
    assert source.adapter_arguments == {"revision": "of-the-adapter", "subfolder": "", "token": "t"}


def test_the_generation_config_beside_an_adapter_is_the_students(tmp_path):
    save_adapter(tmp_path)
    GenerationConfig(eos_token_id=[7, 9]).save_pretrained(tmp_path / "adapter")
    assert load_causal_lm(tmp_path / "adapter").generation_config.eos_token_id == [7, 9]


def test_whole_weights_beside_an_adapters_config_are_whole_weights(tmp_path):
    save_adapter(tmp_path)
    (tmp_path / "base" / "adapter_config.json").write_text((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert find_source(tmp_path / "base").adapter is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "/no/such/base"}, "cannot load the base of the student '/no/such/base': no such"),
        ({"peft_type": "NONE"}, "cannot load the student"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_one_line_with_the_cause(tmp_path, change, message):
    save_adapter(tmp_path)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(InputError, match=message) as refusal:
        load_causal_lm(tmp_path / "adapter", "student")
    assert len(str(refusal.value).splitlines()) == 1


def test_an_adapter_with_tokens_that_its_base_lacks_is_one_line_with_both_sizes(tmp_path):
    save_adapter(tmp_path, modules_to_save=["embed_tokens"])
    tiny_model("qwen3", 1, vocab_size=62, pad=None).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"size mismatch for .*embed_tokens.*\[64, 32\].*\[62, 32\]") as refusal:
        load_causal_lm(tmp_path / "adapter", "student")
    assert len(str(refusal.value).splitlines()) == 1


def test_an_adapter_without_peft_says_what_to_install(tmp_path, monkeypatch):
    save_adapter(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(InputError, match=r"it is an adapter, which needs peft: pip install 'prune-opd-hf\[peft\]'"):
        load_causal_lm(tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["peft", "transformers"])
def test_an_adapter_that_was_loaded_for_inference_can_be_trained_all_the_same(tmp_path, kind):
    save_adapter(tmp_path)
    load = load_causal_lm if kind == "peft" else AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "adapter")
    assert not any(p.requires_grad for p in model.parameters())
    ensure_trainable(model)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_a_student_without_a_weight_to_train_is_refused():
    with pytest.raises(ConfigError, match="no weight of the student gets a gradient"):
        ensure_trainable(tiny_model("qwen3", 0).requires_grad_(False))


def test_an_adapter_on_an_adapter_and_one_that_does_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="has an adapter already: leave out peft_config"):
        make_adapter(save_adapter(tmp_path), lora())
    with pytest.raises(ConfigError, match=r"the adapter does not fit the student: Target modules .*'nothing'"):
        make_adapter(tiny_model("qwen3", 0), lora(target_modules=["nothing"]))


def test_two_adapters_on_one_copy_of_the_weights_do_not_know_of_each_other(tmp_path):
    base = tiny_model("qwen3", 1)
    before = base(IDS).logits
    other = copy_with_shared_weights(base)
    mine, theirs = peft.get_peft_model(base, lora()).eval(), peft.get_peft_model(other, lora()).eval()
    assert float((mine(IDS).logits - before).detach().abs().max()) > 0.01
    assert float((mine(IDS).logits - theirs(IDS).logits).detach().abs().max()) > 0.01
    pointers = [
        {p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name} for model in (mine, theirs)
    ]
    assert pointers[0] == pointers[1]
    with theirs.disable_adapter():
        torch.testing.assert_close(theirs(IDS).logits, before)


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], "all-linear"])
def test_a_merged_adapter_is_a_plain_model_that_says_the_same(tmp_path, modules):
    expected = save_adapter(tmp_path, target_modules=modules)(IDS).logits
    (tmp_path / "adapter" / "training_summary.json").write_text("{}")
    (tmp_path / "disk").mkdir()
    (tmp_path / "merged").symlink_to(tmp_path / "disk")  # an empty folder that is there stays what it is
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(merged) is transformers.Qwen3ForCausalLM
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == load_tokenizer(tmp_path / "base").get_vocab()
    )
    assert (tmp_path / "merged" / "training_summary.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "disk", "merged"]
    assert not [path for path in (tmp_path / "merged").iterdir() if path.is_dir()]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_an_adapter_of_one_of_two_tied_layers_is_merged_into_that_one_alone(tmp_path, module):
    tiny_model("qwen3", 1, vocab_size=64, pad=None, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(WEIGHTS / "student").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = base(IDS).logits
    model = peft.get_peft_model(base, lora(target_modules=[module, "q_proj"])).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = model(IDS).logits
    assert (expected - plain).abs().max() > 0.1
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_merge_into_an_empty_folder_that_is_cut_off_anywhere_leaves_no_model(tmp_path, monkeypatch):
    save_adapter(tmp_path)
    (tmp_path / "merged").mkdir()
    there = []
    monkeypatch.setattr(
        "prune_opd_hf.models.loading.os.replace",
        lambda source, place: (there.append({path.name for path in place.parent.iterdir()}), source.rename(place)),
    )
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert len(there) > 3
    assert not any("config.json" in names for names in there)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").num_parameters() > 0


def test_what_is_no_adapter_and_a_folder_in_use_are_not_merged(tmp_path):
    save_adapter(tmp_path)
    with pytest.raises(InputError, match=r"base is no adapter: there is no adapter_config\.json"):
        merge_adapter(tmp_path / "base", tmp_path / "merged")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        merge_adapter(tmp_path / "adapter", tmp_path / "base")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    )
    model.save_pretrained(tmp_path / "prompt")
    with pytest.raises(UnsupportedGenerationError, match="adapters that learn a prompt"):
        merge_adapter(tmp_path / "prompt", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_fails_leaves_nothing(tmp_path, monkeypatch):
    save_adapter(tmp_path)
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
