"""What the generation tests share: padded prompts, one way to call `generate`, and the oracle over a batch."""

import torch
from oracle import oracle_row

from prune_opd_hf import DriftConfig
from prune_opd_hf.generation import pruned_generate

SETTINGS = {"k": 4, "threshold": 0.5, "weight_drop": 0.25}
CONFIG = DriftConfig("overlap", top_k=4, threshold=0.5, weight_drop=0.25)


def padded_prompts(lengths, vocab=48, seed=3, pad=0):
    """Left-padded prompts of these lengths, without special tokens inside, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), pad), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(3, vocab, (length,), generator=generator)
        mask[row, width - length :] = 1
    return ids, mask


def generate(student, ids, mask, monitor=None, *, loop=False, **arguments):
    """`student.generate`, greedy unless told otherwise: plain, with the pair, or with the loop that drops rows."""
    if loop:
        arguments |= {"custom_generate": pruned_generate}
        if monitor is not None:
            arguments["drift_monitor"] = monitor
    elif monitor is not None:
        arguments["logits_processor"] = [monitor.logits_processor]
        arguments["stopping_criteria"] = [monitor.stopping_criterion]
    arguments.setdefault("do_sample", False)
    return student.generate(ids, attention_mask=mask, **arguments)


def oracle(student, teacher, ids, mask, sequences, **settings):
    """The oracle's rows for sequences that ran to their natural end or the cap."""
    rows = []
    for index in range(len(ids)):
        prompt = ids[index][mask[index].bool()]
        rows.append(oracle_row(student, teacher, prompt, sequences[index, ids.shape[1] :], **{**SETTINGS, **settings}))
    return rows


def oracle_of_requests(student, teacher, requests, responses, **settings):
    """The same for requests and the tokens that answer them."""
    return [
        oracle_row(student, teacher, torch.tensor(request.prompt_ids), torch.tensor(tokens), **{**SETTINGS, **settings})
        for request, tokens in zip(requests, responses, strict=True)
    ]
