"""Watch a generation drift: a progress bar with kept, drifted and finished rows, and what stopping saved.

python examples/watch_generation.py                                    # the embedded pair, no download
python examples/watch_generation.py --student Qwen/Qwen3-1.7B --teacher Qwen/Qwen3-4B --prompt "Factor x^4 + 4."
"""

import argparse

from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_opd_hf import DriftConfig, DriftMonitor, DriftProgress, pruned_generate
from prune_opd_hf.tasks import ChainTask
from prune_opd_hf.tasks.pair import WEIGHTS

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--student", default=str(WEIGHTS / "student"))
parser.add_argument("--teacher", default=str(WEIGHTS / "teacher"))
parser.add_argument(
    "--prompt", action="append", help="may be given several times; problems of the embedded task otherwise"
)
parser.add_argument("--max-new-tokens", type=int, default=112)
parser.add_argument("--weight-drop", type=float, default=0.25, help="0.01 for long reasoning")
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(arguments.student, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
student = AutoModelForCausalLM.from_pretrained(arguments.student, dtype="auto", device_map="auto")
teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype="auto", device_map="auto")
prompts = arguments.prompt or [problem.prompt for problem in ChainTask().problems(32, seed=0, split="evaluation")]
inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(student.device)

drifted = saved = 0
with tqdm(total=len(prompts), unit="row", desc="finished") as bar:

    def show(progress: DriftProgress) -> None:
        global drifted, saved
        saved += (progress.drifted_rows - drifted) * (arguments.max_new_tokens - progress.tokens)
        drifted = progress.drifted_rows
        bar.n = progress.rows - progress.running_rows
        bar.set_postfix(token=progress.tokens, drifted=drifted, kept=progress.kept_tokens, saved_at_most=saved)

    config = DriftConfig(weight_drop=arguments.weight_drop)
    monitor = DriftMonitor(teacher, config, check_every=8, on_check=show)
    sequences = student.generate(
        **inputs, max_new_tokens=arguments.max_new_tokens, custom_generate=pruned_generate, drift_monitor=monitor
    )
    rollouts = monitor.finish(sequences)

for row in range(min(3, len(prompts))):
    text = tokenizer.decode(rollouts.response_ids[row][rollouts.response_mask[row]])
    print(f"\n[{rollouts.stop_reason[row]}, {int(rollouts.lengths[row])} tokens] {prompts[row]}\n  {text}")
