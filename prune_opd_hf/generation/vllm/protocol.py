"""vLLM's words: sampling parameters in, tokens with their log-probabilities out. It knows neither servers nor engines."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.generation.engine import WARPERS, Candidates, Sampling
from prune_opd_hf.serving.servers import Servers, split_urls

MODES = ("server", "colocate")
LOGIT_OF_SUPPRESSED = -100.0
"""The lowest bias that vLLM takes; a token that is sampled all the same is refused by the teacher, which does not know it."""

STOP_REASON_OF = {"stop": "eos", "length": "length"}
"""By vLLM's finish reason."""


@dataclass(frozen=True)
class VLLMSettings:
    """Where vLLM runs, under TRL's words.

    Attributes:
        mode: "server": at `server_base_url`; "colocate": in this process.
        server_base_url: one URL or several, which share the requests.
        server_timeout: seconds without any sign of a server, after which it counts as gone.
        gpu_memory_utilization: "colocate": share of the GPU's memory.
        enable_sleep_mode: "colocate": give that memory back between two calls of `generate`.
        weights_dir: folder that the servers read new weights from, under the same path as here. None: a temporary one.

    Raises:
        ConfigError: a mode, URL, number or folder that cannot be worked with.
    """

    mode: str = "colocate"
    server_base_url: tuple[str, ...] = ("http://127.0.0.1:8000",)
    server_timeout: float = 240.0
    gpu_memory_utilization: float = 0.3
    enable_sleep_mode: bool = False
    weights_dir: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"vllm_mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        _ = self.servers  # checked there
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"vllm_gpu_memory_utilization must lie in (0, 1], got {self.gpu_memory_utilization}")
        if self.weights_dir is not None and not os.access(self.weights_dir, os.W_OK | os.X_OK):
            raise ConfigError(
                f"vllm_weights_dir {self.weights_dir} is not there or cannot be written to: name a folder that this machine and "
                "its servers have in common"
            )

    @classmethod
    def of(cls, *, mode: str, server_base_url: str | None, **others: Any) -> "VLLMSettings":
        """The same from a field of text: URLs separated by commas."""
        return cls(mode=mode, server_base_url=split_urls(server_base_url) or cls.server_base_url, **others)

    @property
    def servers(self) -> Servers:
        """Where they are, in the words of whoever asks servers."""
        return Servers(self.server_base_url, self.server_timeout)


def sampling_parameters(sampling: Sampling, candidates: int) -> dict[str, Any]:
    """How every request is sampled, in vLLM's words."""
    sampling.refuse_beyond_warpers("vLLM")
    arguments = sampling.generate_arguments()
    warpers = {name: arguments[name] for name in WARPERS if arguments.get(name) is not None}
    parameters = {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        **(warpers if arguments["do_sample"] else {}),
        # Whatever the served model's own generation config says.
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(sampling.eos_token_ids),
        "ignore_eos": True,
        "detokenize": False,
    }
    if sampling.suppress_tokens:
        parameters["logit_bias"] = dict.fromkeys(map(str, sampling.suppress_tokens), LOGIT_OF_SUPPRESSED)
    if candidates:
        # The sampled token counts as one of them, so that one of the true `candidates` may be missing.
        parameters["logprobs"] = candidates + 1
    return parameters


def candidates_of(alternatives: Sequence[Mapping[int, float]], token_ids: Sequence[int], count: int) -> Candidates:
    """The `count` most likely tokens at each position, from log-probabilities by id which the sampled token is among."""
    ids, log_probs = [], []
    for at in alternatives:
        best = sorted(at.items(), key=lambda item: (-item[1], item[0]))[:count]
        ids.append([token for token, _ in best])
        log_probs.append([value for _, value in best])
    own = [at[token] for at, token in zip(alternatives, token_ids, strict=True)]
    return Candidates(ids, log_probs, own)
