"""The real pair's files, without its models."""

import torch
from cold_start import PROMPTS
from prompts import TOPICS, questions
from smollm2 import save
from tiny_models import tiny_model
from tiny_tokenizers import byte_tokenizer
from transformers import AutoModelForCausalLM


def test_of_several_preparations_at_once_the_first_stays_and_none_fails(tmp_path):
    first, second = tiny_model("llama", 1), tiny_model("llama", 2)
    for model in (first, second):
        save(model, byte_tokenizer(), tmp_path / "teacher")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    assert torch.equal(kept.model.embed_tokens.weight, first.model.embed_tokens.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_held_out_questions_are_about_topics_that_the_prompts_never_name():
    asked, held_out = (questions(*wanted) for wanted in PROMPTS.values())
    named = {topic for topic in TOPICS if any(topic in question for question in asked)}
    assert len({*asked}) == 240
    assert len({*held_out}) == 60
    assert not [question for question in held_out if any(topic in question for topic in named)]
