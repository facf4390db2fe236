"""The pair of a run: student and teacher, loaded where they are given by name, and found to have one vocabulary.

Every check here is made before any work is spent; each names what it found and the remedy.
"""

import logging
import warnings
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.generation import DriftMonitor, RolloutEngine, Sampling
from prune_opd_hf.models.compatibility import (
    check_context,
    context_length,
    describe_rotary_switch,
    ensure_pad_token,
    refuse_other_caches,
    rotary_switch,
)
from prune_opd_hf.models.end_tokens import EndTokens, find_end_tokens, shared_end_tokens
from prune_opd_hf.models.generation_config import make_savable
from prune_opd_hf.models.lm_head import base_causal_lm, text_config
from prune_opd_hf.models.loading import (
    add_adapter,
    as_tokenizer,
    copy_with_shared_weights,
    ensure_trainable,
    find_source,
    is_adapted,
    load_base,
    load_tokenizer,
    make_adapter,
    published_name,
)
from prune_opd_hf.models.vocabulary import SharedVocabulary, shared_vocabulary
from prune_opd_hf.teachers.adapter import AdapterBaseTeacher
from prune_opd_hf.teachers.base import unshared_ids
from prune_opd_hf.teachers.local import LocalTeacher
from prune_opd_hf.training.config import PruneOPDConfig

logger = logging.getLogger(__name__)

SMALL_LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Pair:
    """Student and teacher of a run, whose token ids mean the same; one object where the student, or its base, is the teacher.

    Attributes:
        tokenizer: the student's, with a padding token.
        teacher_tokenizer: the teacher's, where it is known.
        shared: the token ids that mean the same to both; None where the teacher's tokenizer is not known.
        student_name, teacher_name: what a published record may call them, an adapter by its base; None for a model that was
            loaded from nowhere.
    """

    student: Any
    teacher: Any
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None
    shared: SharedVocabulary | None
    student_name: str | None
    teacher_name: str | None


class Tokenizers(NamedTuple):
    """The tokenizers of a pair, the student's with a padding token, and the ids that mean the same to both; the teacher's is None
    where it is not known, and so are the ids."""

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase | None
    shared: SharedVocabulary | None


def load_tokenizers(
    student: Any,
    teacher: Any,
    args: PruneOPDConfig,
    tokenizer: Any,
    teacher_tokenizer: Any,
) -> Tokenizers:
    """Load the tokenizers beside what is given by name, and compare the vocabularies, before a model is loaded."""
    teacher = _teacher_of(teacher, args)
    for name, model in (("model_init_kwargs", student), ("teacher_model_init_kwargs", teacher)):
        if args.dictionary(name) and not isinstance(model, str):
            raise ConfigError(
                f"{name} has no effect on a model that is loaded already: give the model by name, or leave it out"
            )
    if isinstance(student, str) and tokenizer is None:
        tokenizer = load_tokenizer(student, "student", **args.dictionary("model_init_kwargs"))
    if tokenizer is None:
        raise ConfigError("processing_class is needed: the student's tokenizer")
    if isinstance(teacher, str) and teacher_tokenizer is None:
        teacher_tokenizer = load_tokenizer(teacher, "teacher", **args.dictionary("teacher_model_init_kwargs"))
    tokenizer, shared = as_tokenizer(tokenizer, "processing_class"), None
    if teacher_tokenizer is not None:
        teacher_tokenizer = as_tokenizer(teacher_tokenizer, "teacher_processing_class")
        allowed = args.allow_renamed_special_tokens
        shared = shared_vocabulary(tokenizer, teacher_tokenizer, allow_renamed_special_tokens=allowed)
    ensure_pad_token(tokenizer)
    return Tokenizers(tokenizer, teacher_tokenizer, shared)


