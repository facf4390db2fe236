"""Several processes of this machine for a test, at ports that nobody else takes in between."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
}


def launched(*command: str) -> str:
    """What a Python module printed; it must succeed."""
    result = subprocess.run(
        [sys.executable, "-m", *command], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout


def torchrun(script: str, *arguments: str, processes: int = 2) -> str:
    """A script of tests/ in several processes. The launcher chooses the port and keeps it."""
    launcher = f"torch.distributed.run --standalone --nproc_per_node {processes}".split()
    return launched(*launcher, str(ROOT / "tests" / script), *arguments)


@contextmanager
def accelerate_launch() -> Iterator[list[str]]:
    """The words of `accelerate launch` for two processes of a CPU, without what they run.

    The port that it names is taken as long as this lasts, and so Accelerate lets the launcher choose a free one and keep it. A port
    that was free a moment ago may not be so any more.
    """
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        words = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
        yield f"{words} --dynamo_backend no --main_process_port {taken.getsockname()[1]}".split()
