"""A teacher of this process that holds only its share of the layers' weights: `shard_teacher`.

FSDP2 gathers a layer from all processes when it is passed through. Embeddings and LM head stay whole in each: a teacher passes
through its backbone, and uses the head apart from that.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.teachers.base import Teacher
from prune_opd_hf.teachers.local import LocalTeacher


def shard_layers_inplace(model: nn.Module, device: torch.device) -> None:
    """Keep of each layer this process's share, on this device."""
    names = getattr(model, "_no_split_modules", None) or ()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = [part for part in model.modules() if type(part).__name__ in names]
    if not layers:
        raise ConfigError(
            f"shard_teacher: {type(model).__name__} does not say which of its modules are layers: leave it out"
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def backbones(teacher: Teacher) -> list[nn.Module]:
    """What the forward passes of a teacher of this process go through; of several teachers, of each."""
    local = [one for one in getattr(teacher, "teachers", {"": teacher}).values() if isinstance(one, LocalTeacher)]
    return [getattr(one.model, one.model.base_model_prefix, one.model) for one in local]
