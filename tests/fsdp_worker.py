"""One of two processes under FSDP2; run by test_training_distributed.py through torch.distributed.run.

Everything it finds is compared with a copy of the student that is whole: its own rollouts, and the loss and gradient over the
rollouts of both processes.
"""

import copy
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from trainer_helpers import make_trainer, prompts_of

from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.training.rollout_generation import passes_are_collective

KINDS = ("topk_policy_gradient", "generalized_jsd")
LEARNING_RATE = 0.1


def flat(parameters):
    """All values as one vector, sharded ones brought together."""
    return torch.cat([p.full_tensor().flatten() if hasattr(p, "full_tensor") else p.flatten() for p in parameters])


def main(folder: Path) -> None:
    """Generate, lose, step; compare; write down."""
    torch.set_num_threads(1)
    # Cuts so far apart that one process is done long before the other.
    rank_length = (3, 15)[int(os.environ["RANK"])]
    changes = {"pruning": "fixed", "pruning_length": rank_length, "max_completion_length": 15, "check_every": 4}
    trainer = make_trainer(folder / "out", **changes, save_strategy="no")
    rank = dist.get_rank()
    whole = copy.deepcopy(trainer.model)
    twin = make_trainer(folder / "twin", student=whole, **changes, save_strategy="no")
    prompts = trainer._collate([trainer.train_dataset[index] for index in range(rank * 4, rank * 4 + 4)])
    expected = twin.generate_rollouts(prompts)

    for layer in trainer.model.model.layers:
        fully_shard(layer)
    fully_shard(trainer.model, reshard_after_forward=True)
    found = {"sharded": passes_are_collective(trainer.model)}
    found["evaluation"] = trainer.evaluate(trainer.eval_dataset.select(range(3)))  # 3 rows for 2 processes
    rollouts = trainer.generate_rollouts(prompts)
    found["longest"] = int(rollouts.lengths.max())
    found["rollouts_equal"] = bool(torch.equal(rollouts.response_ids, expected.response_ids))

    rollouts.save(folder / f"rollouts-{rank}.safetensors")
    dist.barrier()
    everything = Rollouts.cat([Rollouts.load(folder / f"rollouts-{other}.safetensors") for other in (0, 1)])
    count = everything.response_mask.sum().float()
    found["losses"], found["gradient_errors"] = {}, {}
    for kind in KINDS:
        for each in (trainer, twin):
            each.args.loss_type = kind
            each.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, {"rollouts": rollouts}, num_items_in_batch=count)
        loss.backward()
        shared = loss.detach().clone()
        dist.all_reduce(shared, op=dist.ReduceOp.SUM)
        alone = twin.objective(twin.model, everything, count).loss
        alone.backward()
        found["losses"][kind] = (shared.item() / dist.get_world_size(), alone.item())
        mine, theirs = (flat([p.grad for p in each.model.parameters()]) for each in (trainer, twin))
        found["gradient_errors"][kind] = float((mine - theirs).abs().max())
    for each in (trainer, twin):
        optimizer = torch.optim.SGD(each.model.parameters(), lr=LEARNING_RATE)
        torch.nn.utils.clip_grad_norm_(each.model.parameters(), 1.0)
        optimizer.step()
    found["step_error"] = float((flat(trainer.model.parameters()) - flat(twin.model.parameters())).detach().abs().max())
    # Sharded again, both generate and evaluate once more: nothing hangs, whatever ends when.
    trainer.generate_rollouts(prompts_of(trainer, 4))
    trainer.evaluate(trainer.eval_dataset.select(range(1)))  # a process without a row of its own
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # what is found is written; threads of collectives now and then abort a process that ends in order


if __name__ == "__main__":
    main(Path(sys.argv[1]))
