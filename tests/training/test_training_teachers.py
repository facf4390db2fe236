"""Teachers of a run: served, several by name, with a prompt of their own, the student itself. Each against slow full passes."""

import re
from contextlib import ExitStack
from types import MappingProxyType

import pytest
import torch
from datasets import Dataset
from fake_vllm import FakeVLLM
from oracle import full_log_probs
from tiny_tokenizers import byte_tokenizer
from trainer_helpers import TASK, make_trainer, settings

from prune_opd_hf.errors import ConfigError, InputError, VocabularyMismatchError
from prune_opd_hf.hub import build_card
from prune_opd_hf.records.student_records import StudentRecords
from prune_opd_hf.tasks import load_student, load_teacher, load_tokenizer
from prune_opd_hf.tasks.pair import WEIGHTS
from prune_opd_hf.teachers.adapter import AdapterBaseTeacher
from prune_opd_hf.teachers.served import ServedTeacher
from prune_opd_hf.training import PruneOPDTrainer
from prune_opd_hf.training.teachers import tokenizer_by_name

TOP_K_ONLY = {"loss_type": "topk_kl", "loss_support": "teacher", "loss_top_k": 2}
HINT = ", +1 = 2"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]


def rows(count=16, **columns):
    prompts = TASK.dataset(count, seed=0)["prompt"]
    made = {name: [of(number, prompt) for number, prompt in enumerate(prompts)] for name, of in columns.items()}
    return Dataset.from_dict({"prompt": prompts, **made})


def trainer_of(tmp_path, dataset=None, teacher_model=None, student=None, **changes):
    return PruneOPDTrainer(
        model=load_student() if student is None else student,
        teacher_model=teacher_model,
        args=settings(tmp_path, **changes),
        train_dataset=rows() if dataset is None else dataset,
        processing_class=load_tokenizer(),
    )


def first_rollouts(trainer, count=8):
    return trainer.generate_rollouts(trainer._collate([trainer.train_dataset[index] for index in range(count)]))


def log_q_of(model, rollouts, row, *, of_teacher=True):
    prompts, masks = rollouts.prompt_ids, rollouts.prompt_mask
    if of_teacher and rollouts.teacher_prompt_ids is not None:
        prompts, masks = rollouts.teacher_prompt_ids, rollouts.teacher_prompt_mask
    return full_log_probs(model, prompts[row][masks[row]], rollouts.response_ids[row][rollouts.response_mask[row]])