def load_pair(
    student: Any, teacher: Any, args: PruneOPDConfig, tokenizers: Tokenizers, peft_config: Any = None
) -> Pair:
    """Load what is given by name.

    Where student and teacher are given by names that stand on one base, and the student trains an adapter alone, there is one copy
    of the base.
    """
    teacher = _teacher_of(teacher, args)
    student_name, teacher_name = published_name(student), published_name(teacher)
    own, theirs = args.dictionary("model_init_kwargs"), args.dictionary("teacher_model_init_kwargs")
    student, teacher = _load_models(student, teacher, own, theirs, peft_config)
    if is_adapted(student):
        student_name = published_name(base_causal_lm(student))
    tokenizer, teacher_tokenizer, shared = tokenizers
    if shared is not None and shared.renamed:
        shared = shared.with_shared(shared_end_tokens((student, tokenizer), (teacher, teacher_tokenizer)))
        logger.warning(shared.describe())
    return Pair(student, teacher, tokenizer, teacher_tokenizer, shared, student_name, teacher_name)


def _teacher_of(teacher: Any, args: PruneOPDConfig) -> Any:
    teacher = args.teacher_model_name_or_path if teacher is None else teacher
    if teacher is None:
        raise ConfigError("a teacher is needed: teacher_model, or teacher_model_name_or_path in the settings")
    return teacher


def _load_models(
    student: Any, teacher: Any, own: dict[str, Any], theirs: dict[str, Any], peft_config: Any
) -> tuple[Any, Any]:
    """Both models, the student ready to be trained; one object where the student, or the base below its adapter, is the teacher."""
    source = find_source(student, "student", **own) if isinstance(student, str) else None
    of_teacher = find_source(teacher, "teacher", **{"dtype": "auto", **theirs}) if isinstance(teacher, str) else None
    trains_adapter = peft_config is not None or (source is not None and source.adapter is not None)
    teaches_itself = teacher is student and of_teacher is None
    one_base = False
    if source is not None:
        # The weights below an adapter stay as they are, so rounding does them no harm.
        source = replace(source, arguments={"dtype": "auto" if trains_adapter else torch.float32, **source.arguments})
        one_base = (
            of_teacher is not None
            and trains_adapter
            and source.has_base_of(of_teacher)
            and theirs.get("dtype") in (None, source.arguments["dtype"])
            and getattr(peft_config, "bias", "none") == "none"
        )
        student = load_base(source, "student")
    refuse_other_caches(base_causal_lm(student), "student")
    if of_teacher is not None and one_base and of_teacher.adapter is None:
        teaches_itself = True
    elif of_teacher is not None:
        base = copy_with_shared_weights(student) if one_base else load_base(of_teacher, "teacher")
        teacher = add_adapter(base, of_teacher, "teacher")
    if source is not None:
        student = add_adapter(student, source, "student", trainable=True)
    if peft_config is not None:
        student = make_adapter(student, peft_config)
    ensure_trainable(student)
    # PEFT puts an adapter into the very model that it is made on, which is then no teacher of its own.
    teaches_itself |= is_adapted(student) and teacher is base_causal_lm(student)
    return student, student if teaches_itself else teacher


def freeze_unread_parts(student: nn.Module) -> None:
    """Take the gradient from parts of a multimodal student that text never goes through, such as a vision tower.

    They get none anyway, and processes that wait for it (DDP with gradient checkpointing) would stop.
    """
    model: Any = base_causal_lm(student)
    if text_config(model) is model.config:
        return
    read = {id(weight) for part in (model.get_decoder(), model.get_output_embeddings()) for weight in part.parameters()}
    frozen = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in read]
    for weight in frozen:
        weight.requires_grad_(False)
    if frozen:
        count = sum(weight.numel() for weight in frozen)
        logger.warning("%d weights of %s that text does not go through are not trained", count, type(model).__name__)


def make_teacher(pair: Pair, device: torch.device, top_k: int) -> LocalTeacher:
    """The teacher of a pair, frozen and ready to score; a student that teaches itself does so without its adapter.

    It goes to the device, unless its layers lie on several devices already.
    """
    if pair.teacher is pair.student:
        kind = AdapterBaseTeacher if hasattr(pair.student, "disable_adapter") else LocalTeacher
        teacher = kind(pair.student, top_k=top_k)
    else:
        pair.teacher.requires_grad_(False)
        if not hasattr(pair.teacher, "hf_device_map"):
            pair.teacher.to(device)
        teacher = LocalTeacher(pair.teacher, top_k=top_k)
    if pair.shared is not None:
        teacher.restrict_vocabulary(pair.shared.size, pair.shared.excluded_ids)
    return teacher


