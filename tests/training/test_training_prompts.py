"""Prompts from datasets: token ids with their rows, what is refused before a model is loaded, and how prompts repeat."""

import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import byte_tokenizer
from trainer_helpers import TASK, make_trainer, settings

from prune_opd_hf import PruneOPDTrainer
from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.generation.prompts import left_padded
from prune_opd_hf.models.prompts import PromptEncoder
from prune_opd_hf.tasks import ChainTask, load_student, load_teacher, load_tokenizer
from prune_opd_hf.tasks.pair import WEIGHTS
from prune_opd_hf.training import prompts as prompts_module
from prune_opd_hf.training.prompt_batches import RepeatSampler, repeat_rows, unpadded_rows
from prune_opd_hf.training.prompt_sources import shaped_prompt
from prune_opd_hf.training.prompts import DroppedPrompts, check_datasets, tokenize_prompts

STUDENT = str(WEIGHTS / "student")
PROMPTS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5)


@given(PROMPTS, PROMPTS)
def test_padded_batches_hold_their_prompts(first, second):
    batches = []
    for prompts in (first, second):
        ids, mask = left_padded(prompts, 0, torch.device("cpu"))
        batches.append({"input_ids": ids, "attention_mask": mask})
    assert unpadded_rows(batches) == [{"input_ids": tuple(prompt)} for prompt in first + second]


def tokenize(dataset, tokenizer=None, *, max_prompt_length=None, dropped=None, **encoding):
    encode = PromptEncoder(load_tokenizer() if tokenizer is None else tokenizer, **encoding)
    return tokenize_prompts(dataset, encode, max_prompt_length=max_prompt_length, dropped=dropped)


def test_a_dataset_without_prompts_names_its_columns_and_the_remedy():
    with pytest.raises(InputError, match=r"it has question: rename one \(rename_column"):
        tokenize(Dataset.from_dict({"question": ["a"]}))


def say(*turns):
    return [{"role": role, "content": content} for role, content in turns]


FAULTS = [
    (say(("user", "a"), ("assistant", "b")), "the last message is the assistant's"),
    ([], "the conversation is empty"),
    (say(("user", None)), "message 0 (user) has no content"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("prompt", "said"), FAULTS, ids=["answer", "empty", "no content"])
def test_a_prompt_that_cannot_be_used_is_named_by_its_row(prompt, said, streaming):
    dataset = Dataset.from_list([{"prompt": say(("user", "a"))}, {"prompt": say(("user", "a"))}, {"prompt": prompt}])
    with pytest.raises(InputError) as refusal:
        list(tokenize(dataset.to_iterable_dataset() if streaming else dataset, byte_tokenizer()))
    assert str(refusal.value).startswith(f"the prompt in row 2: {said}")


def test_conversations_in_parts_and_with_answers_are_what_the_settings_of_a_run_make_of_them():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": parts}]}])
    assert tokenize(dataset, byte_tokenizer())[0]["input_ids"] == PromptEncoder(byte_tokenizer())(say(("user", "ab")))
    answered = Dataset.from_list([{"prompt": say(("user", "a"), ("assistant", "b"))}])
    for treatment in ("drop", "prefill"):
        encode = PromptEncoder(byte_tokenizer(), final_assistant_message=treatment)
        kept = tokenize(answered, byte_tokenizer(), final_assistant_message=treatment)
        assert kept[0]["input_ids"] == encode(answered[0]["prompt"])


@pytest.mark.parametrize("streaming", [False, True])
def test_settings_of_the_chat_template_are_refused_where_prompts_are_text(streaming):
    for prompt, acts in (("a", False), (say(("user", "a")), True)):
        dataset = Dataset.from_list([{"prompt": prompt}] * 2)
        dataset = dataset.to_iterable_dataset() if streaming else dataset
        if acts:
            assert len(list(tokenize(dataset, byte_tokenizer(), chat_template_kwargs={"think": True}))) == 2
            continue
        with pytest.raises(ConfigError, match="chat_template_kwargs has no effect on prompts that are text"):
            tokenize(dataset, byte_tokenizer(), chat_template_kwargs={"think": True})


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_would_change_a_prompt_and_are_not_used_are_named_once(caplog, streaming):
    rows = [{"prompt": "a", "tools": "[]", "answer": "1", "system": "Be brief."}] * 3
    dataset = Dataset.from_list(rows)
    list(tokenize(dataset.to_iterable_dataset() if streaming else dataset, byte_tokenizer()))
    (line,) = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
    assert line.endswith("not used: tools, system")


@pytest.mark.parametrize(
    ("prompt", "as_chat", "expected"),
    [
        ("a", False, "a!"),
        ("a", True, say(("user", "a!"))),
        (say(("user", "a"), ("assistant", "b")), True, say(("user", "a!"), ("assistant", "b"))),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], False, say(("user", "a!"))),
        (say(("system", "a")), False, say(("system", "a"))),
        ([], False, []),
        (3, False, 3),
    ],
)
def test_a_suffix_goes_behind_the_last_thing_that_the_user_says(prompt, as_chat, expected):
    assert shaped_prompt(prompt, "!", as_chat) == expected