def assert_scored_by(models, rollouts, names=None):
    """Each row's tokens have the log-probabilities of its teacher, of the prompt that this read."""
    for row in range(len(rollouts)):
        model = models[rollouts.teachers[row]] if rollouts.teachers else models
        log_q = log_q_of(model, rollouts, row)
        tokens = rollouts.response_ids[row][rollouts.response_mask[row]]
        given = rollouts.teacher_token_log_probs[row][rollouts.response_mask[row]]
        torch.testing.assert_close(given, log_q.gather(1, tokens[:, None])[:, 0].float(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def slow_reverse_kl(student, models, rollouts):
    """The mean over response tokens of L_t KL(p, q), with a pass of each model over each row."""
    total = 0.0
    for row in range(len(rollouts)):
        model = models[rollouts.teachers[row]] if rollouts.teachers else models
        log_p, log_q = log_q_of(student, rollouts, row, of_teacher=False), log_q_of(model, rollouts, row)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        total += float((kl * rollouts.loss_weights[row, : len(kl)]).sum())
    return total / int(rollouts.response_mask.sum())


# ---------------------------------------------------------------------- served


def test_a_run_with_a_served_teacher_is_the_run_with_the_local_one(tmp_path):
    losses = []
    with FakeVLLM(load_teacher()) as server:
        for name, how in (("local", {}), ("served", {"teacher_model_server_url": server.url})):
            (tmp_path / name).mkdir()
            local = load_teacher() if name == "local" else None
            trainer = trainer_of(tmp_path / name, teacher_model=local, **TOP_K_ONLY, **how)
            trainer.train()
            losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert trainer.teacher_name == "student"  # what the stand-in calls its model
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_losses_and_metrics_that_need_more_are_refused_by_name(tmp_path):
    with FakeVLLM(load_teacher()) as server:
        for changes, message in (
            ({}, r"loss_support='student' needs a teacher that scores any.*set loss_support='teacher' or loss_type"),
            (
                {"loss_type": "reverse_kl"},
                r"needs a teacher that gives its whole distribution.*'topk_kl' with loss_support",
            ),
            ({**TOP_K_ONLY, "drift_metric": "mass"}, "choose metric='weighted_overlap'"),
        ):
            with pytest.raises(ConfigError, match=message):
                trainer_of(tmp_path, teacher_model_server_url=server.url, **changes)


def test_the_tokenizer_that_is_named_beside_a_url_is_compared(tmp_path):
    with FakeVLLM(load_teacher()) as server, pytest.raises(VocabularyMismatchError):
        PruneOPDTrainer(
            load_student(),
            args=settings(tmp_path, teacher_model_server_url=server.url, **TOP_K_ONLY),
            train_dataset=rows(),
            processing_class=load_tokenizer(),
            teacher_processing_class=byte_tokenizer(),
        )


def test_a_served_teachers_tokenizer_that_is_not_known_is_a_line_in_the_log(tmp_path, caplog):
    with FakeVLLM(load_teacher()) as server:
        trainer_of(tmp_path, teacher_model_server_url=server.url, **TOP_K_ONLY)
        teachers = {"careful": "embedded", "wild": server.url}
        trainer_of(tmp_path, routed_rows(), teacher_models=teachers, **TOP_K_ONLY)
    first, second = (line for line in caplog.messages if "was not compared with the student's" in line)
    assert first.startswith("the tokenizer of the teacher on vLLM")
    assert "the teacher 'wild'" in second


def test_each_key_reaches_its_own_servers_and_no_log_record_or_checkpoint(tmp_path, monkeypatch, caplog, capsys):
    names = ("VLLM_API_KEY", "TEACHER_VLLM_API_KEY_CAREFUL", "TEACHER_VLLM_API_KEY_WILD_1")
    keys = [f"planted-secret-{name.lower()}" for name in names]
    for name, key in zip(names, keys, strict=True):
        monkeypatch.setenv(name, key)
    models = load_student(), load_teacher(), load_student()
    with ExitStack() as opened:
        servers = [opened.enter_context(FakeVLLM(model, key=key)) for model, key in zip(models, keys, strict=True)]
        sampler, careful, wild = servers
        careful.faults["/inference/v1/generate"] = [None] * 4 + ["503"]
        dataset = rows(teacher=lambda number, _: ("careful", "wild-1")[number % 3 == 0])
        changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "rollout_engine": "vllm"}
        changes |= {"vllm_mode": "server", "vllm_server_base_url": sampler.url, **TOP_K_ONLY}
        teachers = {"careful": careful.url, "wild-1": wild.url}
        trainer = trainer_of(tmp_path, dataset, teacher_models=teachers, **changes)
        trainer.train()
        trainer.summary(dataset="prompts").save(tmp_path / "run")
        trainer.save_model()
        trainer.engine.close()
    assert [server.keys for server in servers] == [{f"Bearer {key}"} for key in keys]
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any("checkpoint-2" in str(path) for path in written)
    assert not [path for path in written if b"planted-secret" in path.read_bytes()]
    card = str(build_card(StudentRecords(trainer.summary(dataset="prompts")), name="taught"))
    assert "planted-secret" not in caplog.text + "".join(capsys.readouterr()) + card
    assert "127.0.0.1" not in trainer.summary(dataset="prompts").to_json()


def test_served_teachers_that_would_share_a_key_are_refused(tmp_path):
    teachers = {"wild-1": "http://first.example", "wild_1": "http://second.example"}
    with pytest.raises(ConfigError, match=r"'wild-1' and 'wild_1' would share the key in TEACHER_VLLM_API_KEY_WILD_1"):
        trainer_of(tmp_path, teacher_models=teachers)


@pytest.mark.parametrize("setting", ["teacher_quantization_config", "offload_teacher"])
def test_how_a_teacher_is_loaded_is_refused_beside_a_server(tmp_path, setting):
    value = {"quant_method": "bitsandbytes", "load_in_8bit": True} if setting.endswith("config") else True
    with pytest.raises(ConfigError, match=f"{setting} is for a teacher that is loaded here.*leave one of the two out"):
        settings(tmp_path, teacher_model_server_url="http://nobody.example", **{setting: value})


# ---------------------------------------------------------------------- a prompt of its own


@pytest.mark.parametrize("loss_type", ["topk_policy_gradient", "reverse_kl"])
@pytest.mark.parametrize("how", ["column", "template"])
def test_the_teacher_reads_its_own_prompt(tmp_path, how, loss_type):
    given = {"teacher_prompt": lambda _, prompt: f"{HINT} {prompt}"} if how == "column" else {}
    template = {} if how == "column" else {"teacher_prompt_template": HINT + " {prompt}"}
    student, teacher = load_student(), load_teacher()
    trainer = trainer_of(tmp_path, rows(**given), teacher, student, loss_type=loss_type, **template)
    rollouts = first_rollouts(trainer)
    tokenizer = load_tokenizer()
    read = tokenizer.decode(rollouts.teacher_prompt_ids[0][rollouts.teacher_prompt_mask[0]])
    assert read == f"<bos> {HINT} {rows()['prompt'][0]}"
    assert_scored_by(teacher, rollouts)
    if loss_type == "reverse_kl":
        value = trainer.objective(student, rollouts, rollouts.response_mask.sum().float())
        assert float(value.loss.detach()) == pytest.approx(slow_reverse_kl(student, teacher, rollouts), rel=1e-3)
    trainer.train()


def test_a_conversation_gets_the_template_in_its_last_users_message(tmp_path):
    tokenizer = load_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}="
    asked = [{"role": "system", "content": ","}, {"role": "user", "content": "+1"}]
    dataset = Dataset.from_list([{"prompt": asked, "answer": "3"}] * 8)
    changes = {"teacher_prompt_template": "{answer} {prompt}"}
    trainer = PruneOPDTrainer(
        load_student(), load_teacher(), settings(tmp_path, **changes), dataset, processing_class=tokenizer
    )
    row = trainer.train_dataset[0]
    assert tokenizer.decode(row["input_ids"]) == ", +1 ="
    assert tokenizer.decode(row["teacher_input_ids"]) == ", 3 +1 ="


