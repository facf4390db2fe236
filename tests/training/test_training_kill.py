"""kill -9 between and inside saves: the last complete checkpoint stays usable, and going on from it is as if nothing happened."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from trainer_helpers import make_trainer

from prune_opd_hf.training.checkpoints import last_complete_checkpoint

TESTS = Path(__file__).parents[1]
STEPS = 5
PROGRAM = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from trainer_helpers import make_trainer

folder, place, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)

def killing(function):
    def wrapped(*args, **kwargs):
        global number
        inside = any("checkpoint-" in str(arg) for arg in args if isinstance(arg, (str, Path)))
        number -= inside
        if inside and number == 0:
            if place == "torch.save":  # half of the file is there
                Path(args[1]).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

if place == "torch.save":
    torch.save = killing(torch.save)
elif place == "os.replace":
    os.replace = killing(os.replace)
elif place == "shutil.rmtree":
    shutil.rmtree = killing(shutil.rmtree)
trainer = make_trainer(folder, max_steps=STEPS, save_strategy="steps", save_steps=1, save_total_limit=1, logging_steps=2)
trainer.train()
""".replace("STEPS", str(STEPS))


def start(folder, place, number):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), place, str(number)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The weights and the log of a run that nobody kills."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), max_steps=STEPS, save_strategy="no", logging_steps=2)
    trainer.train()
    return trainer


def assert_goes_on_as_if_nothing_happened(folder, uninterrupted):
    resumed = make_trainer(folder, max_steps=STEPS, save_strategy="no", logging_steps=2)
    resumed.train(resume_from_checkpoint=True)
    theirs = dict(uninterrupted.model.named_parameters())
    assert all(torch.equal(weights, theirs[name]) for name, weights in resumed.model.named_parameters())
    assert resumed.counts == uninterrupted.counts
    logged, expected = (
        [entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (resumed, uninterrupted)
    )
    for ours, other in zip(logged, expected, strict=True):
        assert {k: v for k, v in ours.items() if not k.startswith("time/")} == {
            k: v for k, v in other.items() if not k.startswith("time/")
        }


# A save writes optimizer, scheduler, random state and arguments with torch.save, then moves the folder; from the second save on
# the old checkpoint moves out and is deleted.
@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("torch.save", 6),  # inside the second save
        pytest.param("os.replace", 5, marks=pytest.mark.slow),  # about to move a checkpoint into or out of its place
        pytest.param("torch.save", 11, marks=pytest.mark.slow),
        pytest.param("os.replace", 4, marks=pytest.mark.slow),
        pytest.param("os.replace", 6, marks=pytest.mark.slow),
        pytest.param("os.replace", 7, marks=pytest.mark.slow),
        pytest.param("shutil.rmtree", 6, marks=pytest.mark.slow),
        pytest.param("shutil.rmtree", 8, marks=pytest.mark.slow),
    ],
)
def test_killed_inside_a_save(tmp_path, uninterrupted, place, number):
    process = start(tmp_path, place, number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors.decode()[-2000:]
    assert last_complete_checkpoint(tmp_path / "run") is not None
    assert_goes_on_as_if_nothing_happened(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_killed_at_a_random_moment(tmp_path, uninterrupted, seed):
    process = start(tmp_path, "nowhere", 0)
    deadline = time.monotonic() + 300
    while last_complete_checkpoint(tmp_path / "run") is None and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(random.Random(seed).uniform(0, 1.5))
    process.kill()
    process.communicate(timeout=60)
    assert last_complete_checkpoint(tmp_path / "run") is not None
    assert_goes_on_as_if_nothing_happened(tmp_path, uninterrupted)
