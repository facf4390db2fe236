"""Shared fixtures. Axis names in signatures are checked (jaxtyping with beartype) while the tests run."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

install_import_hook("prune_opd_hf", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state and uses one thread, so that figures repeat."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
