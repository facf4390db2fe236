"""The pair of a run: student and teacher, loaded where they are given by name, and found to have one vocabulary.

Every check here is made before any work is spent; each names what it found and the remedy.
"""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.generation import DriftMonitor, RolloutEngine, Sampling
from prune_opd_hf.models.compatibility import (
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
    load_causal_lm,
    load_tokenizer,
    make_adapter,
    published_name,
    quantized,
)
from prune_opd_hf.models.vocabulary import SharedVocabulary, shared_vocabulary
from prune_opd_hf.tasks import resolve_embedded
from prune_opd_hf.teachers.adapter import AdapterBaseTeacher
from prune_opd_hf.teachers.base import Teacher, unshared_ids
from prune_opd_hf.teachers.local import LocalTeacher
from prune_opd_hf.teachers.offloaded import OffloadedTeacher
from prune_opd_hf.teachers.served import ServedTeacher
from prune_opd_hf.teachers.several import SeveralTeachers
from prune_opd_hf.teachers.sharded import shard_layers_inplace
from prune_opd_hf.training.config import PruneOPDConfig
from prune_opd_hf.training.teachers import ITSELF, TEACHER_IDS, MovingAverage

logger = logging.getLogger(__name__)

SMALL_LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Pair:
    """Student and teachers of a run, whose token ids mean the same.

    Attributes:
        teachers: models, or `Teacher`s, by name; "" is the name of an only one, which is the student where that, or its base,
            teaches.
        tokenizers: theirs.
        shared: the token ids that mean the same to the student and each teacher, by name, as far as its tokenizer is known.
        student_name, teacher_names: what a published record may call them, an adapter by its base; None for a model that was
            loaded from nowhere.
        average: keeps the teacher's weights behind the student's, where it does.
    """

    student: Any
    teachers: Mapping[str, Any]
    tokenizers: "Tokenizers"
    shared: Mapping[str, SharedVocabulary]
    student_name: str | None
    teacher_names: Mapping[str, str | None]
    average: MovingAverage | None = None


class Tokenizers(NamedTuple):
    """The tokenizers of a pair: the student's with a padding token, the teachers' by name, None where one is not known; and the ids
    that mean the same to both, where it is known."""

    student: PreTrainedTokenizerBase
    teachers: dict[str, Any]
    shared: dict[str, SharedVocabulary]


def load_tokenizers(
    student: Any,
    teachers: Mapping[str, Any],
    args: PruneOPDConfig,
    tokenizer: Any,
    teacher_tokenizers: Mapping[str, Any],
) -> Tokenizers:
    """Load the tokenizers beside what is given by name, and compare the vocabularies, before a model is loaded. Teachers are by
    name (`asked_teachers`), and so are the tokenizers that were given for them."""
    by_name = any(isinstance(teacher, str) for teacher in teachers.values() if teacher is not ITSELF)
    loaded = {
        "model_init_kwargs": not isinstance(student, str),
        "teacher_model_init_kwargs": not by_name and not args.teacher_model_server_url,
        "teacher_quantization_config": not by_name,
    }
    for name, has_no_effect in loaded.items():
        if args.dictionary(name) and has_no_effect:
            raise ConfigError(
                f"{name} has no effect on a model that is loaded already: give the model by name, or leave it out"
            )
    if isinstance(student, str) and tokenizer is None:
        tokenizer = load_tokenizer(student, "student", **args.dictionary("model_init_kwargs"))
    if tokenizer is None:
        raise ConfigError("processing_class is needed: the student's tokenizer")
    tokenizer = as_tokenizer(tokenizer, "processing_class")
    theirs: dict[str, Any] = {}
    for key, teacher in teachers.items():
        where = args.teacher_model_name_or_path if args.teacher_model_server_url else teacher
        where = resolve_embedded(where, "teacher")
        theirs[key] = tokenizer if teacher is ITSELF else teacher_tokenizers.get(key)
        if theirs[key] is None and isinstance(where, str):
            theirs[key] = load_tokenizer(where, "teacher", **args.dictionary("teacher_model_init_kwargs"))
        if theirs[key] is not None:
            theirs[key] = as_tokenizer(theirs[key], "teacher_processing_class")
        elif isinstance(teacher, ServedTeacher):
            logger.warning(
                "the tokenizer of %s on vLLM servers is not known, so it was not compared with the student's: give %s",
                f"the teacher {key!r}" if key else "the teacher",
                f"teacher_processing_class={{{key!r}: ...}}" if key else "teacher_model_name_or_path",
            )
    allowed = {"allow_renamed_special_tokens": args.allow_renamed_special_tokens}
    known = {key: one for key, one in theirs.items() if one is not None}
    shared = {key: shared_vocabulary(tokenizer, one, **allowed) for key, one in known.items()}
    ensure_pad_token(tokenizer)
    return Tokenizers(tokenizer, theirs, shared)


