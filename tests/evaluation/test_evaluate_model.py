"""`evaluate_model` from end to end on the embedded task: numbers, logs, restarts, processes, and what is refused."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from evaluation_helpers import comparable, logged
from tiny_models import tiny_model
from tiny_tokenizers import byte_tokenizer

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.evaluation import EvaluationReport, Verdict, evaluate_model, load_benchmark
from prune_opd_hf.evaluation.benchmarks import BOXED_SUFFIX, Benchmark
from prune_opd_hf.evaluation.evaluated_model import EvaluatedModel, encode_prompts, load_evaluated_model
from prune_opd_hf.evaluation.sample_log import SampleLog
from prune_opd_hf.models.prompts import PromptEncoder
from prune_opd_hf.tasks import is_correct, load_student, load_tokenizer
from prune_opd_hf.tasks.pair import WEIGHTS

STUDENT = WEIGHTS / "student"
QUICK = {"num_generations": 3, "limit": 6, "max_completion_length": 40, "slots": 4, "progress": False}


def evaluate(model=STUDENT, benchmarks=("chain",), **changes) -> EvaluationReport:
    return evaluate_model(model, list(benchmarks), **{**QUICK, **changes})


def test_the_report_says_what_the_samples_say(tmp_path):
    report = evaluate(output_dir=tmp_path)
    result, samples, chain = report["chain"], logged(tmp_path), load_benchmark("chain")
    rights = {
        problem: [is_correct(s["response"], chain.answers[problem]) for s in samples if s["problem"] == problem]
        for problem in range(6)
    }
    assert [len(row) for row in rights.values()] == [3] * 6
    assert result.problem_scores["avg@3"] == tuple(sum(row) / 3 for row in rights.values())
    assert result.problem_scores["pass@3"] == tuple(float(any(row)) for row in rights.values())
    assert result.metrics["avg@3"].value == pytest.approx(sum(map(sum, rights.values())) / 18)
    assert result.truncated_share == sum(not s["ended"] for s in samples) / 18 > 0
    assert result.response_tokens == sum(s["response_tokens"] for s in samples)
    assert result.prompt_tokens == 18 * 27
    assert all(s["ended"] == s["response"].endswith("<eos>") for s in samples)
    assert (result.problems, result.num_generations, result.source) == (6, 3, "prune_opd_hf.tasks.chain")
    assert report.model_name == "student"
    assert (
        report.sampling.describe()
        == "3 samples a problem, temperature 1.0, top_p 0.95, top_k off, at most 40 new tokens, seed 0"
    )
    assert EvaluationReport.load(tmp_path / "report.json") == report
    assert (tmp_path / "report.md").read_text() == report.to_markdown()
    assert str(tmp_path) not in report.to_json()
    assert report.versions["math-verify"]


def test_the_same_seed_gives_the_same_report_for_any_slots_and_another_seed_another(tmp_path):
    first = evaluate(output_dir=tmp_path)
    assert comparable(evaluate(slots=1)) == comparable(evaluate(slots=32)) == comparable(first)
    other = evaluate(seed=1, output_dir=tmp_path / "other")
    assert [s["response"] for s in logged(tmp_path / "other")] != [s["response"] for s in logged(tmp_path)]
    assert other["chain"].content_hash == first["chain"].content_hash


class Killed(BaseException):
    pass


def test_a_run_that_was_cut_off_continues_to_the_same_report(tmp_path, monkeypatch):
    uninterrupted = evaluate()
    append, calls = SampleLog.append, []

    def die_at_seventh(self, sample):
        calls.append(sample.key)
        if len(calls) == 7:
            raise Killed
        append(self, sample)

    monkeypatch.setattr(SampleLog, "append", die_at_seventh)
    with pytest.raises(Killed):
        evaluate(output_dir=tmp_path)
    monkeypatch.setattr(SampleLog, "append", append)
    with (tmp_path / "samples-00000.jsonl").open("a") as stream:
        stream.write('{"benchmark": "chain", "prompt_ha')  # the line that was being written
    kept = (tmp_path / "samples-00000.jsonl").read_text().splitlines()[1:7]
    continued = evaluate(output_dir=tmp_path)
    assert comparable(continued) == comparable(uninterrupted)
    assert (tmp_path / "samples-00000.jsonl").read_text().splitlines()[1:7] == kept
    assert len(logged(tmp_path)) == 18


def test_a_finished_run_generates_nothing_more(tmp_path, monkeypatch):
    first = evaluate(output_dir=tmp_path)
    monkeypatch.setattr(SampleLog, "append", lambda self, sample: pytest.fail("generated again"))
    assert comparable(evaluate(output_dir=tmp_path)) == comparable(first)


def test_samples_and_problems_can_be_added_to_a_finished_run(tmp_path):
    evaluate(num_generations=2, limit=3, output_dir=tmp_path)
    before = logged(tmp_path)
    more = evaluate(num_generations=4, limit=5, output_dir=tmp_path)
    assert logged(tmp_path)[:6] == before
    assert len(logged(tmp_path)) == 20
    assert comparable(more) == comparable(evaluate(num_generations=4, limit=5))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"temperature": 0.5}, "temperature"),
        ({"max_completion_length": 41}, "max_completion_length"),
    ],
)
def test_samples_that_were_drawn_otherwise_are_not_mixed_in(tmp_path, changes, named):
    evaluate(num_generations=1, limit=2, output_dir=tmp_path)
    with pytest.raises(ConfigError, match=rf"drawn otherwise \({named} differ\)"):
        evaluate(num_generations=1, limit=2, output_dir=tmp_path, **changes)


def test_other_weights_are_other_samples(tmp_path):
    evaluate(num_generations=1, limit=2, output_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"drawn otherwise \(config, weights differ\)"):
        evaluate(model=WEIGHTS / "teacher", num_generations=1, limit=2, output_dir=tmp_path)


def test_other_ends_and_another_scaling_of_positions_are_other_samples(tmp_path):
    model, tokenizer = load_student(), load_tokenizer()
    evaluate(model, processing_class=tokenizer, output_dir=tmp_path, limit=1)
    model.generation_config.eos_token_id = [model.generation_config.eos_token_id, 5]
    with pytest.raises(ConfigError, match=r"\(end_tokens differ\)"):
        evaluate(model, processing_class=tokenizer, output_dir=tmp_path, limit=1)
    model = load_student()
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 20000.0}
    with pytest.raises(ConfigError, match=r"\(config differ\)"):
        evaluate(model, processing_class=tokenizer, output_dir=tmp_path, limit=1)


def test_an_empty_list_of_ends_means_the_tokenizers():
    model = load_student()
    model.generation_config.eos_token_id = []
    evaluated = evaluate(model, processing_class=load_tokenizer(), limit=1)
    assert comparable(evaluated) == comparable(evaluate(load_student(), processing_class=load_tokenizer(), limit=1))


# QwenLM/Qwen3#927: the tokenizer of a model ends turns where its generation config does not
def test_an_evaluated_model_ends_where_its_generation_config_or_its_tokenizer_does():
    model, tokenizer = load_student(), load_tokenizer()
    first = model.generation_config.eos_token_id
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(9)
    evaluated = load_evaluated_model(model, tokenizer, device=torch.device("cpu"))
    assert evaluated.eos_token_ids == (first, 9)


def test_a_report_without_its_samples_is_not_overwritten(tmp_path):
    evaluate(num_generations=1, limit=1, output_dir=tmp_path)
    (tmp_path / "samples-00000.jsonl").unlink()
    before = (tmp_path / "report.json").read_bytes()
    with pytest.raises(ConfigError, match="holds a report without its samples"):
        evaluate(num_generations=1, limit=1, output_dir=tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before


def test_settings_of_a_chat_template_that_there_is_not_are_refused():
    for benchmarks in (["chain"], [SUMS]):
        with pytest.raises(ConfigError, match="chat_template_kwargs has no effect"):
            evaluate(benchmarks=benchmarks, grader=CountingGrader(), chat_template_kwargs={"think": True})


def test_the_logged_prompt_counts_not_the_benchmarks_name(tmp_path):
    chain = load_benchmark("chain")
    evaluate(num_generations=1, limit=3, output_dir=tmp_path)
    renamed = replace(chain, name="other")
    evaluate(benchmarks=[renamed], num_generations=1, limit=3, output_dir=tmp_path)
    assert len(logged(tmp_path)) == 3
    reworded = replace(
        chain, name="reworded", questions=tuple(question.replace("+1", "+2") for question in chain.questions)
    )
    evaluate(benchmarks=[reworded], num_generations=1, limit=3, output_dir=tmp_path)
    assert len(logged(tmp_path)) > 3


def test_a_model_in_memory_is_the_model_on_disk():
    loaded = evaluate()
    in_memory = evaluate(model=load_student(), processing_class=load_tokenizer(), model_name="student")
    assert comparable(in_memory) == comparable(loaded)


def test_the_model_is_left_in_the_mode_it_was_in():
    model = load_student().train()
    evaluate(model=model, processing_class=load_tokenizer(), num_generations=1, limit=1)
    assert model.training


class CountingGrader:
    name = "counts words"

    def grade(self, responses, golds):
        return [Verdict(len(r.split()) > 20, str(len(r.split())), "graded") for r in responses]


def test_mathematical_benchmarks_get_the_suffix_the_template_and_the_grader(tmp_path):
    tokenizer = load_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}x7 {{ m.content }} x9 {% if fast %}x3{% endif %}{% endfor %}"
    sums = replace(SUMS, prompt_suffix="= 3")
    common = {"model": load_student(), "processing_class": tokenizer, "benchmarks": [sums], "grader": CountingGrader()}
    report = evaluate(**common, output_dir=tmp_path, chat_template_kwargs={"fast": True})
    result = report["sums"]
    words = len("x7 , +1 = 1 = 3 x9 x3".split())  # no token that begins the sequence: the template is everything
    assert result.prompt_tokens == 6 * words
    assert (result.grader, result.prompt_suffix) == ("counts words", "= 3")
    assert result.prompt_form.endswith(' with {"fast": true}')
    assert not any("<eos>" in sample["response"] for sample in logged(tmp_path))
    rights = [len(sample["response"].split()) > 20 for sample in logged(tmp_path)]
    assert result.metrics["avg@3"].value == pytest.approx(sum(rights) / 6)
    assert evaluate(**common)["sums"].prompt_tokens == 6 * (words - 1)


SUMS = Benchmark("sums", (", +1 = 1", ", +2 = 2"), ("2", "4"), "sums.json")


def graded(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "graded.jsonl").read_text().splitlines()]


def test_each_sample_is_left_with_its_gold_the_answer_found_and_the_verdict(tmp_path):
    report = evaluate(output_dir=tmp_path, num_generations=2)
    lines, samples, chain = graded(tmp_path), logged(tmp_path), load_benchmark("chain")
    assert sorted(line["response"] for line in lines) == sorted(sample["response"] for sample in samples)
    for line in lines:
        right = is_correct(line["response"], chain.answers[line["problem"]])
        assert (line["gold"], line["correct"]) == (chain.answers[line["problem"]], right)
        assert line["prompt"] == chain.questions[line["problem"]]
        assert line["status"] == ("graded" if line["answer"] else "no_answer")
        assert line["answer"] == (line["response"].split()[-2] if line["ended"] else None)
    assert report["chain"].metrics["avg@2"].value == pytest.approx(sum(line["correct"] for line in lines) / 12)


@pytest.mark.parametrize(
    ("given", "appended"), [(None, ""), ("", ""), ("Think.", "\n\nThink."), ("boxed", f"\n\n{BOXED_SUFFIX}")]
)
def test_nothing_is_appended_to_a_file_unless_asked_for(tmp_path, caplog, given, appended):
    path = tmp_path / "sums.json"
    path.write_text(json.dumps([{"prompt": ", +1 = 1", "answer": "2"}]))
    with caplog.at_level(logging.WARNING):
        report = evaluate(benchmarks=[path], prompt_suffix=given, num_generations=1, output_dir=tmp_path / "run")
    assert [line["prompt"] for line in graded(tmp_path / "run")] == [f", +1 = 1{appended}"]
    assert report["sums"].prompt_suffix == appended.strip()
    assert ("sums is asked as it stands" in caplog.text) is (given is None)


class ThinksAloud:
    """A grader that shows what it was given."""

    name = "shows"

    def grade(self, responses, golds):
        self.seen = list(responses)
        return [Verdict(False, None, "no_answer") for _ in responses]


def test_a_response_to_a_prompt_that_opens_a_thought_begins_inside_of_it():
    tokenizer, grader = load_tokenizer(), ThinksAloud()
    tokenizer.add_tokens(["<think>"], special_tokens=True)
    tokenizer.chat_template = "{{ messages[0].content }}{% if thinks %} x3 <think>{% endif %}"
    model = load_student()
    model.resize_token_embeddings(len(tokenizer))
    settings = {"model": model, "processing_class": tokenizer, "benchmarks": [SUMS], "grader": grader}
    settings |= {"num_generations": 1, "max_completion_length": 4, "prompt_suffix": ""}
    evaluate(**settings, chat_template_kwargs={"thinks": True})
    assert all(response.startswith("<think>") for response in grader.seen)
    evaluate(**settings)
    assert not any("<think>" in response for response in grader.seen)


def test_tags_of_a_thought_are_kept_where_they_are_special_tokens():
    tokenizer = load_tokenizer()
    tokenizer.add_tokens(["[THINK]", "[/THINK]"], special_tokens=True)
    subject = EvaluatedModel(load_student(), tokenizer, "student", "sha256:0", (tokenizer.eos_token_id,))
    first, last = tokenizer.convert_tokens_to_ids(["[THINK]", "[/THINK]"])
    words = tokenizer("x7 x9").input_ids
    ids = [first, *words, last, *words, tokenizer.eos_token_id]
    assert "".join(subject.decode(ids, skip_special_tokens=True).split()) == "[THINK]x7x9[/THINK]x7x9"
    assert subject.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)


def test_a_question_is_read_as_training_reads_it_with_one_beginning():
    tokenizer = byte_tokenizer()
    sums = Benchmark("sums", ("1+1?",), ("2",), "sums.json", prompt_suffix="")
    subject = EvaluatedModel(tiny_model("qwen3", 1, vocab_size=262), tokenizer, "tiny", "sha256:0", (1,))
    (chat,), _ = encode_prompts(sums, subject, 8)
    assert list(chat) == PromptEncoder(tokenizer)([{"role": "user", "content": "1+1?"}])
    assert chat.count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = None
    (text,), form = encode_prompts(sums, subject, 8)
    assert (list(text), form) == (tokenizer("1+1?")["input_ids"], "no template")


def test_a_question_that_the_template_does_not_take_is_named():
    tokenizer = byte_tokenizer(template="{{ raise_exception('no') }}")
    sums = Benchmark("sums", ("1+1?",), ("2",), "sums.json")
    with pytest.raises(InputError, match=r"problem 0 of sums: the chat template does not take .*: no\. Change"):
        evaluate(tiny_model("qwen3", 1, vocab_size=262), [sums], processing_class=tokenizer)


def test_greedy_decoding_is_the_same_for_every_sample():
    result = evaluate(temperature=0.0)["chain"]
    assert set(result.problem_scores["avg@3"]) <= {0.0, 1.0}
    assert result.problem_scores["avg@3"] == result.problem_scores["pass@3"] == result.problem_scores["maj@3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "other"}, "auto, loop, continuous_batching, vllm"),
        ({"num_generations": 0}, "num_generations must be"),
        ({"limit": 0}, "limit"),
        ({"benchmarks": []}, "at least one benchmark"),
        ({"benchmarks": ["chain", "chain"]}, "each once"),
        ({"benchmarks": ["gsm8k"]}, "unknown benchmark 'gsm8k'"),
        ({"max_completion_length": 600}, "lower max_completion_length to 485"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"output_dir": ""}, "output_dir is empty"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_remedy(changes, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(**changes)


def test_a_model_in_memory_needs_its_tokenizer_and_an_end():
    model = tiny_model("llama", seed=0, vocab_size=64, eos=None)
    with pytest.raises(ConfigError, match="pass processing_class"):
        evaluate(model=model)
    tokenizer = load_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="names a token that ends a response"):
        evaluate(model=model, processing_class=tokenizer)
