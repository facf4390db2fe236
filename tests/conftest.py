"""Shared fixtures: offline mode, a fixed random state, tiny models of several families.

Axis names in signatures are checked while the tests run (jaxtyping with beartype, set in pyproject.toml).
"""

import atexit
import os
import shutil
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Xet remembers by address what an earlier Hub had stored: a run that gets the same port must not find it.
os.environ["HF_XET_CACHE"] = tempfile.mkdtemp(prefix="xet-cache-")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")

atexit.register(shutil.rmtree, os.environ["HF_XET_CACHE"], ignore_errors=True)


@pytest.fixture
def without_matplotlib(monkeypatch):
    """As where only the wheel is installed."""
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture(autouse=True)
def _repeatable():
    """Every test starts from the same random state, with one thread and nothing warned of, so that figures and logs repeat."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    from prune_opd_hf.errors import warn_once  # not before the axis checks of jaxtyping are in place

    warn_once.cache_clear()
