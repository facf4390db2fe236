"""What the way a run was launched allows: asked before anything is loaded.

It knows settings and processes; it knows neither models nor data.
"""

import os
from typing import TYPE_CHECKING, Any

from accelerate.utils import parse_flag_from_env

from prune_opd_hf.errors import ConfigError

if TYPE_CHECKING:
    from prune_opd_hf.training.config import PruneOPDConfig

SHARDED = "Use FSDP2 (fsdp_version: 2, see examples/configs/accelerate/fsdp2.yaml) or DeepSpeed ZeRO-2"


def check_launch(args: "PruneOPDConfig", student: Any) -> None:
    """Refuse a run that could not go on, or would not do what it seems to; the student is a model, or the name of one."""
    devices = args.n_gpu
    if devices > 1 and not _lies_on_several_devices(args, student):
        raise ConfigError(
            f"{devices} GPUs are visible to one process, and Transformers would share each batch among them by nn.DataParallel, "
            f"which rollouts cannot follow: start with accelerate launch --num_processes {devices}, or show one GPU "
            "(CUDA_VISIBLE_DEVICES=0)"
        )
    deepspeed = getattr(args, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.hf_ds_config.is_zero3():
        raise ConfigError(
            "DeepSpeed ZeRO-3 is not supported: the loss reads the LM head outside of its forward pass, where ZeRO-3 gathers "
            f"nothing. {SHARDED}"
        )
    if deepspeed is not None and args.max_tokens_per_micro_batch is not None:
        raise ConfigError(
            "max_tokens_per_micro_batch needs another number of backward passes in each step, and DeepSpeed counts a fixed one: "
            "leave it out, or use FSDP2 or plain DDP"
        )
    by_settings = (getattr(args, "fsdp_plugin_args", None) or {}).get("fsdp_version")
    by_launcher = os.environ.get("FSDP_VERSION", "1") if parse_flag_from_env("ACCELERATE_USE_FSDP") else None
    if "1" in (str(by_settings), by_launcher):
        raise ConfigError(f"FSDP of version 1 is not supported, for it keeps the LM head's weight to itself. {SHARDED}")


def _lies_on_several_devices(args: Any, student: Any) -> bool:
    """A model whose layers are spread over the devices uses them all in one process."""
    if isinstance(student, str):
        return "device_map" in args.dictionary("model_init_kwargs")
    return len(set(getattr(student, "hf_device_map", {}).values())) > 1
