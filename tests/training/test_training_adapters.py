"""Adapters are students and teachers like any model, in every command, with one copy of the weights where the base is the same.

Public reports of these kinds: a frozen adapter as student (peft 1340, trl 6700, trl 3926), an adapter as teacher (torchtune 2520),
two copies of one model (unsloth 3008).
"""

import json

import peft
import pytest
import torch
from tiny_models import tiny_model
from trainer_helpers import TASK, prompts_of, settings
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from prune_opd_hf import PruneOPDTrainer
from prune_opd_hf.cli import main
from prune_opd_hf.errors import ConfigError
from prune_opd_hf.evaluation import EvaluationReport
from prune_opd_hf.models.loading import ModelSource, load_causal_lm
from prune_opd_hf.records.training_summary import TrainingSummary
from prune_opd_hf.records.weights import weights_hash
from prune_opd_hf.tasks import load_student, load_teacher, load_tokenizer
from prune_opd_hf.tasks.pair import WEIGHTS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]
STUDENT, TEACHER = str(WEIGHTS / "student"), str(WEIGHTS / "teacher")
TRAIN = (
    "train --teacher_model_name_or_path embedded --use_cpu true --report_to none --disable_tqdm true "
    "--max_completion_length 12 --per_device_train_batch_size 4 --num_generations 2 --drift_min_length 0 --drift_top_k 2 "
    "--max_steps 1 --learning_rate 1e-2"
).split()
EVALUATE = "--benchmarks chain --limit 4 --num_generations 2 --max_completion_length 40 --temperature 0".split()


def lora(**changes):
    arguments = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return peft.LoraConfig(**{**arguments, **changes})


def trainer_of(tmp_path, student, teacher, peft_config=None, **changes):
    return PruneOPDTrainer(
        student,
        teacher,
        settings(tmp_path, **changes),
        TASK.dataset(16, seed=0),
        processing_class=load_tokenizer(),
        peft_config=peft_config,
    )


def train(student, output_dir, *more):
    """Run the command on a few prompts; its exit code."""
    prompts = output_dir.with_suffix(".jsonl")
    prompts.write_text("\n".join(json.dumps({"prompt": problem.prompt}) for problem in TASK.problems(8, seed=0)))
    arguments = ["--model_name_or_path", str(student), "--dataset_name", str(prompts), "--output_dir", str(output_dir)]
    return main([*TRAIN, *arguments, *more])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that the command has trained and saved."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    more = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj,v_proj", "down_proj"]
    assert train("embedded", folder, *more) == 0
    return folder


def frozen_weights(model):
    return {p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name}


def log_q_of(model, rollouts):
    """log q of the response tokens by one pass over each row without padding."""
    found = torch.zeros(rollouts.response_ids.shape)
    for row in range(len(rollouts)):
        prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
        response = rollouts.response_ids[row][rollouts.response_mask[row]]
        with torch.no_grad():
            logits = model(torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        found[row, : len(response)] = logits.log_softmax(-1).gather(-1, response.unsqueeze(-1)).squeeze(-1)
    return found


# ---------------------------------------------------------------------- what the commands make of an adapter


def test_an_adapter_is_saved_with_the_generation_config_of_the_student(adapter):
    assert (adapter / "adapter_config.json").is_file()
    saved = json.loads((adapter / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [load_tokenizer().eos_token_id]
    modules = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert sorted(modules) == ["down_proj", "q_proj", "v_proj"]


def test_the_student_that_was_trained_is_evaluated_and_merged_it_gives_the_same_answers(adapter, tmp_path, capsys):
    folders = {"adapter": adapter, "merged": tmp_path / "merged"}
    assert main(["merge", str(adapter), "--output_dir", str(folders["merged"])]) == 0
    answers = {}
    for name, folder in folders.items():
        output = tmp_path / f"evaluation of {name}"
        assert main(["evaluate", str(folder), *EVALUATE, "--output_dir", str(output)]) == 0
        assert EvaluationReport.load(output).model_hash == weights_hash(folder)
        lines = (output / "samples-00000.jsonl").read_text().splitlines()[1:]
        answers[name] = sorted((s["problem"], s["sample"], s["response"]) for s in map(json.loads, lines))
    assert answers["adapter"] == answers["merged"]
    assert type(AutoModelForCausalLM.from_pretrained(folders["merged"])).__name__ == "Qwen3ForCausalLM"
    assert TrainingSummary.load(folders["merged"]).steps == 1


def test_an_adapter_is_looked_at_by_the_preflight_as_student_and_as_teacher(adapter, tmp_path, capsys):
    arguments = (
        "--dataset_name PROMPTS --num_prompts 4 --num_generations 1 --max_completion_length 12 --drift_top_k 2".split()
    )
    arguments[1] = str(adapter.with_suffix(".jsonl"))
    pair = ["--model_name_or_path", str(adapter), "--teacher_model_name_or_path", str(adapter)]
    assert main(["preflight", *pair, *arguments, "--output_dir", str(tmp_path / "preflight")]) == 0


def test_an_adapter_is_trained_further_and_its_base_is_named_in_the_record(adapter, tmp_path, capsys):
    output = tmp_path / "further"
    assert train(adapter, output) == 0
    before, after = (load_causal_lm(folder).state_dict() for folder in (adapter, output))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert TrainingSummary.load(output).student_base == "student"  # the folder of the base
    named = [json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, output)]
    assert named[0]["base_model_name_or_path"] == named[1]["base_model_name_or_path"] == STUDENT


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--use_peft", "--lora_r", "2"], "the student has an adapter already: leave out peft_config (use_peft)"),
        (["--dtype", "float23"], "dtype must be auto, float32, bfloat16 or float16, got 'float23'"),
    ],
)
def test_what_does_not_go_with_an_adapter_is_one_line(adapter, tmp_path, capsys, more, said):
    assert train(adapter, tmp_path / "run", *more) == 2
    assert said in capsys.readouterr().err