def load_pair(
    student: Any, teachers: Mapping[str, Any], args: PruneOPDConfig, tokenizers: Tokenizers, peft_config: Any = None
) -> Pair:
    """Load what is given by name.

    Where student and teacher are given by names that stand on one base, and the student trains an adapter alone, there is one copy
    of the base.
    """
    student_name, names = published_name(student), {key: _published(teacher, args) for key, teacher in teachers.items()}
    teachers = {key: resolve_embedded(teacher, "teacher") for key, teacher in teachers.items()}
    only = next(iter(teachers.values())) if len(teachers) == 1 else None
    own, theirs = args.dictionary("model_init_kwargs"), args.dictionary("teacher_model_init_kwargs")
    if isinstance(settings := own.get("quantization_config"), dict):
        own = quantized({**own, "quantization_config": None}, settings, args.device)
    if args.teacher_quantization_config:
        theirs = quantized(theirs, args.dictionary("teacher_quantization_config"), args.device)
    student, teacher = _load_models(student, None if only is ITSELF else only, own, theirs, peft_config)
    if is_adapted(student):
        student_name = published_name(base_causal_lm(student))
    average = None
    if only is ITSELF:
        names, kind, teacher = {"": student_name}, args.teacher_model_kind, student
        if kind == "ema" or (kind == "base" and not is_adapted(student)):  # the base below an adapter is there
            teacher = copy_with_shared_weights(student, copies_trained=True).requires_grad_(False)
        if kind == "ema":
            average = MovingAverage(teacher, student, args.teacher_update_rate, args.teacher_sync_steps)
    loaded = dict.fromkeys(teachers, teacher)
    if only is None:
        how = {"dtype": "auto", **theirs}
        named = {key: load_causal_lm(one, "teacher", **how) for key, one in teachers.items() if isinstance(one, str)}
        loaded = {**teachers, **named}
    # PEFT puts an adapter into the very model that it is made on, which is then no teacher of its own.
    loaded = {key: student if one is base_causal_lm(student) else one for key, one in loaded.items()}
    shared = dict(tokenizers.shared)
    for key, one in tokenizers.shared.items():
        if one.renamed:
            ends = shared_end_tokens((student, tokenizers.student), (loaded[key], tokenizers.teachers[key]))
            shared[key] = one.with_shared(ends)
            logger.warning(shared[key].describe())
    return Pair(student, loaded, tokenizers, shared, student_name, names, average)


def _published(teacher: Any, args: PruneOPDConfig) -> str | None:
    """What a record may call a teacher; one on servers as they call it, or as the settings do."""
    if isinstance(teacher, ServedTeacher):
        return published_name((args.teacher_model_server_url and args.teacher_model_name_or_path) or teacher.name)
    return published_name(teacher) if isinstance(teacher, str | nn.Module) else type(teacher).__name__


def _load_models(
    student: Any, teacher: Any, own: dict[str, Any], theirs: dict[str, Any], peft_config: Any
) -> tuple[Any, Any]:
    """Both models, the student ready to be trained; one object where the student, or the base below its adapter, is the teacher."""
    source = find_source(student, "student", **own) if isinstance(student, str) else None
    of_teacher = find_source(teacher, "teacher", **{"dtype": "auto", **theirs}) if isinstance(teacher, str) else None
    trains_adapter = peft_config is not None or (source is not None and source.adapter is not None)
    teaches_itself = one_base = False
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


