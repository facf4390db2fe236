"""Two processes on the CPU (gloo): DDP through `accelerate launch`, FSDP2 through `fully_shard` and as Accelerate prepares it."""

import copy
import json

import pytest
import torch
import torch.distributed as dist
from launching import accelerate_launch, launched, torchrun
from tiny_models import tiny_model
from torch.nn.parallel import DistributedDataParallel
from trainer_helpers import make_trainer

from prune_opd_hf.models.forward_pass import Layout, hidden_states
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.records.training_summary import TrainingSummary


def test_ddp_through_accelerate_launch_is_one_process_on_the_same_rollouts(tmp_path):
    output = tmp_path / "run"
    settings = "--max_steps 1 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --num_generations 2"
    settings += (
        " --optim sgd --learning_rate 0.1 --weight_decay 0 --save_rollouts_steps 1 --logging_steps 1 --save_strategy no"
    )
    script = f"examples/train_prune_opd.py --config examples/configs/embedded.yaml --output_dir {output} {settings}"
    with accelerate_launch() as launch:
        launched(*launch, *script.split())
    parts = [Rollouts.load(path) for path in sorted((output / "rollouts").glob("step-000001-process-*.safetensors"))]
    assert [len(part) for part in parts] == [8, 8]
    assert parts[0].response_ids.shape != parts[1].response_ids.shape or not torch.equal(
        parts[0].response_ids, parts[1].response_ids
    )
    everything = Rollouts.cat(parts)
    alone = make_trainer(
        tmp_path / "alone", optim="sgd", drift_weight_base=0.5, max_completion_length=112, drift_threshold=0.5
    )
    loss = alone.compute_loss(alone.model, {"rollouts": everything})
    loss.backward()
    torch.nn.utils.clip_grad_norm_(alone.model.parameters(), 1.0)
    logged = TrainingSummary.load(output).history[0]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-7)
    assert logged["prune/response_length_mean"] == pytest.approx(float(everything.lengths.float().mean()))
    assert logged["prune/overlap"] == pytest.approx(
        float(everything.overlap[everything.response_mask].mean()), rel=1e-5
    )
    assert logged["prune/effective_length_max"] == float(everything.effective_lengths.max())
    assert logged["prune/kept_tokens"] == float(everything.lengths.sum())
    trained = alone.model.__class__.from_pretrained(output)
    for (name, before), after in zip(alone.model.named_parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(
            after, before - 0.1 * before.grad, atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_fsdp2_rollouts_loss_and_step_are_those_of_one_process(tmp_path):
    torchrun("fsdp_worker.py", str(tmp_path))
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    # The two processes stepped unevenly: one had its last row 12 tokens after the other.
    assert [entry["longest"] for entry in found] == [3, 15]
    alone = make_trainer(tmp_path / "alone", max_completion_length=15, check_every=4)
    evaluated = alone.evaluate(alone.eval_dataset.select(range(3)))
    for entry in found:
        assert entry["sharded"]
        for name, value in entry["evaluation"].items():
            assert name == "eval_runtime" or value == pytest.approx(evaluated[name], rel=1e-4), name
        assert entry["rollouts_equal"]
        for kind, (loss, expected) in entry["losses"].items():
            assert loss == pytest.approx(expected, rel=1e-4, abs=1e-7), kind
        for kind, error in entry["gradient_errors"].items():
            assert error < 1e-4, kind
        assert entry["step_error"] < 1e-5


def found_by(folder, *parts):
    """What each of two processes found."""
    torchrun("distributed_worker.py", str(folder), *parts)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return found_by(tmp_path_factory.mktemp("two"), "stream", "vision", "packed", "taught")


def test_a_stream_of_prompts_of_any_length_is_shared_by_two_processes(found):
    """huggingface/accelerate#2023, huggingface/transformers#26548."""
    prompts = found[0]["stream"]["prompts"]
    shares = [entry["stream"]["answered"] for entry in found]
    assert len({len(prompt) for prompt in prompts}) > 2
    assert [len(share) for share in shares] == [4, 4]
    assert sorted(shares[0] + shares[1]) == sorted(prompts)  # each once


def test_a_student_with_a_vision_tower_is_trained_on_text_under_ddp_with_gradient_checkpointing(found):
    """huggingface/accelerate#2017."""
    for entry in (each["vision"] for each in found):
        assert entry["equal"]
        read = [name for name in entry["all"] if "vision_tower" not in name and "multi_modal_projector" not in name]
        assert len(read) < len(entry["all"])
        assert set(entry["moved"]) == set(read)


def test_processes_with_unequal_tokens_make_equally_many_passes_and_the_step_of_micro_batches_of_rows(found):
    few, many = (entry["packed"] for entry in found)
    assert many["tokens"] > 3 * few["tokens"]
    assert few["passes"] == many["passes"]
    assert len(few["passes"]) == 4
    assert len(set(few["passes"])) == 1
    assert few["passes"][0] > 2  # more than gradient_accumulation_steps
    assert max(few["distances"] + many["distances"]) < 1e-5
    assert few["resumed"] == many["resumed"] == 0


def test_a_teacher_whose_layers_are_shared_by_the_processes_teaches_as_a_whole_one_does(found):
    for entry in (each["taught"] for each in found):
        assert entry.pop("itself").startswith("the teacher is the student itself")
        assert len(entry) == 4
        for result in entry.values():
            assert result["share"] == pytest.approx(0.5, abs=0.05)
            assert result["kl"][0] == pytest.approx(result["kl"][1], rel=1e-4)
            assert result["distance"] < 1e-5


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("finds_unused", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_ddp_counts_the_head_whose_weight_the_loss_reads_outside_of_the_pass(process_group, finds_unused, tied):
    """Transformers lets DDP look for weights without a gradient; an untied head was taken for one, and then got one."""
    whole = tiny_model("qwen3", 1, pad=None, tie_word_embeddings=tied)
    student = copy.deepcopy(whole)
    wrapped = DistributedDataParallel(student, find_unused_parameters=finds_unused)
    layout = Layout(torch.tensor([[5, 6, 7, 8]]), torch.tensor([1, 2]))
    for _ in range(2):  # what a pass has missed is found in the next
        for model, outer in ((student, wrapped), (whole, whole)):
            states = hidden_states(outer, model.lm_head, layout)
            (states @ model.lm_head.weight.T).logsumexp(dim=-1).sum().backward()
    for ours, theirs in zip(student.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.slow
def test_fsdp2_as_accelerate_prepares_it_trains_resumes_and_saves_as_ddp_does(tmp_path):
    """With tied embeddings and without: huggingface/accelerate#3870, verl-project/verl#7834."""
    for entry in found_by(tmp_path, "sharded"):
        for tied, result in entry["sharded"].items():
            assert result["sharded"]
            assert result["moved"] > 1e-3
            assert result["from_ddp"] < 1e-5
            assert result["resumed"] == 0
            assert result["loaded"] == 0
            assert result["loaded_tied"] == (tied == "True")
            assert result["bytes"] < result["needed"] * 1.01  # nothing is saved twice