# ---------------------------------------------------------------------- what is no dataset

SPLITS = DatasetDict(train=TASK.dataset(2, seed=0), test=TASK.dataset(2, seed=1))


@pytest.mark.parametrize(
    ("name", "dataset", "said"),
    [
        (
            "train_dataset",
            SPLITS,
            "is a DatasetDict with the splits train, test: pass one of them, as train_dataset=dataset",
        ),
        (
            "train_dataset",
            [{"prompt": "a"}],
            r"must be a Dataset or an IterableDataset .*, got list: .*Dataset\.from_list",
        ),
        ("train_dataset", "org/prompts", "got str"),
        ("train_dataset", Dataset.from_dict({"prompt": []}), "train_dataset holds no prompts: is it the right split"),
        ("train_dataset", Dataset.from_list([]), "train_dataset holds no prompts"),
        ("eval_dataset", [{"prompt": "a"}], "eval_dataset must be a Dataset"),
        ("eval_dataset", {"small": [1]}, r"eval_dataset\['small'\] must be a Dataset"),
        ("eval_dataset", {"small": Dataset.from_list([])}, r"eval_dataset\['small'\] holds no prompts"),
    ],
)
def test_what_is_no_dataset_of_prompts_is_refused_with_what_to_pass(name, dataset, said):
    with pytest.raises(InputError, match=said) as refusal:
        check_datasets(**{name: dataset})
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_datasets_are_looked_at_before_a_model_is_loaded(tmp_path, name):
    with pytest.raises(InputError, match=f"{name} holds no prompts"):
        PruneOPDTrainer("no/such-model", "no/such-model", settings(tmp_path), **{name: Dataset.from_list([])})


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_a_prompt_that_cannot_be_used_is_found_before_a_model_is_loaded(tmp_path, name, monkeypatch):
    monkeypatch.setattr("prune_opd_hf.training.trainer.load_pair", lambda *_: pytest.fail("a model was loaded"))
    datasets = {"train_dataset": TASK.dataset(4, seed=0), name: Dataset.from_list([{"prompt": "a"}, {"prompt": ""}])}
    with pytest.raises(InputError, match="the prompt in row 1 has no tokens"):
        PruneOPDTrainer(STUDENT, STUDENT, settings(tmp_path), **datasets)


def test_the_words_that_a_model_is_loaded_with_reach_its_tokenizer(tmp_path, monkeypatch):
    seen = {}

    def load(name, role, **words):
        seen[role] = name, words
        return load_tokenizer()

    monkeypatch.setattr("prune_opd_hf.training.pair.load_tokenizer", load)
    monkeypatch.setattr("prune_opd_hf.training.teachers.known_context", lambda *_, **__: None)
    monkeypatch.setattr("prune_opd_hf.training.trainer.load_pair", lambda *_: (_ for _ in ()).throw(InputError("seen")))
    own, theirs = {"revision": "v1", "trust_remote_code": True}, {"revision": "v2", "token": "t"}
    words = settings(tmp_path, model_init_kwargs=own, teacher_model_init_kwargs=theirs)
    with pytest.raises(InputError, match="seen"):
        PruneOPDTrainer("owner/a", "owner/b", words, TASK.dataset(4, seed=0))
    assert seen == {"student": ("owner/a", own), "teacher": ("owner/b", theirs)}


