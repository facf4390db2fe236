"""Shared fixtures: offline mode, a fixed random state, tiny models of several families.

Axis names in signatures are checked while the tests run (jaxtyping with beartype, set in pyproject.toml).
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    """Every test starts from the same random state and uses one thread, so that figures repeat."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
