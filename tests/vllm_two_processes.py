"""One of two training processes over one vLLM server; run by test_vllm_real.py through torch.distributed.run.

python -m torch.distributed.run --nproc-per-node 2 tests/vllm_two_processes.py ddp|fsdp2 URL FOLDER
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from oracle import full_log_probs
from servable import with_heads_of_32
from torch.distributed.fsdp import fully_shard
from trainer_helpers import make_trainer

from prune_opd_hf.tasks import load_student

STEPS = 5


def whole_copy(model):
    """The student with all of its weights, as they are now."""
    copied = with_heads_of_32(load_student())
    state = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }
    copied.load_state_dict(state)
    return copied


def main(kind: str, url: str, folder: Path) -> None:
    """Five steps; every rollout is compared with the weights of its moment."""
    torch.set_num_threads(1)
    student = with_heads_of_32(load_student())
    changes = {"rollout_engine": "vllm", "vllm_mode": "server", "vllm_server_base_url": url, "learning_rate": 5e-3}
    trainer = make_trainer(folder / "run", student=student, max_steps=STEPS, **changes)
    differences, rollouts_seen = [], 0
    before = whole_copy(trainer.model)

    def compare():
        nonlocal rollouts_seen
        whole = whole_copy(trainer.accelerator.unwrap_model(trainer.model))
        rollouts = real(*batches)
        for row in range(len(rollouts)):
            prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
            response = rollouts.response_ids[row][rollouts.response_mask[row]]
            own = full_log_probs(whole, prompt, response).float().gather(-1, response[:, None])[:, 0]
            served = rollouts.token_log_probs[row][rollouts.response_mask[row]]
            differences.append(float((own - served).abs().max()))
        rollouts_seen += len(rollouts)
        return rollouts

    real = trainer.generate_rollouts
    if kind == "ddp":

        def compared(*given):
            nonlocal batches
            batches = given
            return compare()

        batches = ()
        trainer.generate_rollouts = compared
        trainer.train()
    else:
        for layer in trainer.model.model.layers:
            fully_shard(layer)
        fully_shard(trainer.model, reshard_after_forward=True)
        optimizer = torch.optim.SGD(trainer.model.parameters(), lr=5.0)
        for step in range(STEPS):
            first = 8 * (2 * step + dist.get_rank())
            rows = [trainer.train_dataset[index % len(trainer.train_dataset)] for index in range(first, first + 8)]
            batches = (trainer._collate(rows),)
            rollouts = compare()
            loss = trainer.compute_loss(trainer.model, {"rollouts": rollouts})
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            trainer.state.global_step += 1
    after = whole_copy(trainer.accelerator.unwrap_model(trainer.model))
    moved = max(
        float((new - old).abs().max()) for new, old in zip(after.parameters(), before.parameters(), strict=True)
    )
    found = {"rollouts": rollouts_seen, "difference": max(differences), "moved": moved}
    (folder / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
