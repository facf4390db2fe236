"""The processes that `accelerate launch` or `torchrun` started, on accelerators or on CPUs.

`PartialState()` alone leaves several processes without an accelerator unacquainted: each would evaluate everything, and all
would write to the same files.
"""

import os
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from prune_opd_hf.errors import ConfigError

PATIENCE = timedelta(days=2)
"""How long a process waits for the slowest one. A process that dies ends the others at once, by their launcher."""


def join_processes() -> PartialState:
    """The state that `accelerate` keeps, made here if it is not there yet; processes without an accelerator are joined too.

    Raises:
        ConfigError: several processes were started, and the state that was there before this call knows of one alone.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=PATIENCE) if _started() > 1 else PartialState(cpu=cpu)
    if _started() != state.num_processes and state.num_processes == 1:
        raise ConfigError(
            f"{_started()} processes were started, but accelerate was set up for one before evaluation began: create "
            "PartialState(cpu=True) or your Accelerator with all of them first, or start one process"
        )
    return state


def _started() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
