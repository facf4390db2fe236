"""Rollouts through each engine: what watching costs, what pruning saves, and whether the slots stay full.

    make test-vllm                                                      # once, for an environment with vLLM
    python examples/benchmarks/engines.py --vllm_python .venv-vllm/bin/python
    python examples/benchmarks/engines.py --engines loop                # without vLLM
    python examples/benchmarks/engines.py --tiny ...                    # a minute, only to see that it runs

For each engine, 32 rows: the engine alone (no watch), watched with nothing drifting, and watched with every row stopped at 22 % of
its length; beside them one teacher pass over the finished sequences. With vLLM also 256 responses of log-normal length in 32
slots: the share of the time in which nothing ran while requests waited, and tokens generated past stops, both by the server's own
metrics. Random weights: nothing here depends on what is generated, only on how much.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from generation import Sizes, model
from transformers import PreTrainedModel

from prune_opd_hf import DriftConfig, DriftMonitor, Teacher
from prune_opd_hf.generation import Request, RolloutEngine, Sampling, VLLMSettings, make_engine

ROWS, KEPT_SHARE, TOP_K = 32, 0.22, 16
QUEUED = 256
SERVER_FLAGS = (
    "--skip-tokenizer-init --dtype float32 --enforce-eager --max-logprobs 64 --enable-scale-out --max-num-seqs 32 "
    "--block-size 32 --no-enable-chunked-prefill"  # on CPUs vLLM 0.32 dies of a seeded request whose prompt it reads in parts
)
SERVER_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "HF_HUB_OFFLINE": "1",
}


SIZES = Sizes((256, 6), (512, 8), 8192, 32, 256, 3)
TINY = Sizes((64, 2), (64, 2), 256, 8, 64, 1)


@contextmanager
def server(python: str, folder: Path, max_model_len: int = 1024) -> Iterator[str]:
    """A vLLM server over a saved model while this lasts; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *SERVER_FLAGS.split()]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(max_model_len)],
            env={**os.environ, **SERVER_ENVIRONMENT},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit((folder / "server.log").read_text()[-2000:]) from None
                time.sleep(0.5)
        yield url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()


def metric(url: str, name: str) -> float:
    """A number of the server's metrics, summed over its labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? ([0-9.e+]+)$", text, flags=re.MULTILINE))


@dataclass(frozen=True)
class Bench:
    """One engine and what it is measured with."""

    engine: RolloutEngine
    student: PreTrainedModel
    teacher: Teacher
    requests: list[Request]
    length: int

    def alone(self) -> None:
        """Without a watch."""
        for _ in self.engine.generate(self.requests):
            pass

    def watched(self, kept_share: float = 1.0) -> object:
        """With a watch under which nothing drifts, or every row stops after this share of its length."""
        drifts = kept_share < 1
        config = DriftConfig(
            "overlap",
            top_k=TOP_K,
            threshold=1.0,
            weight_drop=1.0 if drifts else 0.0,
            min_length=round(kept_share * self.length) if drifts else 0,
        )
        monitor = DriftMonitor(
            self.teacher, config, check_every=32, student=None if self.engine.delivers_candidates else self.student
        )
        watch = monitor.begin(eos_token_ids=(), pad_token_id=0, ragged=self.engine.ragged)
        for _ in self.engine.generate(self.requests, watch):
            pass
        return watch.rollouts()


def median_seconds(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each way, taken in turns after one turn that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def measure(bench: Bench, repeats: int) -> dict[str, float]:
    """Seconds of each way, and their ratios."""
    rollouts = bench.watched()

    def teacher_pass() -> None:
        bench.teacher.start(rollouts.prompt_ids, rollouts.prompt_mask)
        bench.teacher.score(rollouts.response_ids)

    ways: dict[str, Callable[[], object]] = {
        "alone": bench.alone,
        "teacher_pass": teacher_pass,
        "watched": bench.watched,
        "pruned": lambda: bench.watched(KEPT_SHARE),
    }
    found = median_seconds(ways, repeats)
    kept = float(bench.watched(KEPT_SHARE).lengths.sum() / rollouts.lengths.sum())
    return {
        **found,
        "watched / (alone + teacher pass)": found["watched"] / (found["alone"] + found["teacher_pass"]),
        "pruned / watched": found["pruned"] / found["watched"],
        "kept": kept,
    }


def queue(bench: Bench, url: str) -> dict[str, float]:
    """256 responses of log-normal length in 32 slots, none of which drifts; then 32 rows that stop, and what runs on past it."""
    lengths = torch.distributions.LogNormal(4.5, 0.8).sample((QUEUED,)).clamp(4, bench.length).long().tolist()
    prompts = [bench.requests[number % ROWS].prompt_ids for number in range(QUEUED)]
    queued = [
        Request(prompt, number, length) for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    over, idle, waited = threading.Event(), 0, 0

    def look() -> None:
        nonlocal idle, waited
        while not over.wait(0.05):
            if metric(url, "vllm:num_requests_waiting") > 0:
                waited += 1
                idle += metric(url, "vllm:num_requests_running") == 0

    thread = threading.Thread(target=look)
    thread.start()
    Bench(bench.engine, bench.student, bench.teacher, queued, bench.length).watched()
    over.set()
    thread.join()
    before = metric(url, "vllm:generation_tokens_total")
    stopped = bench.watched(KEPT_SHARE)
    time.sleep(1)
    past = metric(url, "vllm:generation_tokens_total") - before - float(stopped.lengths.sum())
    return {
        "idle while others wait": idle / max(1, waited),
        "looks": waited,
        "tokens past a stop, of each row": past / ROWS,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["loop", "continuous_batching", "vllm"])
    parser.add_argument("--vllm_python", default=".venv-vllm/bin/python", help="of an environment with vLLM")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--new_tokens", type=int, default=768, help="tokens of each response")
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    arguments = parser.parse_args()
    if "vllm" in arguments.engines and not Path(arguments.vllm_python).is_file():
        parser.error(
            f"--vllm_python {arguments.vllm_python} is no file: name a Python that has vLLM, or leave vllm out of --engines"
        )
    sizes = TINY if arguments.tiny else replace(SIZES, new_tokens=arguments.new_tokens)
    torch.set_num_threads(1)
    student, teacher = (
        model(sizes.student, sizes.vocabulary, 0),
        Teacher(model(sizes.teacher, sizes.vocabulary, 1), top_k=TOP_K),
    )
    prompts = torch.randint(3, sizes.vocabulary, (ROWS, sizes.prompt), generator=torch.Generator().manual_seed(0))
    requests = [Request(tuple(prompt.tolist()), seed) for seed, prompt in enumerate(prompts)]
    sampling = Sampling(sizes.new_tokens, (), 0)
    results: dict[str, dict[str, float]] = {}
    for name in arguments.engines:
        with tempfile.TemporaryDirectory() as folder:
            student.save_pretrained(folder)
            running = server(arguments.vllm_python, Path(folder)) if name == "vllm" else None
            url = running.__enter__() if running is not None else None
            try:
                vllm = VLLMSettings.of(mode="server", server_base_url=url)
                engine = make_engine(name, student, sampling, slots=ROWS, teacher=teacher, vllm=vllm)
                engine.update_weights(student, 0)
                bench = Bench(engine, student, teacher, requests, sizes.new_tokens)
                results[name] = measure(bench, sizes.repeats)
                if url is not None:
                    results[name] |= queue(bench, url)
                engine.close()
            finally:
                if running is not None:
                    running.__exit__(None, None, None)
        print(name, json.dumps({key: round(value, 3) for key, value in results[name].items()}), flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
