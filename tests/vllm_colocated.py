"""vLLM in this process, over two sets of weights and three block lengths, against full passes; run by test_vllm_real.py.

python tests/vllm_colocated.py Llama|Qwen3
"""

import itertools
import sys

import torch
from oracle import assert_record_equals, oracle_row
from vllm_servers import servable_model

from prune_opd_hf import DriftConfig, Teacher
from prune_opd_hf.generation import DriftMonitor, Request, Sampling, VLLMSettings, make_engine

EOS, K, CAP = 1, 4, 40


def main(family: str) -> None:
    """Compare everything that is recorded."""
    torch.set_num_threads(1)
    student, teacher = servable_model(family, 1), servable_model("Llama", 7)
    watcher = Teacher(teacher, top_k=K)
    how = Sampling(CAP, (EOS,), 0, temperature=0.0)
    engine = make_engine("vllm", student, how, slots=4, teacher=watcher, vllm=VLLMSettings())
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 96, (n,), generator=generator) for n in (3, 9, 1, 12, 7, 5)]
    asked = [Request(tuple(prompt.tolist()), seed) for seed, prompt in enumerate(prompts)]
    compared = 0
    for step in range(2):
        with torch.no_grad():
            student.model.layers[0].mlp.up_proj.weight.mul_(1.2)
        engine.update_weights(student, step)
        for check_every, truncate in itertools.product((1, 8, 32), (True, False)):
            config = DriftConfig("overlap", K, 0.5, 0.25, min_length=6)
            monitor = DriftMonitor(watcher, config, check_every=check_every, truncate=truncate)
            watch = monitor.begin(eos_token_ids=(EOS,), pad_token_id=0, ragged=True)
            list(engine.generate(asked, watch))
            rows = []
            for prompt in prompts:
                ids = prompt.unsqueeze(0)
                arguments = {"do_sample": False, "max_new_tokens": CAP, "eos_token_id": EOS, "pad_token_id": 0}
                whole = student.generate(ids, attention_mask=torch.ones_like(ids), **arguments)[0, len(prompt) :]
                judged = {"k": K, "threshold": 0.5, "weight_drop": 0.25, "min_length": 6, "truncate": truncate}
                rows.append(oracle_row(student, teacher, prompt, whole, **judged))
            assert_record_equals(watch.rollouts(), rows, atol=1e-4)
            compared += 1
    engine.close()
    print(f"{compared} comparisons", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
