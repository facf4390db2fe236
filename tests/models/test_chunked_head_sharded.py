"""The chunked head under FSDP2 on two processes of the CPU: sharded gradients equal those of one process on all rows."""

import torch
import torch.multiprocessing as mp
import transformers
from tiny_models import COMMON

from prune_opd_hf.models.chunked_head import candidate_log_probs, divergence_from_hidden
from prune_opd_hf.models.lm_head import HeadParameters

PROCESSES = 2
IDS = torch.tensor([[5, 11, 3, 40, 22], [7, 7, 2, 30, 9]])  # one row for each process
MASK = torch.tensor([[True, True, True, True, True], [False, False, True, True, False]])
NOTHING = torch.zeros_like(MASK)


def student(tied):
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**COMMON, vocab_size=47, tie_word_embeddings=tied, pad_token_id=0)
    )


def loss_of(model, ids, mask, token_count):
    hidden = model(input_ids=ids, logits_to_keep=1, output_hidden_states=True).hidden_states[-1]
    head = HeadParameters(model.lm_head.weight)
    candidates = torch.arange(3).expand(*ids.shape, 3)
    log_probs, _ = candidate_log_probs(hidden, head, candidates, mask)
    teacher = torch.randn(47, 8, generator=torch.Generator().manual_seed(3))
    teacher_hidden = ids.unsqueeze(-1) / torch.arange(20.0, 28.0)
    divergence = divergence_from_hidden(
        hidden, head, teacher_hidden, HeadParameters(teacher), mask.float(), mask, beta=0.5, token_count=token_count
    )
    return log_probs.square().sum() / token_count + divergence.loss


def compare(rank, tied, reshard):
    from torch.distributed.fsdp import fully_shard

    model, whole = student(tied), student(tied)
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=reshard)
    rows = slice(rank, rank + 1)
    # twice: gradients add up over micro-batches; in the second, process 1 has no token to learn from
    for mask in (MASK, torch.stack([MASK[0], NOTHING[1]])):
        count = int(mask.sum())
        # processes' gradients are averaged, so each gives its share of the mean times their number
        (PROCESSES * loss_of(model, IDS[rows], mask[rows], count)).backward()
        loss_of(whole, IDS, mask, count).backward()
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad.full_tensor(),
            theirs.grad,
            rtol=1e-4,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}, tied {tied}, sharded again {reshard}: {text}",
        )


def compare_all_on(rank, meeting):
    """One process; every case in it, since starting processes is what takes the time."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=PROCESSES)
    try:
        for tied in (True, False):
            for reshard in (True, False):
                compare(rank, tied, reshard)
    finally:
        dist.destroy_process_group()


def test_gradients_of_a_sharded_model_are_those_of_one_process(tmp_path):
    mp.spawn(compare_all_on, (tmp_path / "meeting",), nprocs=PROCESSES)  # raises what a process raised
