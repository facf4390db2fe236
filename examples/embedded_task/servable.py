"""The embedded task's models in shapes that vLLM's CPU kernels take, computing the same."""

import torch
from transformers import PreTrainedModel


def with_heads_of_32(model: PreTrainedModel) -> PreTrainedModel:
    """The embedded Qwen3 student, whose heads have 16 numbers, with heads of 32."""
    return with_heads_of(model, 32)


@torch.no_grad()
def with_heads_of(model: PreTrainedModel, size: int) -> PreTrainedModel:
    """A Qwen3 model with heads `size` numbers wide, a multiple n of what they are, of which the further ones are always zero.

    Rotary frequencies are theta^(-2 i / size), so that pair i is pair n i of the wider heads. Normalising over n times as many
    numbers makes those that are not zero sqrt(n) larger, which the attention's scale of 1 / sqrt(size) takes back once: the norm of
    the queries takes back the rest. Gradients of the zeros are zero, so that training keeps them. The head is not tied to the
    embeddings: vLLM on a CPU goes on using a packed copy of such a head.
    """
    old, new = model.config.head_dim, size
    config = type(model.config).from_dict({**model.config.to_dict(), "head_dim": new, "tie_word_embeddings": False})
    padded = type(model)(config).eval()
    step = new // old
    place = torch.cat([torch.arange(old // 2) * step, new // 2 + torch.arange(old // 2) * step])
    rows = (torch.arange(config.num_attention_heads).unsqueeze(-1) * new + place).flatten()
    state = {}
    for name, values in model.state_dict().items():
        target = torch.zeros_like(padded.state_dict()[name])
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            target[rows] = values
        elif name.endswith("o_proj.weight"):
            target[:, rows] = values
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            target[place] = values / (step**0.5 if "q_norm" in name else 1.0)
        else:
            target = values
        state[name] = target
    padded.load_state_dict(state)
    padded.generation_config = model.generation_config
    return padded
