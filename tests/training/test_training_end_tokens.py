"""A Base student under an Instruct teacher: it learns to end where the teacher does, and what is saved ends there as well.

The miniature of Qwen3-1.7B-Base <- Qwen3-4B: the student's generation config and tokenizer end documents with one token, the
teacher ends turns with another. In 30 steps the share of responses that end within 24 tokens rises from .42 to 1.00, the
teacher's; with the student's end alone, as before, it falls from .11 to .02: the student learns to say the teacher's end and
goes on behind it.

Public reports: modelscope/ms-swift#9526, QwenLM/Qwen3#927, huggingface/open-r1#663,
huggingface/trl#2820 (stop strings).
"""

import json
import random

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.generation import LoopEngine, Request, Sampling
from prune_opd_hf.training import PruneOPDConfig, PruneOPDTrainer

PAD, BEGIN, END_OF_TEXT, NEXT, END_OF_TURN, FIRST, LAST = 0, 1, 2, 5, 6, 7, 15
CAP = 24


def letter(token):
    return chr(ord("a") + token)


def tokenizer(eos=END_OF_TEXT):
    letters = Tokenizer(BPE(vocab={letter(token): token for token in range(LAST + 1)}, merges=[]))
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, eos_token=letter(eos), pad_token=letter(PAD))


def model(seed, ends):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=LAST + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=ends[0],
        pad_token_id=PAD,
        bos_token_id=BEGIN,
    )
    made = LlamaForCausalLM(config)
    made.generation_config.eos_token_id = ends
    return made


def count(first):
    """Counting up from a number, a response to it."""
    return list(range(first, LAST + 1))


def instruct_text(draw):
    """One turn: the numbers in order, and the end of the turn."""
    return [BEGIN, *count(draw.randint(FIRST, LAST - 1)), END_OF_TURN]


def base_text(draw):
    """Text as a Base model has read it: one count after another, seldom a turn's end between them, seldom an end."""
    text = [BEGIN]
    while True:
        text += count(draw.randint(FIRST, LAST - 1))
        what = draw.choices([NEXT, END_OF_TURN, END_OF_TEXT], [0.82, 0.15, 0.03])[0]
        text.append(what)
        if what == END_OF_TEXT or len(text) > 48:
            return text[:48]


def taught(student, text, steps):
    """Supervised training on texts of this kind."""
    draw, optimizer = random.Random(0), torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(steps):
        texts = [text(draw) for _ in range(32)]
        ids = torch.full((32, max(map(len, texts))), PAD)
        for row, tokens in enumerate(texts):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        loss = student(ids, labels=ids.masked_fill(ids == PAD, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.eval()


@pytest.fixture(scope="module")
def pair():
    """The weights of student and teacher."""
    student = taught(model(1, [END_OF_TEXT]), base_text, 120)
    teacher = taught(model(2, [END_OF_TURN, END_OF_TEXT]), instruct_text, 120)
    return student.state_dict(), teacher.state_dict()


def load(weights, ends):
    made = model(0, ends)
    made.load_state_dict(weights)
    return made


PROMPTS = [letter(BEGIN) + letter(number) for number in range(FIRST, LAST)]


def make_trainer(
    tmp_path,
    pair,
    *,
    tokenizers=(END_OF_TEXT, END_OF_TURN),
    teacher_ends=(END_OF_TURN, END_OF_TEXT),
    peft_config=None,
    **changes,
):
    student, teacher = load(pair[0], [END_OF_TEXT]), load(pair[1], list(teacher_ends))
    settings = {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 10,
        "max_steps": 30,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "num_generations": 4,
        "max_completion_length": CAP,
        "drift_metric": "overlap",
        "drift_top_k": 4,
        "drift_threshold": 0.5,
        "drift_weight_drop": 0.2,
        "num_generations_eval": 16,
        **changes,
    }
    return PruneOPDTrainer(
        student,
        teacher,
        PruneOPDConfig(**settings),
        Dataset.from_dict({"prompt": PROMPTS * 8}),
        Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer(tokenizers[0]),
        teacher_processing_class=tokenizer(tokenizers[1]),
        peft_config=peft_config,
    )


def share_that_ends(model, ends, rows=16):
    """Of responses within the cap, sampled from the model."""
    engine = LoopEngine(model, Sampling(CAP, tuple(ends), PAD), slots=64)
    prompts = [(BEGIN, number) for number in range(FIRST, LAST)] * rows
    reasons = [reason for *_, reason in engine.generate(Request(prompt, n) for n, prompt in enumerate(prompts))]
    return reasons.count("eos") / len(reasons)


def test_a_base_student_learns_to_end_where_its_instruct_teacher_does_and_before_the_fix_ran_to_the_cap(tmp_path, pair):
    teachers = share_that_ends(load(pair[1], [END_OF_TURN]), [END_OF_TURN])
    shares = {}
    for name, changes in {"now": {}, "before": {"eos_token_id": [END_OF_TEXT]}}.items():
        trainer = make_trainer(tmp_path / name, pair, **changes)
        before = 1 - trainer.evaluate()["eval_truncated_share"]
        trainer.train()
        shares[name] = before, 1 - trainer.evaluate()["eval_truncated_share"]
        trainer.save_model()
    assert teachers > 0.95, shares
    assert shares["now"][0] < 0.5
    assert shares["now"][1] > 0.95
    assert shares["before"][1] < 0.05
    # What was saved ends by itself in plain Transformers, which knows nothing but the folder.
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "now" / "run")
    ids = torch.tensor([[BEGIN, number] for number in range(FIRST, LAST)])
    sequences = saved.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=CAP)
    assert all(END_OF_TURN in row[2:] for row in sequences.tolist())
    assert sequences.shape[1] < ids.shape[1] + CAP