def settle_end_tokens(pair: Pair, student: nn.Module, teacher: LocalTeacher, args: PruneOPDConfig) -> EndTokens:
    """The tokens that end a response of this run. The student's generation config names them from now on, and can be saved.

    The teacher counts no token that the student does not know from now on.
    """
    teacher.restrict_vocabulary(_rows(student))
    end_tokens = find_end_tokens(
        student,
        pair.tokenizer,
        role="student",
        teacher_ids=teacher.special_token_ids("eos_token_id"),
        teacher_tokenizer=pair.teacher_tokenizer,
        shared=teacher.vocab_size,
        excluded=teacher.excluded_ids,
        given=args.eos_token_id,
    )
    config: Any = base_causal_lm(student).generation_config
    reset = make_savable(config)
    if reset:
        named = ", ".join(f"{name}={value!r}" for name, value in reset.items())
        logger.warning(
            "%s in the student's generation config has no effect beside its other settings, and Transformers would not save it: it "
            "was reset",
            named,
        )
    config.eos_token_id = list(end_tokens.token_ids)
    return end_tokens


def samplings(
    pair: Pair, student: nn.Module, teacher: LocalTeacher, end_tokens: EndTokens, args: PruneOPDConfig
) -> tuple[Sampling, Sampling]:
    """How rollouts are sampled, and how the answers of an evaluation: as the settings say, and never a token that the teacher does
    not know."""
    further = args.dictionary("generation_kwargs")
    stopping = {}
    if further.get("stop_strings"):
        stopping = {"stop_strings": further["stop_strings"], "tokenizer": pair.tokenizer}
    penalties = {"min_p": args.min_p, "repetition_penalty": float(args.repetition_penalty)}
    rollouts = Sampling(
        max_completion_length=args.max_completion_length,
        eos_token_ids=end_tokens.token_ids,
        pad_token_id=pair.tokenizer.pad_token_id,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        suppress_tokens=unshared_ids(teacher, _rows(student)),
        generation_kwargs={**penalties, **further, **stopping},
    )
    evaluation = replace(
        rollouts,
        max_completion_length=args.eval_max_completion_length or args.max_completion_length,
        temperature=args.eval_temperature,
        top_p=args.eval_top_p,
        top_k=args.eval_top_k,
        generation_kwargs=stopping,
    )
    return rollouts, evaluation


def make_monitor(
    args: PruneOPDConfig,
    student: nn.Module,
    teacher: LocalTeacher,
    engine: RolloutEngine,
    sampling: Sampling,
    check_every: int,
    truncate: bool,
) -> DriftMonitor:
    """The watch over what this engine samples in this way."""
    return DriftMonitor(
        teacher,
        args.drift_config(),
        check_every=check_every,
        truncate=truncate,
        eos_token_id=sampling.eos_token_ids,
        pad_token_id=sampling.pad_token_id,
        student=None if engine.delivers_candidates else student,
    )


def _rows(student: nn.Module) -> int:
    return base_causal_lm(student).get_output_embeddings().weight.shape[0]


def check_contexts(student: nn.Module, teacher: LocalTeacher, dataset: Any, args: PruneOPDConfig) -> None:
    """Refuse responses too long for either model's context. Where only the longest prompts would go beyond, a line in the log."""
    longest_prompt = args.max_prompt_length or 1
    if isinstance(dataset, Dataset):
        longest_prompt = max(len(ids) for ids in dataset["input_ids"])
    caps = {name: getattr(args, name) for name in ("max_completion_length", "eval_max_completion_length")}
    contexts = {"student": context_length(student), "teacher": teacher.context_length}
    for (role, context), (name, cap) in product(contexts.items(), caps.items()):
        if cap is None:
            continue
        check_context(context, 1, cap, role=role, setting=name)
        try:
            check_context(context, longest_prompt, cap, role=role, setting=name)
        except ConfigError as error:
            logger.warning("a long response to a long prompt will stop the run: %s", error)
    for role, switch in (("student", rotary_switch(student)), ("teacher", teacher.rotary_switch)):
        message = describe_rotary_switch(switch, longest_prompt + args.max_completion_length, role=role)
        if message is not None:
            logger.warning("%s", message)


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