# ---------------------------------------------------------------------- students


@pytest.mark.parametrize("how", ["by name", "frozen object", "put in by Transformers"])
def test_an_adapter_that_comes_frozen_learns_and_nothing_else_moves(adapter, tmp_path, how):
    load = {"frozen object": load_causal_lm, "put in by Transformers": AutoModelForCausalLM.from_pretrained}
    student = str(adapter) if how == "by name" else load[how](adapter)
    trainer = trainer_of(tmp_path, student, load_teacher(), loss_type="reverse_kl", max_steps=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_a_checkpoint_of_another_student_or_adapter_is_refused_in_one_line(tmp_path):
    """Else it is a ValueError or a RuntimeError of many lines."""
    data = TASK.dataset(32, seed=0)

    def trainer(student, steps):
        args = settings(tmp_path, max_steps=steps, save_strategy="steps", save_steps=1)
        return PruneOPDTrainer(
            student, load_teacher(), args=args, train_dataset=data, processing_class=load_tokenizer()
        )

    trainer(peft.get_peft_model(load_student(), lora(r=2)), 1).train()
    for other in (load_student(), peft.get_peft_model(load_student(), lora(r=4))):
        with pytest.raises(
            ConfigError, match=r"checkpoint-1 was trained with trained_weights=\d+, and this"
        ) as refused:
            trainer(other, 2).train(resume_from_checkpoint=True)
        assert "\n" not in str(refused.value)


def test_a_student_that_is_frozen_altogether_is_refused_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match="no weight of the student gets a gradient"):
        trainer_of(tmp_path, load_student().requires_grad_(False), load_teacher())


# ---------------------------------------------------------------------- teachers


def test_an_adapter_teaches_as_the_model_that_it_makes_of_its_base(adapter, tmp_path):
    for teacher in (str(adapter), load_causal_lm(adapter)):
        trainer = trainer_of(tmp_path, load_student(), teacher)
        rollouts = trainer.generate_rollouts(prompts_of(trainer, 4))
        expected, there = log_q_of(load_causal_lm(adapter), rollouts), rollouts.response_mask
        torch.testing.assert_close(rollouts.teacher_token_log_probs[there], expected[there], atol=1e-4, rtol=1e-4)


def test_the_base_of_a_lora_student_teaches_from_the_same_copy_of_the_weights(tmp_path):
    trainer = trainer_of(tmp_path, STUDENT, STUDENT, lora())
    assert frozen_weights(trainer.teacher.model) == frozen_weights(trainer.model)
    rollouts = trainer.generate_rollouts(prompts_of(trainer, 4))
    expected, there = log_q_of(load_student(), rollouts), rollouts.response_mask
    torch.testing.assert_close(rollouts.teacher_token_log_probs[there], expected[there], atol=1e-4, rtol=1e-4)
    assert float((rollouts.token_log_probs - rollouts.teacher_token_log_probs)[there].abs().max()) > 0.01


@pytest.mark.parametrize("fresh", [False, True], ids=["the same adapter", "another adapter"])
def test_an_adapter_on_the_base_of_a_lora_student_teaches_from_the_same_copy_and_stays(adapter, tmp_path, fresh):
    student = STUDENT if fresh else str(adapter)
    trainer = trainer_of(
        tmp_path, student, str(adapter), lora() if fresh else None, loss_type="reverse_kl", max_steps=2
    )
    assert frozen_weights(trainer.teacher.model) == frozen_weights(trainer.model)
    trainer.train()
    assert frozen_weights(trainer.teacher.model) == frozen_weights(trainer.model)
    rollouts = trainer.generate_rollouts(prompts_of(trainer, 4))
    expected, there = log_q_of(load_causal_lm(adapter), rollouts), rollouts.response_mask
    torch.testing.assert_close(rollouts.teacher_token_log_probs[there], expected[there], atol=1e-4, rtol=1e-4)
    assert float((rollouts.token_log_probs - rollouts.teacher_token_log_probs)[there].abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, {}),
        ({}, {"bias": "all"}),  # which trains biases of the base
        ({}, None),  # all weights are trained
    ],
)
def test_weights_that_are_not_the_same_or_do_not_stay_are_loaded_twice(tmp_path, changes, config):
    tiny_model("gpt2", 1, vocab_size=64, pad=None, eos=load_tokenizer().eos_token_id).save_pretrained(tmp_path / "base")
    load_tokenizer().save_pretrained(tmp_path / "base")
    name, adapter = (
        str(tmp_path / "base"),
        None if config is None else lora(target_modules=["c_attn"], fan_in_fan_out=True, **config),
    )
    trainer = trainer_of(tmp_path, name, name, adapter, **changes)
    assert not frozen_weights(trainer.teacher.model) & frozen_weights(trainer.model)
    assert not any(p.requires_grad for p in trainer.teacher.model.parameters())


