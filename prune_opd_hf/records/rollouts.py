"""Rollouts: the record that generation hands to training, analysis and disk.

A frozen bundle of tensors over (batch, time, k) with its drift settings. This module knows tensors and safetensors files;
it knows neither models nor how the record came about.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prune_opd_hf.algorithm.drift import STOP_REASONS, DriftConfig, ScoredPositions, effective_length, loss_weights
from prune_opd_hf.errors import FileFormatError, InputError
from prune_opd_hf.records.files import atomic_path, first_line, parse_record, printable

FILE_KIND = "prune_opd_hf.rollouts"
FILE_VERSION = 3

PROMPT_FIELDS = ("prompt_ids", "prompt_mask")
TEACHER_PROMPT_FIELDS = ("teacher_prompt_ids", "teacher_prompt_mask")
PADDED_FIELDS = ("prompt_ids", "teacher_prompt_ids", "response_ids")
CANDIDATE_FIELDS = (
    "student_topk_ids",
    "student_topk_log_probs",
    "teacher_log_probs",
    "teacher_topk_ids",
    "teacher_topk_log_probs",
)


@dataclass(frozen=True)
class _Description:
    """What a file says beside its tensors."""

    stop_reason: tuple[str, ...]
    config: DriftConfig
    pad_token_id: int
    excluded_ids: tuple[int, ...]
    teachers: tuple[str, ...]
    engine: str
    weights: str


@dataclass(frozen=True, eq=False, repr=False)
class Rollouts:
    """What was generated, what both models said about it, and where it drifted.

    Prompts are padded on the left, responses on the right. Past a row's end `response_ids` holds the padding token and
    every other tensor 0. All log-probabilities are float32, over the full vocabulary, at temperature 1, before any warper.

    Attributes:
        prompt_ids, prompt_mask: the student's prompts; mask True on tokens.
        response_ids, response_mask: the kept tokens, a drifted row's last one being its exhausted token.
        token_log_probs: log p of each response token.
        teacher_token_log_probs: log q of each response token.
        student_topk_ids, student_topk_log_probs: S_t and log p on it, most likely first.
        teacher_log_probs: log q on S_t.
        teacher_topk_ids, teacher_topk_log_probs: T_t and log q on it, most likely first.
        overlap: O_t over the first `config.top_k` candidates.
        drift_events: B_t under `config`.
        reliability: R_t under `config`.
        stop_reason: one of `algorithm.drift.STOP_REASONS` for each row.
        config: the drift settings that were in force.
        pad_token_id: what `prompt_ids` and `response_ids` hold where their masks are False.
        excluded_ids: ids of different meaning to the two models (`allow_renamed_special_tokens`): never sampled, and in no top-k
            or normaliser.
        engine: who sampled: "generate" or a rollout engine; "" where nobody said.
        weights: with which weights, as the engine names them: the optimizer steps done, or the version that a server was sent.
        teachers: the name of each row's teacher, where there are several; else none.
        teacher_prompt_ids, teacher_prompt_mask: what the teacher read in place of the prompts; None where it read them.

    The student's columns and `overlap` are None where the student's logits were not watched ("tail" needs none).

    Raises:
        InputError: tensors that do not fit each other, naming the first that does not.
    """

    prompt_ids: Int[Tensor, "batch prompt"]
    prompt_mask: Bool[Tensor, "batch prompt"]
    response_ids: Int[Tensor, "batch time"]
    response_mask: Bool[Tensor, "batch time"]
    teacher_token_log_probs: Float[Tensor, "batch time"]
    teacher_topk_ids: Int[Tensor, "batch time k"]
    teacher_topk_log_probs: Float[Tensor, "batch time k"]
    drift_events: Bool[Tensor, "batch time"]
    reliability: Float[Tensor, "batch time"]
    stop_reason: tuple[str, ...]
    config: DriftConfig
    pad_token_id: int = 0
    excluded_ids: tuple[int, ...] = ()
    engine: str = ""
    weights: str = ""
    token_log_probs: Float[Tensor, "batch time"] | None = None
    student_topk_ids: Int[Tensor, "batch time k"] | None = None
    student_topk_log_probs: Float[Tensor, "batch time k"] | None = None
    teacher_log_probs: Float[Tensor, "batch time k"] | None = None
    overlap: Float[Tensor, "batch time"] | None = None
    teachers: tuple[str, ...] = ()
    teacher_prompt_ids: Int[Tensor, "batch teacher_prompt"] | None = None
    teacher_prompt_mask: Bool[Tensor, "batch teacher_prompt"] | None = None

    def __post_init__(self) -> None:
        batch, time = self.response_ids.shape
        if len(self.stop_reason) != batch or not set(self.stop_reason) <= set(STOP_REASONS):
            raise InputError(f"stop_reason must hold one of {', '.join(STOP_REASONS)} for each of {batch} rows")
        if self.teachers and len(self.teachers) != batch:
            raise InputError(f"teachers must name one for each of {batch} rows, or be empty")
        for name, tensor in self.tensors().items():
            expected: tuple[int, ...] = (batch, time)
            if name in PROMPT_FIELDS:
                expected = (batch, self.prompt_ids.shape[-1])
            elif name in TEACHER_PROMPT_FIELDS:
                expected = (batch, tensor.shape[-1])
            elif name in CANDIDATE_FIELDS:
                expected = (batch, time, self.teacher_topk_ids.shape[-1])
            if tuple(tensor.shape) != expected:
                raise InputError(f"{name} must have the shape {expected}, got {tuple(tensor.shape)}")

    def __len__(self) -> int:
        return self.response_ids.shape[0]

    def __repr__(self) -> str:
        """Counts and means; the tensors themselves are in `tensors()`."""
        tokens, rows = int(self.response_mask.sum()), max(len(self), 1)
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(self.stop_reason).most_common())
        shares = f"{int(self.drift_events.sum()):,} drift events"
        if self.overlap is not None and tokens:
            shares += f", mean overlap {float(self.overlap[self.response_mask].mean()):.3f}"
        return (
            f"Rollouts({len(self)} rows: {int(self.prompt_mask.sum()):,} prompt tokens, {tokens:,} response tokens, "
            f"{tokens / rows:.1f} a row; stopped: {reasons};\n    {shares}, mean effective length "
            f"{float(self.effective_lengths.sum()) / rows:.1f};\n    {self.config})"
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that is there, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Response tokens of each row."""
        return self.response_mask.sum(dim=-1)

    @property
    def effective_lengths(self) -> Int[Tensor, " batch"]:
        """E of each row: its response tokens with reliability above zero."""
        return effective_length(self.reliability, self.response_mask)

    @property
    def ended_naturally(self) -> Bool[Tensor, " batch"]:
        """Rows that ended by themselves while still reliable: what the response budget leaves out of its share."""
        by_itself = torch.tensor([reason == "eos" for reason in self.stop_reason], device=self.response_ids.device)
        return by_itself & (self.effective_lengths == self.lengths)

    @property
    def positions(self) -> ScoredPositions:
        """What drift is judged by at each position."""
        names = [item.name for item in fields(ScoredPositions) if item.name != "token_ids"]
        return ScoredPositions(self.response_ids, **{name: getattr(self, name) for name in names})

    @property
    def loss_weights(self) -> Float[Tensor, "batch time"]:
        """L_t = R_t + weight_base on response tokens, 0 on padding."""
        return loss_weights(self.reliability, self.response_mask, self.config.weight_base)

    @property
    def sequences(self) -> Int[Tensor, "batch total"]:
        """Prompt and kept response side by side, as `generate` lays them out."""
        return torch.cat([self.prompt_ids, self.response_ids], dim=-1)

    @property
    def sequence_mask(self) -> Bool[Tensor, "batch total"]:
        """True on prompt and kept response tokens of `sequences`."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=-1)

    def to(self, device: torch.device | str) -> "Rollouts":
        """The same record on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def select(self, rows: Int[Tensor, " kept"] | Sequence[int]) -> "Rollouts":
        """Only these rows, in this order, cut to what they need: no column that is padding in all of them remains.

        Raises:
            InputError: no rows, or flags instead of row numbers.
        """
        if torch.as_tensor(rows).dtype == torch.bool:
            raise InputError("select needs row numbers, got flags: pass flags.nonzero().squeeze(-1)")
        index = torch.as_tensor(rows, dtype=torch.long, device=self.response_ids.device)
        if index.numel() == 0:
            raise InputError("select needs at least one row")
        prompt = int(self.prompt_mask[index].sum(dim=-1).max())
        time = int(self.lengths[index].max())
        widths = dict.fromkeys(PROMPT_FIELDS, prompt)
        if self.teacher_prompt_mask is not None:
            read = int(self.teacher_prompt_mask[index].sum(dim=-1).max())
            widths |= dict.fromkeys(TEACHER_PROMPT_FIELDS, read)
        picked = {
            name: tensor[index][:, -widths[name] :] if name in widths else tensor[index][:, :time]
            for name, tensor in self.tensors().items()
        }
        numbers = index.tolist()
        return replace(
            self,
            **picked,
            stop_reason=tuple(self.stop_reason[row] for row in numbers),
            teachers=tuple(self.teachers[row] for row in numbers) if self.teachers else (),
        )

    @staticmethod
    def cat(parts: Sequence["Rollouts"]) -> "Rollouts":
        """Several records as one, padded to the longest prompt and response.

        Raises:
            InputError: nothing to join, or parts with other drift settings, other padding or other columns.
        """
        if not parts:
            raise InputError("Rollouts.cat needs at least one part")
        first = parts[0]
        for part in parts[1:]:
            if part.config != first.config:
                raise InputError(f"parts differ in their drift settings: {first.config} and {part.config}")
            if part.pad_token_id != first.pad_token_id:
                raise InputError(f"parts differ in their padding token: {first.pad_token_id} and {part.pad_token_id}")
            if part.excluded_ids != first.excluded_ids:
                raise InputError("parts differ in the token ids that do not count (excluded_ids)")
            if bool(part.teachers) != bool(first.teachers):
                raise InputError("parts differ in their teachers: some name one for each row and some do not")
            if part.tensors().keys() != first.tensors().keys():
                raise InputError("parts differ in their columns: some watched the student's logits and some did not")
            for name in ("teacher_topk_ids", "student_topk_ids"):
                if name in first.tensors() and part.tensors()[name].shape[-1] != first.tensors()[name].shape[-1]:
                    raise InputError(f"parts differ in the number of candidates of {name}")
        joined = {}
        for name in first.tensors():
            is_prompt = name in (*PROMPT_FIELDS, *TEACHER_PROMPT_FIELDS)
            width = max(part.tensors()[name].shape[1] for part in parts)
            value = first.pad_token_id if name in PADDED_FIELDS else 0
            joined[name] = torch.cat([_pad(part.tensors()[name], width, value, left=is_prompt) for part in parts])
        return replace(
            first,
            **joined,
            stop_reason=tuple(reason for part in parts for reason in part.stop_reason),
            teachers=tuple(name for part in parts for name in part.teachers),
            engine=", ".join(dict.fromkeys(part.engine for part in parts)),
            weights=", ".join(dict.fromkeys(part.weights for part in parts)),
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write to one safetensors file, atomically.

        Raises:
            InputError: the folder does not exist.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise InputError(f"cannot save rollouts: the folder {path.parent} does not exist")
        metadata = {"kind": FILE_KIND, "version": str(FILE_VERSION)}
        metadata |= {item.name: json.dumps(getattr(self, item.name), default=asdict) for item in fields(_Description)}
        # Copies, since safetensors refuses columns that share memory.
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.tensors().items()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @staticmethod
    def load(path: str | os.PathLike) -> "Rollouts":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            FileFormatError: the file is cut short, is something else, or comes from another version.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no rollouts file at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise FileFormatError(
                f"{path} is not a whole safetensors file (cut short?): {first_line(error)}"
            ) from error
        if metadata.get("kind") != FILE_KIND:
            raise FileFormatError(f"{path} is a safetensors file but holds no rollouts")
        if metadata.get("version") != str(FILE_VERSION):
            raise FileFormatError(
                f"{path} has rollouts format {printable(str(metadata.get('version')))}, this package reads {FILE_VERSION}: "
                "generate it again or use the package version that wrote it"
            )
        for name, tensor in tensors.items():
            if tensor.dtype != _dtype(name):
                raise FileFormatError(f"{path} is damaged: {name} holds {tensor.dtype} in place of {_dtype(name)}")
        try:
            described = {item.name: json.loads(metadata[item.name]) for item in fields(_Description)}
            return Rollouts(**tensors, **vars(parse_record(_Description, described, "its description")))
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise FileFormatError(f"{path} is damaged: {first_line(error)}") from error


def _dtype(name: str) -> torch.dtype:
    if name.endswith("_ids"):
        return torch.long
    return torch.bool if name.endswith(("_mask", "_events")) else torch.float32


def _pad(tensor: Tensor, width: int, value: int, *, left: bool) -> Tensor:
    missing = width - tensor.shape[1]
    if missing == 0:
        return tensor
    padding = tensor.new_full((tensor.shape[0], missing, *tensor.shape[2:]), value)
    return torch.cat([padding, tensor] if left else [tensor, padding], dim=1)