def test_what_a_row_lacks_is_refused_with_its_number(tmp_path):
    with pytest.raises(InputError, match=r"filled from row 0 \(KeyError: 'answer'\); it has the columns prompt"):
        trainer_of(tmp_path, rows(), load_teacher(), teacher_prompt_template="{prompt} {answer}")
    dataset = rows(teacher_prompt=lambda number, prompt: None if number == 3 else prompt)
    with pytest.raises(InputError, match=r"row 3 has nothing in its column 'teacher_prompt'"):
        trainer_of(tmp_path, dataset, load_teacher())
    for template, message in (("{prompt", "is no template"), ("no columns", "names no column")):
        with pytest.raises(ConfigError, match=message):
            settings(tmp_path, teacher_prompt_template=template)


def long_rows(tokens, bad=(3,), column="teacher_prompt"):
    """Rows whose teachers read so many tokens, <bos> among them, and one more in some rows; with `prompt` both models do."""
    return rows(**{column: lambda number, _: "+1 " * (tokens - 1 + (number in bad))})


# A prompt too long for both was warned of, and the run ended when the teacher met it
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("column", "whose", "above", "remedy"),
    [
        ("teacher_prompt", "the teacher's prompt", "the teacher's context", "leave the row out"),
        ("prompt", "the prompt", "the student's context", r"leave the row out \(max_prompt_length 498 does\)"),
    ],
)
def test_a_prompt_that_leaves_no_room_is_refused_with_its_row_and_dropped_from_a_stream(
    tmp_path, monkeypatch, caplog, streamed, column, whose, above, remedy
):
    context, cap = load_teacher().config.max_position_embeddings, 14
    dataset = long_rows(context - cap, column=column)
    message = rf"{whose} in row 3 has {context - cap + 1} tokens.*max_completion_length {cap} that is above {above} of {context}"
    if streamed:
        trainer = trainer_of(tmp_path, dataset.to_iterable_dataset(), "embedded", max_steps=1)
        trainer.train()
        assert trainer.dropped_prompts.count == trainer.state.log_history[0]["data/dropped_prompts"] == 1
        (line,) = [record.getMessage() for record in caplog.records if "prompt in row" in record.getMessage()]
        assert re.search(message, line)
        too_long = long_rows(context - cap, bad=range(16), column=column).to_iterable_dataset()
        for limit, short in ((1024, "have more than max_prompt_length=1024 tokens or "), (None, "")):
            with pytest.raises(
                InputError, match=f"no prompt is left: all 16 {short}leave too little room for a response"
            ):
                trainer_of(tmp_path, too_long, "embedded", max_prompt_length=limit)
    else:
        monkeypatch.setattr("prune_opd_hf.training.trainer.load_pair", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(InputError, match=rf"{message}.* {remedy}, or lower max_completion_length to {cap - 1}"):
            trainer_of(tmp_path, dataset, "embedded")


def test_the_room_for_a_response_is_that_of_the_rows_own_teacher_and_of_rows_that_are_kept(tmp_path):
    with FakeVLLM(load_student(), max_model_len=40) as small:
        teachers, prompt = {"careful": load_teacher(), "wild": small.url}, long_rows(39 - 14, bad=())
        names = ["careful" if number == 3 else "wild" for number in range(16)]
        dataset = prompt.add_column("teacher", names)
        trainer_of(tmp_path, dataset, teacher_model=teachers, **TOP_K_ONLY)
        longer = long_rows(39 - 14).add_column("teacher", names)
        trainer_of(tmp_path, longer, teacher_model=teachers, **TOP_K_ONLY)  # row 3 is the careful one's
        longer = long_rows(39 - 14, bad=(4,)).add_column("teacher", names)
        with pytest.raises(InputError, match="the teacher's prompt in row 4 has 26 tokens"):
            trainer_of(tmp_path, longer, teacher_model=teachers, **TOP_K_ONLY)
        prompts = [one + " +1" * 30 * (number == 4) for number, one in enumerate(longer["prompt"])]
        dropped = longer.remove_columns("prompt").add_column("prompt", prompts)
        trainer = trainer_of(tmp_path, dropped, teacher_model=teachers, max_prompt_length=20, **TOP_K_ONLY)
        assert trainer.dropped_prompts.count == 1
        longer_answers = {"eval_max_completion_length": 15, **TOP_K_ONLY}
        trainer = trainer_of(tmp_path, dataset, teacher_model=teachers, **longer_answers)
        with pytest.raises(InputError, match="row 0 has 25 tokens, and with eval_max_completion_length 15"):
            trainer.evaluate(dataset)


def test_an_evaluation_reads_the_teachers_prompt_too(tmp_path):
    dataset = rows(teacher_prompt=lambda _, prompt: f"{HINT} {prompt}")
    trainer = trainer_of(tmp_path, dataset, load_teacher(), per_device_eval_batch_size=4)
    with_prompt = trainer.evaluate(dataset.select(range(4)))
    without = trainer.evaluate(rows(4))
    assert with_prompt["eval_mean_tokens"] == without["eval_mean_tokens"]
    assert with_prompt["eval_kl"] != without["eval_kl"]


# ---------------------------------------------------------------------- several


def several():
    return {"careful": load_teacher(), "wild": load_student()}


def routed_rows():
    return rows(teacher=lambda number, _: ("careful", "wild")[number % 3 == 0])


@pytest.mark.parametrize("loss_type", ["topk_policy_gradient", "reverse_kl"])
def test_rows_are_scored_by_their_own_teacher(tmp_path, loss_type):
    student, teachers = load_student(), several()
    trainer = trainer_of(tmp_path, routed_rows(), teachers, student, loss_type=loss_type)
    rollouts = first_rollouts(trainer)
    assert rollouts.teachers == tuple(("careful", "wild")[number % 3 == 0] for number in range(8))
    assert_scored_by(teachers, rollouts)
    if loss_type == "reverse_kl":
        value = trainer.objective(student, rollouts, rollouts.response_mask.sum().float())
        assert float(value.loss.detach()) == pytest.approx(slow_reverse_kl(student, teachers, rollouts), rel=1e-4)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert logged["teacher/careful/rollouts_share"] + logged["teacher/wild/rollouts_share"] == pytest.approx(1)
    assert logged["teacher/wild/kl"] < logged["teacher/careful/kl"]


def test_a_tokenizer_for_a_teacher_that_there_is_not_is_refused():
    given = MappingProxyType({"careful": "one", "wild": "other"})
    assert tokenizer_by_name(given, ["wild", "careful"]) == {"wild": "other", "careful": "one"}
    with pytest.raises(ConfigError, match="names the teacher 'wild'; there are careful, mild"):
        tokenizer_by_name(given, ["careful", "mild"])
    with pytest.raises(
        ConfigError, match="names the teacher 'careful'; there is one teacher: give its tokenizer alone"
    ):
        tokenizer_by_name(given, [""])


def test_a_name_without_a_teacher_is_refused_with_its_row_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("prune_opd_hf.training.trainer.load_pair", lambda *_: pytest.fail("a model was loaded"))
    dataset = rows(teacher=lambda number, _: "nobody" if number == 2 else "wild")
    with pytest.raises(InputError, match=r"row 2 has 'nobody' in column 'teacher'.*careful, wild"):
        trainer_of(tmp_path, dataset, several())
    with pytest.raises(InputError, match=r"row 0 has None in column 'teacher'; there are"):
        trainer_of(tmp_path, rows(), several())


def test_one_of_several_may_be_served(tmp_path):
    with FakeVLLM(load_student()) as server:
        teachers = {"careful": "embedded", "wild": server.url}
        trainer = trainer_of(tmp_path, routed_rows(), teacher_models=teachers, **TOP_K_ONLY)
        assert_scored_by(several(), first_rollouts(trainer))
        trainer.train()
    assert trainer.teacher_name == "careful: embedded; wild: student"


def test_one_of_several_may_be_the_base_below_the_students_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    base = load_student()
    student = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    trainer = trainer_of(tmp_path, routed_rows(), {"careful": load_teacher(), "wild": base}, student)
    assert_scored_by(several(), first_rollouts(trainer))
    trained = [name for name, weight in student.named_parameters() if weight.requires_grad]
    assert sum("lora_" in name for name in trained) == len(trained) > 0
    trainer.train()


# ---------------------------------------------------------------------- the student itself


def test_base_live_and_average_teachers_have_the_weights_that_they_should(tmp_path):
    for kind in ("base", "live", "ema"):
        student = load_student()
        before = {name: weight.detach().clone() for name, weight in student.named_parameters()}
        changes = {"teacher_update_rate": 0.25} if kind == "ema" else {}
        trainer = trainer_of(
            tmp_path,
            student=student,
            teacher_model_kind=kind,
            max_steps=1,
            teacher_prompt_template=HINT + " {prompt}",
            **changes,
        )
        trainer.train()
        after = dict(student.named_parameters())
        share = {"base": 0.0, "live": 1.0, "ema": 0.25}[kind]
        assert any(not torch.equal(after[name], before[name]) for name in before)
        for name, weight in trainer.teacher.model.named_parameters():
            torch.testing.assert_close(weight, before[name].lerp(after[name], share))


def test_an_average_teacher_is_resumed_bit_for_bit(tmp_path):
    changes = {"teacher_model_kind": "ema", "teacher_update_rate": 0.5, "save_strategy": "steps", "save_steps": 2}
    changes["teacher_prompt_template"] = HINT + " {prompt}"
    (tmp_path / "whole").mkdir()
    whole = trainer_of(tmp_path / "whole", max_steps=4, **changes)
    whole.train()
    resumed = trainer_of(tmp_path / "half", max_steps=4, **changes)
    resumed.train(str(tmp_path / "whole" / "run" / "checkpoint-2"))
    for ours, theirs in ((whole.model, resumed.model), (whole.teacher.model, resumed.teacher.model)):
        for first, second in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(first, second)
    logs = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (whole, resumed)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(("before", "after"), [("live", "ema"), ("ema", "live")])
def test_a_run_goes_on_with_the_kind_of_teacher_that_it_began_with(tmp_path, before, after):
    changes = {"teacher_prompt_template": HINT + " {prompt}", "save_strategy": "steps", "save_steps": 1}
    trainer_of(tmp_path, teacher_model_kind=before, max_steps=1, **changes).train()
    (tmp_path / "other").mkdir()
    other = trainer_of(tmp_path / "other", teacher_model_kind=after, max_steps=2, **changes)
    with pytest.raises(ConfigError, match=f"trained with teacher_model_kind='{before}', and this run has '{after}'"):
        other.train(str(tmp_path / "run" / "checkpoint-1"))


def test_the_model_below_an_adapter_that_trains_biases_is_no_teacher():
    """They stay when the adapter is switched off."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all")
    with pytest.raises(ConfigError, match=r"trains biases .* bias must be 'none'"):
        AdapterBaseTeacher(peft.get_peft_model(load_student(), adapter), top_k=2)


@pytest.mark.parametrize("kind", ["base", "live", "ema"])
def test_an_adapted_student_teaches_itself(tmp_path, kind):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    student = peft.get_peft_model(load_student(), adapter)
    trainer = trainer_of(
        tmp_path, student=student, teacher_model_kind=kind, max_steps=1, teacher_prompt_template=HINT + " {prompt}"
    )
    rollouts = first_rollouts(trainer)
    assert_scored_by(load_student() if kind == "base" else student, rollouts)
    trainer.train()
    if kind == "ema":  # the base is there once
        base = student.get_base_model().model.embed_tokens.weight
        assert trainer.teacher.model.get_input_embeddings().weight.data_ptr() == base.data_ptr()


# ---------------------------------------------------------------------- contradictions


def test_two_ways_to_name_a_teacher_are_refused(tmp_path):
    for given, changes, message in (
        (
            load_teacher(),
            {"teacher_model_server_url": "http://x"},
            "teacher_model and teacher_model_server_url contradict",
        ),
        (
            None,
            {"teacher_model_kind": "base", "teacher_model_name_or_path": "x"},
            "teacher_model_kind and teacher_model_name_or_path contradict",
        ),
        (
            None,
            {"teacher_models": {"a": "x"}, "teacher_model_name_or_path": "x"},
            "teacher_models and teacher_model_name_or_path contradict",
        ),
        (
            load_teacher(),
            {"teacher_models": {"a": "x"}},
            "teacher_model and teacher_models contradict",
        ),
        (None, {}, "teacher_model_server_url, teacher_models or teacher_model_kind"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer_of(tmp_path, teacher_model=given, **changes)
    with pytest.raises(ConfigError, match=r"teacher_update_rate=0\.5 has no effect with teacher_model_kind=None"):
        settings(tmp_path, teacher_update_rate=0.5)


def test_a_served_teacher_may_be_an_object(tmp_path):
    with FakeVLLM(load_teacher()) as server:
        trainer = make_trainer(tmp_path, teacher=ServedTeacher(server.url, top_k=2), **TOP_K_ONLY)
        assert_scored_by(load_teacher(), first_rollouts(trainer))


# ---------------------------------------------------------------------- small in memory


def test_an_offloaded_teacher_changes_nothing(tmp_path):
    losses = []
    for name in ("there", "offloaded"):
        (tmp_path / name).mkdir()
        trainer = trainer_of(tmp_path / name, teacher_model=load_teacher(), offload_teacher=name == "offloaded")
        trainer.train()
        losses.append([entry["kl/sampled"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["base", "live", "ema", None])
def test_a_teacher_that_shares_weights_with_the_student_is_not_offloaded(tmp_path, kind):
    peft = pytest.importorskip("peft")
    base = load_student()
    student = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    how = {"teacher_model_kind": kind, "teacher_prompt_template": HINT + " {prompt}"} if kind else {}
    with pytest.raises(
        ConfigError, match="offload_teacher would move weights that the teacher shares with the student"
    ):
        trainer_of(tmp_path, None, None if kind else base, student, offload_teacher=True, **how)


def test_a_quantized_teacher_is_loaded_quantized(tmp_path):
    pytest.importorskip("bitsandbytes")
    changes = {"teacher_quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    trainer = trainer_of(tmp_path, teacher_model=str(WEIGHTS / "teacher"), **changes)
    assert trainer.teacher.model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    trainer.train()


def test_a_quantization_without_its_package_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    for bits in ("4bit", "8bit"):
        monkeypatch.setattr(f"transformers.quantizers.quantizer_bnb_{bits}.is_bitsandbytes_available", lambda: False)
        how = {"quant_method": "bitsandbytes", f"load_in_{bits}": True}
        with pytest.raises(ConfigError, match=r"requires bitsandbytes.*pip install 'prune-opd-hf\[quantized\]'"):
            settings(tmp_path, teacher_quantization_config=how)


def test_a_quantization_that_cannot_be_is_one_line(tmp_path):
    changes = {"teacher_quantization_config": {"quant_method": "wishful", "bits": 0}}
    with pytest.raises(ConfigError, match=r"the quantization .*wishful.* cannot be used"):
        trainer_of(tmp_path, teacher_model=str(WEIGHTS / "teacher"), **changes)
    with pytest.raises(
        ConfigError, match="teacher_quantization_config has no effect on a model that is loaded already"
    ):
        trainer_of(tmp_path, teacher_model=load_teacher(), teacher_quantization_config={"quant_method": "fp8"})


# ---------------------------------------------------------------------- records


def test_the_record_and_the_card_say_where_each_teacher_ran_and_what_it_read(tmp_path):
    with FakeVLLM(load_student()) as server:
        teachers = {"careful": "embedded", "wild": server.url}
        dataset = routed_rows().add_column("teacher_prompt", [f"{HINT} {one}" for one in routed_rows()["prompt"]])
        kwargs = {"teacher_model_init_kwargs": {"revision": "main"}}  # of what is loaded here
        trainer = trainer_of(tmp_path, dataset, teacher_models=teachers, **TOP_K_ONLY, max_steps=1, **kwargs)
        trainer.train()
        summary = trainer.summary(dataset="prompts")
    read = "a prompt of its own (column teacher_prompt)"
    assert [dict(one) for one in summary.teachers] == [
        {"name": "careful", "model": "embedded", "revision": "main", "where": "in the trainer's process", "read": read},
        {"name": "wild", "model": "student", "revision": None, "where": "on vLLM servers", "read": read},
    ]
    text = str(build_card(StudentRecords(summary), name="taught"))
    assert f"| wild | student, on vLLM servers; read {read} |" in text.replace("\\", "")
    assert server.url not in text


def test_the_student_as_its_own_teacher_is_said(tmp_path):
    for kind, where in (
        ("base", "as it was"),
        ("live", "as it is"),
        ("ema", "a moving average of its weights (rate 0.05)"),
    ):
        trainer = trainer_of(tmp_path, teacher_model_kind=kind, teacher_prompt_template=HINT + " {prompt}")
        (described,) = trainer.summary(dataset="prompts").teachers
        assert described["where"] == f"the student itself, {where}"
        assert described["read"] == f"the template {HINT + ' {prompt}'!r}"