def test_one_name_with_two_revisions_is_two_models():

    sources = [ModelSource("owner/model", {"revision": revision, "dtype": "auto"}) for revision in (None, None, "v1")]
    assert sources[0].has_base_of(sources[1])
    assert not sources[0].has_base_of(sources[2])


def test_the_model_that_an_adapter_was_put_into_teaches_without_it(tmp_path):
    base = load_student()
    student = peft.get_peft_model(base, lora())
    trainer = trainer_of(tmp_path, student, base)
    rollouts = trainer.generate_rollouts(prompts_of(trainer, 4))
    expected, there = log_q_of(load_student(), rollouts), rollouts.response_mask
    torch.testing.assert_close(rollouts.teacher_token_log_probs[there], expected[there], atol=1e-4, rtol=1e-4)


def test_weights_below_an_adapter_keep_the_type_that_they_were_saved_in(tmp_path):
    load_student().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    load_tokenizer().save_pretrained(tmp_path / "base")
    dtypes = []
    for config in (lora(), None):
        trainer = trainer_of(tmp_path, str(tmp_path / "base"), load_teacher(), config)
        dtypes.append({(p.requires_grad, p.dtype) for p in trainer.model.parameters()})
    assert dtypes == [{(False, torch.bfloat16), (True, torch.float32)}, {(True, torch.float32)}]


# ---------------------------------------------------------------------- quantized weights, other adapters


@pytest.mark.parametrize("bits", [{"--load_in_4bit"}, {"--load_in_8bit"}])
@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own, about CPUs and about inputs that it casts
def test_an_adapter_on_quantized_weights_learns_is_saved_and_merges(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    output, merged = tmp_path / "run", tmp_path / "merged"
    assert train(STUDENT, output, "--use_peft", "--lora_r", "4", *bits) == 0
    trained = load_causal_lm(output).state_dict()
    moved = {name for name, value in trained.items() if "lora_B" in name and bool(value.any())}  # they begin at 0
    assert moved
    assert main(["merge", str(output), "--output_dir", str(merged)]) == 0
    before, after = (load_causal_lm(folder).state_dict() for folder in (STUDENT, merged))
    assert {value.dtype for value in after.values()} == {value.dtype for value in before.values()}  # into whole weights
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_quantized_weights_without_an_adapter_are_refused(tmp_path):
    student = load_student()
    student.is_quantized = True
    with pytest.raises(ConfigError, match="quantized weights are not trained: train an adapter on them"):
        trainer_of(tmp_path, student, load_teacher())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--use_peft", "--load_in_4bit", "--load_in_8bit"], "exclude each other"),
        (["--use_peft", "--bnb_4bit_quant_type", "fp4"], "bnb_4bit_quant_type has no effect without load_in_4bit"),
        (["--use_dora"], "use_dora has no effect without use_peft"),
        (["--lora_modules_to_save", "lm_head"], "lora_modules_to_save has no effect without use_peft"),
    ],
)
def test_settings_of_adapters_that_do_nothing_are_refused(tmp_path, capsys, more, said):
    assert train(STUDENT, tmp_path / "run", *more) == 2
    assert said in capsys.readouterr().err


def test_dora_and_layers_that_are_trained_whole_learn_and_merge(tmp_path):
    output, merged = tmp_path / "run", tmp_path / "merged"
    more = [
        "--use_peft",
        "--lora_r",
        "2",
        "--use_dora",
        "--lora_target_modules",
        "q_proj",
        "--lora_modules_to_save",
        "down_proj",
    ]
    assert train(STUDENT, output, *more) == 0
    named = json.loads((output / "adapter_config.json").read_text())
    assert (named["use_dora"], named["modules_to_save"]) == (True, ["down_proj"])
    assert main(["merge", str(output), "--output_dir", str(merged)]) == 0
    before, after, adapted = load_student(), load_causal_lm(merged), load_causal_lm(output)
    whole = [model.model.layers[0].mlp.down_proj.weight for model in (before, after)]
    assert not torch.equal(*whole)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(after(ids).logits, adapted(ids).logits, atol=1e-5)


def test_a_quantization_of_the_student_that_cannot_be_is_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match=r"the quantization .*wishful.* cannot be used"):
        settings(tmp_path, model_init_kwargs={"quantization_config": {"quant_method": "wishful"}})


def test_four_bits_of_the_student_are_not_eight_of_its_teacher():
    four, eight, also_four = (
        ModelSource("base", {"quantization_config": BitsAndBytesConfig(**{f"load_in_{bits}bit": True})})
        for bits in (4, 8, 4)
    )
    assert not four.has_base_of(eight)
    assert four.has_base_of(also_four)
