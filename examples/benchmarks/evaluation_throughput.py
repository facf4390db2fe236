"""Tokens a second of `evaluate_model` against plain `generate` in padded batches: 64 prompts of mixed lengths, mixed ends.

    python examples/benchmarks/evaluation_throughput.py              # CPU, one thread, a few minutes
    python examples/benchmarks/evaluation_throughput.py --tiny       # a few seconds, only to see that it runs

The work is the same to the token on both sides. A model of random weights does not end by itself in a realistic way, so its
responses are given lengths: the last word of a prompt is a number, and a hook on the model's logits makes each next token that
number less one, until it draws the end. The model computes all it otherwise would. Lengths are drawn from a log-normal
distribution, cut at the limit on new tokens; its spread is an argument, and so is a run in which all responses are equally long,
where continuous batching cannot help.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from prune_opd_hf.evaluation import Benchmark, Verdict, evaluate_model

END = 0
PROBLEMS = 64


@dataclass(frozen=True)
class Sizes:
    """Shapes of one run."""

    hidden: int
    layers: int
    vocabulary: int
    prompt: tuple[int, int]  # shortest and longest
    mean_response: int
    limit: int


SIZES = Sizes(256, 4, 8192, (8, 128), 48, 192)
TINY = Sizes(32, 2, 512, (8, 32), 12, 48)


class NothingIsRight:
    """Grading is no part of what is measured."""

    name = "not graded"

    def grade(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        return [Verdict(False, None, "no_answer")] * len(responses)


def counting_model(sizes: Sizes) -> Qwen3ForCausalLM:
    """A Qwen3-shaped model with random weights that counts down from the last word of its prompt and then ends."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=3 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(1, sizes.hidden // 64),
        num_key_value_heads=max(1, sizes.hidden // 128),
        head_dim=64 if sizes.hidden >= 64 else sizes.hidden,
        max_position_embeddings=1024,
        eos_token_id=END,
        pad_token_id=END,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).eval()

    def count_down(module: Any, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        last = kwargs["input_ids"][:, -1]
        outputs.logits[:, -1].scatter_(1, (last - 1).clamp(min=END)[:, None], 50.0)

    model.register_forward_hook(count_down, with_kwargs=True)
    return model


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Each number is a word."""
    words = WordLevel({str(number): number for number in range(vocabulary)}, unk_token="0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="0", pad_token="0", padding_side="left")


def response_lengths(spread: float, sizes: Sizes) -> list[int]:
    """Log-normal with this coefficient of variation and the mean of `sizes`, cut at the limit."""
    sigma = float(np.sqrt(np.log1p(spread**2)))
    drawn = np.random.default_rng(0).lognormal(np.log(sizes.mean_response) - sigma**2 / 2, sigma, PROBLEMS)
    return np.clip(np.round(drawn), 1, sizes.limit).astype(int).tolist()


def benchmark(lengths: list[int], sizes: Sizes) -> Benchmark:
    """Prompts of random words and mixed lengths, each with the length of its response as its last word."""
    rng = np.random.default_rng(1)
    prompts = [
        " ".join(map(str, [*rng.integers(1, sizes.vocabulary, rng.integers(*sizes.prompt)), length]))
        for length in lengths
    ]
    return Benchmark("counting", tuple(prompts), ("0",) * PROBLEMS, "counting.json", prompt_suffix="")


def plain(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Benchmark, rows: int, limit: int, top_p: float
) -> int:
    """Generate in padded batches, in the order of the benchmark; returns the tokens of the responses, their ends included."""
    tokens = 0
    for first in range(0, PROBLEMS, rows):
        inputs = tokenizer(list(task.prompts[first : first + rows]), return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        sequences = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_p=top_p, top_k=0, max_new_tokens=limit
        )
        responses = sequences[:, inputs["input_ids"].shape[1] :]
        ended = (responses == END).long()
        tokens += int((ended.cumsum(dim=1) - ended == 0).sum())
        tokenizer.batch_decode(responses, skip_special_tokens=True)
    return tokens


def evaluated(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Benchmark, rows: int, limit: int, top_p: float
) -> int:
    """The whole of `evaluate_model` but for the grading: samples on disk as they come, statistics, report."""
    with tempfile.TemporaryDirectory() as folder:
        report = evaluate_model(
            model,
            [task],
            processing_class=tokenizer,
            num_generations=1,
            max_completion_length=limit,
            top_p=top_p,
            engine="loop",
            slots=rows,
            output_dir=folder,
            grader=NothingIsRight(),
            model_hash="sha256:" + "0" * 64,
            progress=False,
        )
    return report["counting"].response_tokens


def measure(ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Tokens a second of each way, taken in turn so that a slow moment of the machine meets all of them.

    Returns:
        for each way and repeat: tokens a second on the clock, and a second of this process's CPU time, which what else runs on
        the machine hardly touches.
    """
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    tokens = {name: way() for name, way in ways.items()}  # warms up, too
    assert len(set(tokens.values())) == 1, f"not the same work: {tokens}"
    for _ in range(repeats):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            generated = way()
            rates[name].append((generated / (time.perf_counter() - wall), generated / (time.process_time() - cpu)))
    return rates


def ratio(rates: dict[str, list[tuple[float, float]]], clock: int) -> float:
    """Median of the evaluator over median of generate."""
    ours, plain_rates = ([pair[clock] for pair in rates[name]] for name in ("evaluate_model", "generate"))
    return statistics.median(ours) / statistics.median(plain_rates)


CASES = ((0.8, 16, 0.95), (0.8, 16, 1.0), (0.8, 32, 0.95), (0.5, 16, 0.95), (0.0, 16, 0.95))
"""Spread of the lengths (standard deviation over mean), rows of a padded batch and slots, top_p."""


COLUMNS = (
    "spread of lengths",
    "mean",
    "longest",
    "rows",
    "top_p",
    "generate, tokens/s",
    "evaluate_model, tokens/s",
    "ratio of medians",
    "the same in CPU seconds",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))), help="which rows of the table")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default=None, help="write the figures as JSON too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = TINY if arguments.tiny else SIZES
    model, tokenizer = counting_model(sizes), word_tokenizer(sizes.vocabulary)
    print(f"{sizes}, {PROBLEMS} prompts, {arguments.repeats} repeats, {arguments.threads} thread(s)\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{' ---: |' * len(COLUMNS)}")
    figures = []
    for spread, rows, top_p in (CASES[case] for case in arguments.cases):
        lengths = response_lengths(spread, sizes)
        common = (model, tokenizer, benchmark(lengths, sizes), rows, sizes.limit, top_p)
        rates = measure(
            {"generate": lambda c=common: plain(*c), "evaluate_model": lambda c=common: evaluated(*c)},
            arguments.repeats,
        )
        walls = [[wall for wall, _ in rates[name]] for name in ("generate", "evaluate_model")]
        cells = [
            f"{statistics.pstdev(lengths) / statistics.mean(lengths):.2f}",
            f"{statistics.mean(lengths):.0f}",
            *map(str, (max(lengths), rows, top_p)),
            *[f"{statistics.median(wall):.0f} ({min(wall):.0f} to {max(wall):.0f})" for wall in walls],
            f"{ratio(rates, 0):.2f}",
            f"{ratio(rates, 1):.2f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
        figures.append({"spread": spread, "rows": rows, "top_p": top_p, "tokens_per_second": rates})
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
