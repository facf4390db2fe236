"""Real vLLM servers on this machine for the tests marked `vllm`, and tiny models whose shapes its CPU kernels take."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import torch
import transformers

START_SECONDS = 400
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "tie_word_embeddings": False,
}
"""Heads of 32 are the smallest that the kernels know."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
}


def servable_model(prefix, seed, **changes):
    """A model of the family `prefix`, such as "Qwen3", in evaluation mode."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}Config")(**{**SHAPE, **changes})
    return getattr(transformers, f"{prefix}ForCausalLM")(config).eval()


class VLLMServer:
    """A server over a saved model, started with the object and stopped by `stop`.

    Args:
        folder: of the model.
        arguments: further ones of the command line.
        key: the API key that it wants.
    """

    def __init__(self, folder, *arguments, key=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.arguments, self.key = Path(folder), arguments, key
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        """Start it, and return at once."""
        fixed = "--skip-tokenizer-init --dtype float32 --max-model-len 512 --enforce-eager --max-logprobs 64 --enable-scale-out "
        fixed += (
            "--no-enable-chunked-prefill"  # on CPUs vLLM 0.32 dies of a seeded request whose prompt it reads in parts
        )
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(self.folder),
            *fixed.split(),
        ]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *self.arguments]
        environment = {**os.environ, **ENVIRONMENT, **({"VLLM_API_KEY": self.key} if self.key else {})}
        self.log = self.folder.with_name(f"{self.folder.name}-{self.port}.log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def wait_until_ready(self):
        """Wait until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return self
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"vLLM did not start within {START_SECONDS} s: {self.log.read_text()[-3000:]}")

    def kill(self):
        """kill -9, with all of its processes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self):
        """End it, if it still runs."""
        if self.process.poll() is None:
            self.kill()

    @property
    def runs(self):
        """Whether its process is there."""
        return self.process.poll() is None

    def metric(self, name):
        """A number of its /metrics, summed over labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return sum(
            float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? ([0-9.e+]+)$", text, flags=re.MULTILINE)
        )


class Fleet:
    """Servers that tests share by name. They start when they are first asked for, and at most `limit` run at a time."""

    def __init__(self, folder, limit=2):
        self.folder, self.limit, self.running = folder, limit, {}

    def get(self, name, make, *arguments, **others):
        """The server of this name: ready, over the model that `make` makes."""
        server = self.start(name, make, *arguments, **others)
        return server.wait_until_ready()

    def start(self, name, make, *arguments, **others):
        """The same, which may not answer yet."""
        server = self.running.pop(name, None)
        if server is None or not server.runs:
            while len(self.running) >= self.limit:
                self.running.pop(next(iter(self.running))).stop()  # the one that was not asked for the longest
            if not (self.folder / name).exists():
                make().save_pretrained(self.folder / name)
            server = VLLMServer(self.folder / name, *arguments, **others)
        self.running[name] = server
        return server

    def stop(self):
        """End all."""
        for server in self.running.values():
            server.stop()