# QwenLM/Qwen3#1064: embeddings and head are frozen, the end's among them
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_an_adapter_on_a_base_student_learns_to_end_although_no_embedding_moves(tmp_path, pair):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=8, target_modules="all-linear")
    trainer = make_trainer(tmp_path, pair, peft_config=adapter, learning_rate=1e-2, num_generations_eval=4)
    before = 1 - trainer.evaluate()["eval_truncated_share"]
    trainer.train()
    assert before < 0.5
    assert 1 - trainer.evaluate()["eval_truncated_share"] > 0.9


# (a) and (b) of the issue: the end tokens used were the student's generation config's alone, [2]
@pytest.mark.parametrize(
    ("tokenizers", "teacher_ends"),
    [
        ((END_OF_TEXT, END_OF_TEXT), (END_OF_TURN, END_OF_TEXT)),
        ((END_OF_TURN, END_OF_TEXT), (END_OF_TEXT,)),
        ((END_OF_TEXT, END_OF_TURN), (END_OF_TEXT,)),
    ],
)
def test_training_evaluation_and_both_monitors_end_a_response_at_every_end_that_is_named(
    tmp_path, pair, tokenizers, teacher_ends
):
    trainer = make_trainer(tmp_path, pair, tokenizers=tokenizers, teacher_ends=teacher_ends)
    expected = {END_OF_TEXT, END_OF_TURN}
    evaluation = trainer.evaluation
    for engine, monitor in ((trainer.engine, trainer.monitor), (evaluation.engine, evaluation.monitor)):
        assert {*engine.sampling.eos_token_ids} == {*monitor.settings.eos_token_ids} == expected
    assert {*trainer.model.generation_config.eos_token_id} == expected


@pytest.mark.parametrize("changes", [{}, {"eos_token_id": [END_OF_TURN]}])
def test_every_saved_folder_names_the_ends_of_the_run(tmp_path, pair, changes):
    trainer = make_trainer(tmp_path, pair, max_steps=1, save_strategy="steps", save_steps=1, **changes)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == list(trainer.end_tokens.token_ids)
    assert trainer.end_tokens.token_ids == ((END_OF_TURN,) if changes else (END_OF_TEXT, END_OF_TURN))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_an_adapter_is_saved_with_the_ends_of_the_run(tmp_path, pair):
    peft = pytest.importorskip("peft")
    trainer = make_trainer(tmp_path, pair)
    trainer.model = peft.get_peft_model(trainer.model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.save_model()
    assert GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id == [END_OF_TEXT, END_OF_TURN]


def test_a_run_begins_with_the_ends_and_who_names_them(tmp_path, pair, capsys):
    make_trainer(tmp_path, pair, max_steps=1).train()
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (
        "end tokens: 'c' 2 (the student's generation config, the student's tokenizer, the teacher), "
        "'g' 6 (the teacher, the teacher's tokenizer)"
    )


def test_stop_strings_end_responses_in_training_and_in_evaluation(tmp_path, pair, capsys):
    strings = json.dumps({"stop_strings": [letter(11)]})
    trainer = make_trainer(tmp_path, pair, max_steps=1, generation_kwargs=strings, learning_rate=1e-9)
    trainer.train()
    assert "or behind the text ['l']" in capsys.readouterr().out
    rollouts = trainer.step.rollouts
    stopped = [row for row, reason in enumerate(rollouts.stop_reason) if reason == "criterion"]
    assert stopped
    last = rollouts.response_ids[torch.arange(len(rollouts)), rollouts.lengths - 1]
    assert last[stopped].tolist() == [11] * len(stopped)
    evaluated = trainer.evaluate()
    assert evaluated["eval_mean_tokens"] < 8  # from 7 to 11 it counts five numbers at most, from 12 on it goes on


def test_ends_that_not_both_models_know_are_refused_at_set_up(tmp_path, pair):
    with pytest.raises(ConfigError, match="eos_token_id must name tokens below 16"):
        make_trainer(tmp_path, pair, eos_token_id=[40])
