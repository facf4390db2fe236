"""Two processes on the CPU (gloo): DDP through `accelerate launch`, FSDP2 through `fully_shard`."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_helpers import make_trainer

from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.records.training_summary import TrainingSummary

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
}


def launched(*command):
    result = subprocess.run(
        [sys.executable, "-m", *command], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_ddp_through_accelerate_launch_is_one_process_on_the_same_rollouts(tmp_path):
    output = tmp_path / "run"
    settings = "--max_steps 1 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --num_generations 2"
    settings += (
        " --optim sgd --learning_rate 0.1 --weight_decay 0 --save_rollouts_steps 1 --logging_steps 1 --save_strategy no"
    )
    launched(
        *"accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no".split(),
        *f"--dynamo_backend no --main_process_port {free_port()} examples/train_prune_opd.py".split(),
        *f"--config examples/configs/embedded.yaml --output_dir {output} {settings}".split(),
    )
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
    launched(
        "torch.distributed.run",
        *f"--nproc_per_node 2 --master_port {free_port()}".split(),
        str(ROOT / "tests" / "fsdp_worker.py"),
        str(tmp_path),
    )
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
