"""What stands before a run: loading both models, comparing vocabularies and contexts, and what bfloat16 weights would cost.

Every check here is made before any work is spent; each says what it found and what to do.
"""

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.models.compatibility import shared_vocabulary_size
from prune_opd_hf.models.lm_head import base_causal_lm, text_config
from prune_opd_hf.teachers.adapter import AdapterBaseTeacher
from prune_opd_hf.teachers.local import LocalTeacher
from prune_opd_hf.training.config import PruneOPDConfig

logger = logging.getLogger(__name__)

SMALL_LEARNING_RATE = 1e-5


def load_model(role: str, model: Any, arguments: dict[str, Any]) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """A model given by Hub id or folder, with its tokenizer; one given as an object as it is, without.

    Raises:
        InputError: it cannot be loaded.
    """
    if not isinstance(model, str):
        return model, None
    try:
        return AutoModelForCausalLM.from_pretrained(model, **arguments), AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the {role} {model!r}: {str(error).strip().splitlines()[0]}") from error


def name_of(model: Any) -> str | None:
    """Hub id or folder of a model, where it has one."""
    if isinstance(model, str):
        return model
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


@dataclass(frozen=True)
class Pair:
    """Student and teacher of a run, found to speak of the same tokens.

    Attributes:
        student, teacher: the models; one object where the student teaches itself.
        tokenizer: the student's, with a padding token.
        shared: how many token ids mean the same to both; None where the teacher's tokenizer is not known.
        student_name, teacher_name: Hub ids or folders, where there are any.
    """

    student: Any
    teacher: Any
    tokenizer: PreTrainedTokenizerBase
    shared: int | None
    student_name: str | None
    teacher_name: str | None

    def make_teacher(self, student: nn.Module, device: torch.device, top_k: int) -> LocalTeacher:
        """The teacher, frozen and ready to watch.

        Args:
            student: what is trained: the student, or the adapter around it. A student that teaches itself does so without its
                adapter.
            device: where the teacher goes, unless it is spread over devices already.
            top_k: candidates that it records.
        """
        if self.teacher is self.student:
            kind = AdapterBaseTeacher if hasattr(student, "disable_adapter") else LocalTeacher
            return kind(student, top_k=top_k, vocab_size=self.shared)
        self.teacher.requires_grad_(False)
        if not hasattr(self.teacher, "hf_device_map"):
            self.teacher.to(device)
        return LocalTeacher(self.teacher, top_k=top_k, vocab_size=self.shared)


def load_pair(
    student: Any,
    teacher: Any,
    args: PruneOPDConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> Pair:
    """Load what was given by name, and compare the vocabularies.

    Raises:
        ConfigError: there is no teacher or no tokenizer.
        InputError: a model cannot be loaded.
        VocabularyMismatchError: the two tokenizers differ; names the first differing token.
    """
    teacher = args.teacher_model_name_or_path if teacher is None else teacher
    if teacher is None:
        raise ConfigError("a teacher is needed: teacher_model, or teacher_model_name_or_path in the settings")
    names = name_of(student), name_of(teacher)
    student, found = load_model("student", student, {"dtype": torch.float32, **args.dictionary("model_init_kwargs")})
    tokenizer = found if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ConfigError("processing_class is needed: the student's tokenizer")
    teacher, found = load_model("teacher", teacher, {"dtype": "auto", **args.dictionary("teacher_model_init_kwargs")})
    teacher_tokenizer = found if teacher_tokenizer is None else teacher_tokenizer
    shared = None if teacher_tokenizer is None else shared_vocabulary_size(tokenizer, teacher_tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError("the tokenizer has neither a padding nor an EOS token: set tokenizer.pad_token")
    return Pair(student, teacher, tokenizer, shared, *names)


def check_context(student: nn.Module, teacher: nn.Module, longest_prompt: int, max_completion_length: int) -> None:
    """Whether the longest responses fit both models' contexts.

    Raises:
        ConfigError: they cannot, whatever the prompt. Where only the longest prompts would go beyond, a line in the log.
    """
    longest = longest_prompt + max_completion_length
    for role, config in (("student", text_config(base_causal_lm(student))), ("teacher", text_config(teacher))):
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and max_completion_length >= context:
            raise ConfigError(
                f"max_completion_length {max_completion_length} does not fit the {role}'s context of {context} tokens: lower it"
            )
        if context is not None and longest > context:
            logger.warning(
                "the longest prompt and max_completion_length make %d tokens, above the %s's context of %d: a long "
                "response to it will stop the run",
                longest,
                role,
                context,
            )


def end_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase, shared: int) -> list[int]:
    """The tokens that end a response: the student's, as far as the teacher knows them.

    Raises:
        ConfigError: there is none, or the teacher knows none of them.
    """
    config = getattr(model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    ids = tokenizer.eos_token_id if ids is None else ids
    ids = [ids] if isinstance(ids, int) else list(ids or [])
    known = [token for token in ids if token < shared]
    if ids and not known:
        raise ConfigError(
            f"the student ends its responses with token {ids[0]}, which lies outside the {shared} ids that it shares with the "
            "teacher: choose a teacher with the student's tokenizer"
        )
    return known


def warn_of_rounding(model: nn.Module, learning_rate: float) -> None:
    """Warn where the trained weights are kept in 16 bits and the learning rate is too small for them.

    bfloat16 keeps 8 bits of a number, so what is less than about |w| / 512 is rounded away when it is added to a weight w.
    AdamW moves a weight by about the learning rate: at 1e-6 every weight above about 5e-4 stays exactly where it is.
    """
    half = {torch.bfloat16, torch.float16}
    found = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} & half
    if found and learning_rate <= SMALL_LEARNING_RATE:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        warnings.warn(
            f"the student's weights are kept in {names}, where updates of the size of the learning rate {learning_rate:g} are "
            "rounded away: a bfloat16 weight w does not move by less than about |w| / 512. Load the student in float32 (the "
            "default; see model_init_kwargs) and set bf16=True to compute in bfloat16",
            UserWarning,
            stacklevel=3,
        )