def make_teacher(pair: Pair, device: torch.device, args: PruneOPDConfig) -> Teacher:
    """The teacher of a pair, frozen and ready to score: one, or several as one."""
    loaded = [teacher for teacher in pair.teachers.values() if isinstance(teacher, nn.Module)]
    for name in ("offload_teacher", "shard_teacher"):
        if getattr(args, name) and not loaded:
            raise ConfigError(f"{name} is for a teacher that is loaded here, and none is: leave it out")
    if args.shard_teacher and len(loaded) > 1:
        raise ConfigError(
            "shard_teacher is for one teacher: with several, processes would wait for layers of different ones"
        )
    made = {key: _ready(teacher, pair, device, args) for key, teacher in pair.teachers.items()}
    for key, shared in pair.shared.items():
        made[key].restrict_vocabulary(shared.size, shared.excluded_ids)
    return made[""] if [*made] == [""] else SeveralTeachers(made)


def _ready(model: Any, pair: Pair, device: torch.device, args: PruneOPDConfig) -> Teacher:
    """A model as a teacher; one that is the student scores without its adapter, unless it is asked to teach as it is.

    It goes to the device, unless its layers lie on several devices already.
    """
    if not isinstance(model, nn.Module):
        return model
    top_k = max(args.drift_top_k, args.loss_top_k)
    moves = [name for name in ("offload_teacher", "shard_teacher") if getattr(args, name)]
    if moves and not {*map(id, pair.student.parameters())}.isdisjoint(map(id, model.parameters())):
        raise ConfigError(
            f"{moves[0]} would move weights that the teacher shares with the student: leave it out, they are there once"
        )
    if model is pair.student:
        without_adapter = hasattr(model, "disable_adapter") and args.teacher_model_kind != "live"
        return (AdapterBaseTeacher if without_adapter else LocalTeacher)(model, top_k=top_k)
    model.requires_grad_(False)
    is_placed = hasattr(model, "hf_device_map") or getattr(model, "is_quantized", False)
    if moves and is_placed:
        raise ConfigError(f"{moves[0]} moves whole models: leave out the teacher's device_map, or its quantization")
    if args.offload_teacher:
        return OffloadedTeacher(model, device, top_k=top_k)
    if args.shard_teacher:
        shard_layers_inplace(model, device)
    return LocalTeacher(model if is_placed else model.to(device), top_k=top_k)


def settle_end_tokens(pair: Pair, student: nn.Module, teacher: Teacher, args: PruneOPDConfig) -> EndTokens:
    """The tokens that end a response of this run. The student's generation config names them from now on, and can be saved.

    The teacher counts no token that the student does not know from now on.
    """
    teacher.restrict_vocabulary(_rows(student))
    end_tokens = find_end_tokens(
        student,
        pair.tokenizers.student,
        role="student",
        teacher_ids=teacher.special_token_ids("eos_token_id"),
        teacher_tokenizers=pair.tokenizers.teachers.values(),
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
    pair: Pair, student: nn.Module, teacher: Teacher, end_tokens: EndTokens, args: PruneOPDConfig
) -> tuple[Sampling, Sampling]:
    """How rollouts are sampled, and how the answers of an evaluation: as the settings say, and never a token that the teacher does
    not know."""
    further = args.dictionary("generation_kwargs")
    stopping = {}
    if further.get("stop_strings"):
        stopping = {"stop_strings": further["stop_strings"], "tokenizer": pair.tokenizers.student}
    penalties = {"min_p": args.min_p, "repetition_penalty": float(args.repetition_penalty)}
    rollouts = Sampling(
        max_completion_length=args.max_completion_length,
        eos_token_ids=end_tokens.token_ids,
        pad_token_id=pair.tokenizers.student.pad_token_id,
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
    teacher: Teacher,
    engine: RolloutEngine,
    sampling: Sampling,
    check_every: int,
    truncate: bool,
) -> DriftMonitor:
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


def warn_of_rotary_switch(student: nn.Module, teacher: Teacher, dataset: Any, args: PruneOPDConfig) -> None:
    """Log where the longest sequences make a model change its rotary embedding."""
    read = TEACHER_IDS if TEACHER_IDS in (getattr(dataset, "column_names", None) or ()) else "input_ids"
    switches = {"student": (rotary_switch(student), "input_ids"), "teacher": (teacher.rotary_switch, read)}
    for role, (switch, column) in switches.items():
        is_known = switch is not None and isinstance(dataset, Dataset)
        longest = max(map(len, dataset[column])) if is_known else args.max_prompt_length or 1
        message = describe_rotary_switch(switch, longest + args.max_completion_length, role=role)
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