def test_evaluating_on_what_is_no_dataset_and_predicting_say_what_to_do(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(InputError, match="eval_dataset holds no prompts"):
        trainer.evaluate(Dataset.from_list([]))
    with pytest.raises(InputError, match="evaluate"):
        trainer.predict(TASK.dataset(2, seed=0))
    named = trainer.evaluate(DatasetDict(test=TASK.dataset(2, seed=1)))
    assert named["eval_test_mean_tokens"] > 0
    assert [entry["eval_test_kl"] for entry in trainer.summary().history] == [named["eval_test_kl"]]


def test_a_streamed_dataset_is_tokenized_and_filtered_as_it_comes():
    stream = ChainTask(operations=3).dataset(4, seed=0).to_iterable_dataset()
    kept = tokenize(stream, max_prompt_length=9)
    assert [len(row["input_ids"]) for row in kept] == [9] * 4  # 3 + 2 x 3
    with pytest.raises(InputError, match="all 4 have more than max_prompt_length=8"):
        tokenize(stream, max_prompt_length=8)


def test_a_stream_counts_what_it_drops(caplog):
    mixed = Dataset.from_list(
        [{"prompt": ChainTask(operations=n).problems(1, seed=0)[0].prompt} for n in (3, 9, 3, 9, 9)]
    )
    dropped = DroppedPrompts()
    stream = tokenize(mixed.to_iterable_dataset(), max_prompt_length=9, dropped=dropped)
    assert (len(list(stream)), dropped.count) == (2, 3)


@given(st.lists(st.integers(0, 99), max_size=8), st.integers(1, 4))
def test_each_index_is_repeated_in_place(indices, repeats):
    sampler = RepeatSampler(indices, repeats)
    assert list(sampler) == [index for index in indices for _ in range(repeats)]
    assert len(sampler) == len(indices) * repeats


@given(st.lists(st.integers(0, 99), min_size=3, max_size=9), st.integers(1, 3), st.integers(1, 3), st.integers(2, 3))
def test_a_step_of_prompts_is_repeated_whole_and_a_rest_left_out(indices, repeats, rows_of_step, steps):
    sampler = RepeatSampler(indices, repeats, rows_of_step=rows_of_step, steps=steps)
    expected = []
    for first in range(0, len(indices) - rows_of_step + 1, rows_of_step):
        step = [index for index in indices[first : first + rows_of_step] for _ in range(repeats)]
        expected += step * steps
    assert list(sampler) == expected
    assert len(sampler) == len(expected)
    stream = Dataset.from_dict({"x": indices}).to_iterable_dataset()
    rows = repeat_rows(stream, repeats, rows_of_step=rows_of_step, steps=steps).take(2 * len(expected))
    assert [row["x"] for row in rows] == expected * 2  # and from the beginning again


def test_too_few_prompts_for_one_reused_step_are_refused():
    with pytest.raises(InputError, match="has 2 prompts and one step takes 3"):
        RepeatSampler([1, 2], 1, rows_of_step=3, steps=2)


@pytest.mark.parametrize(
    ("stream", "changes"), [(True, {"num_iterations": 2}), (False, {"dataloader_drop_last": True})]
)
def test_prompts_that_never_fill_a_batch_are_no_run_of_no_steps(tmp_path, stream, changes):
    prompts = TASK.dataset(1, seed=0)  # a batch takes 2, a step 4
    trainer = PruneOPDTrainer(
        load_student(),
        load_teacher(),
        settings(tmp_path, **changes),
        prompts.to_iterable_dataset() if stream else prompts,
        processing_class=load_tokenizer(),
    )
    with pytest.raises(InputError, match="do not fill a batch"):
        trainer.train()


def test_several_updates_on_a_stream_of_several_workers_are_refused(tmp_path):
    stream = TASK.dataset(8, seed=0).to_iterable_dataset(num_shards=2)
    with pytest.raises(ConfigError, match="set dataloader_num_workers to 1 or 0"):
        PruneOPDTrainer(STUDENT, STUDENT, settings(tmp_path, num_iterations=2, dataloader_num_workers=2), stream)


def test_prompts_that_other_code_tokenized_are_not_taken_from_the_cache(tmp_path, monkeypatch):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "3 +1"}\n')
    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))

    def tokenized():
        return tokenize_prompts(dataset, PromptEncoder(load_tokenizer()), max_prompt_length=None)["input_ids"][:]

    first = tokenized()
    monkeypatch.setattr(PromptEncoder, "__call__", lambda *_: [9])
    assert tokenized() == first  # the same code, as far as is known
    monkeypatch.setattr(prompts_module, "_code", lambda _: "other code")
    assert tokenized() == [[9]]
