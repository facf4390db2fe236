"""What a saved student carries beside its weights, and in which numbers they are saved.

Its generation config names the end tokens of the run, so that whoever loads it stops where training did; an adapter, which
Transformers saves without one, gets the file as well. It knows folders and configs; it does not know checkpoints.
"""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune_opd_hf.models.end_tokens import EndTokens
from prune_opd_hf.models.lm_head import base_causal_lm
from prune_opd_hf.models.loading import is_adapted


@dataclass(frozen=True)
class SavedForm:
    """How students of a run are saved.

    Attributes:
        end_tokens: the tokens that end a response.
        dtype: of the saved weights; None for that in which they were trained.
    """

    end_tokens: EndTokens
    dtype: torch.dtype | None

    def weights(self, model: nn.Module, given: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
        """The weights to save: those given, else the model's; None leaves it to Transformers, where nothing is to be cast.

        A tensor that stands under two names, as tied embeddings do, is cast once; weights that FSDP2 has put together hold it
        twice, and it is saved once.
        """
        dtype = self.dtype
        if given is not None and not is_adapted(model):
            tied = getattr(model, "all_tied_weights_keys", None) or {}
            given = {name: tensor for name, tensor in given.items() if name not in tied}
        if dtype is None:
            return given
        cast: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}

        def to_dtype(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            return cast.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), tensor.detach().to(dtype))

        state = model.state_dict() if given is None else given
        if not is_adapted(model):
            return {name: to_dtype(tensor) for name, tensor in state.items()}
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {name: to_dtype(tensor) if name in trained else tensor for name, tensor in state.items()}

    def prepare(self, model: nn.Module) -> None:
        """Let the model's generation config name the end tokens: the Trainer aligns it with the tokenizer when a run begins."""
        config: Any = base_causal_lm(model).generation_config
        config.eos_token_id = list(self.end_tokens.token_ids)

    def complete(self, model: nn.Module, folder: str | os.PathLike[str]) -> None:
        """Write what Transformers leaves out: an adapter's generation config, and the dtype of weights that were cast."""
        base: Any = base_causal_lm(model)
        if is_adapted(model):
            base.generation_config.save_pretrained(folder)
        elif self.dtype is not None:
            config = copy.deepcopy(base.config)
            config.dtype = self.dtype
            config.save_pretrained(folder)
