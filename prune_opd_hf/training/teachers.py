"""Who teaches in a run: a model by name or as an object, vLLM servers, several of them by name, or the student itself.

What the caller and the settings ask for is found here before anything is loaded, servers are asked whether they are there, and what
a row may say of its teacher (`teacher_prompt`, `teacher`) becomes token ids and names. It does not load models; `pair.py` does.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.models.compatibility import check_context
from prune_opd_hf.models.loading import known_context
from prune_opd_hf.models.prompts import PromptEncoder, messages_of
from prune_opd_hf.tasks import resolve_embedded
from prune_opd_hf.teachers.adapter import AdapterBaseTeacher
from prune_opd_hf.teachers.base import Teacher, TeacherContext
from prune_opd_hf.teachers.served import KEY_VARIABLE, ServedTeacher
from prune_opd_hf.training.config import PruneOPDConfig

PROMPT_COLUMN = "prompt"
TEACHER_PROMPT_COLUMN, TEACHER_COLUMN = "teacher_prompt", "teacher"
TEACHER_IDS, TEACHER_MASK, TEACHER_INDEX = "teacher_input_ids", "teacher_attention_mask", "teacher_index"
"""Columns made of them."""

AVERAGE_FILE = "teacher_average.safetensors"

ITSELF = object()
"""Stands for a teacher that is made of the student (`teacher_model_kind`)."""


def asked_teachers(teacher: Any, args: PruneOPDConfig) -> dict[str, Any]:
    """What was asked for, by name: a Hub id or folder, a model, a `Teacher`, or `ITSELF`. An only teacher has the name "".

    Raises:
        ConfigError: nothing, or two ways at once.
        ServingError: servers that are not there, or cannot score.
    """
    given = ("teacher_models", "teacher_model_server_url", "teacher_model_kind", "teacher_model_name_or_path")
    chosen = ["teacher_model"] * (teacher is not None) + [name for name in given if getattr(args, name)]
    # A name stands for the tokenizer beside a URL, and may say where an object was loaded from.
    if len(chosen) > 1 and chosen not in (
        ["teacher_model_server_url", "teacher_model_name_or_path"],
        ["teacher_model", "teacher_model_name_or_path"],
    ):
        raise ConfigError(
            f"{' and '.join(chosen)} contradict each other: a run has one of them (teacher_models names several)"
        )
    if args.teacher_models:
        teacher = args.dictionary("teacher_models")
    if args.teacher_model_kind is not None:
        return {"": ITSELF}
    if args.teacher_model_server_url:
        return {"": served_teacher(args.teacher_model_server_url, args)}
    if isinstance(teacher, Mapping):
        if not teacher:
            raise ConfigError("teacher_models names no teacher")
        by_name, urls = {str(name): one for name, one in teacher.items()}, ("http://", "https://")
        served = {name: one for name, one in by_name.items() if isinstance(one, str) and one.startswith(urls)}
        refuse_shared_keys(served)
        return by_name | {name: served_teacher(url, args, name) for name, url in served.items()}
    teacher = args.teacher_model_name_or_path if teacher is None else teacher
    if teacher is None:
        raise ConfigError(
            "a teacher is needed: teacher_model, or teacher_model_name_or_path, teacher_model_server_url, teacher_models or "
            "teacher_model_kind in the settings"
        )
    return {"": teacher}


def served_teacher(url: str, args: PruneOPDConfig, name: str = "") -> ServedTeacher:
    top_k, timeout = max(args.drift_top_k, args.loss_top_k), args.teacher_model_server_timeout
    return ServedTeacher(url, top_k=top_k, timeout=timeout, key_variable=key_variable(name))


def key_variable(name: str) -> str:
    """The environment variable with the API key of a teacher's servers: each of several teachers has its own.

    Example:
        >>> key_variable(""), key_variable("maths-32b")
        ('TEACHER_VLLM_API_KEY', 'TEACHER_VLLM_API_KEY_MATHS_32B')
    """
    return f"{KEY_VARIABLE}_{re.sub('[^A-Za-z0-9]', '_', name).upper()}" if name else KEY_VARIABLE


def refuse_shared_keys(names: Iterable[str]) -> None:
    """Refuse served teachers whose names are so alike that one's key would go to the other."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(key_variable(name), name)
        if other != name:
            raise ConfigError(
                f"the teachers {other!r} and {name!r} would share the key in {key_variable(name)}: rename one"
            )


# ---------------------------------------------------------------------- what rows say of their teacher


@dataclass(frozen=True)
class TeacherColumns:
    """Makes what the teacher of a row is given, from the row, and says where the row leaves no room for a response.

    Args:
        encode: makes the token ids of a prompt, by the teacher's name: with the chat template of its tokenizer where that is known.
        names: of the teachers; "" alone where there is one.
        contexts: tokens that each teacher reads at most, where that is known, by name.
        student_context: likewise.
        cap: on responses, after the name of its setting.
        template: text over the row's columns in braces, in place of a column `teacher_prompt`.
    """

    encode: Mapping[str, PromptEncoder]
    names: tuple[str, ...]
    contexts: Mapping[str, int | None]
    student_context: int | None
    cap: tuple[str, int]
    template: str | None = None

    @classmethod
    def of(cls, args: PruneOPDConfig, teachers: Mapping[str, Any], student: Any, tokenizers: Any) -> "TeacherColumns":
        """As the settings say, before a model is loaded; the student's tokenizer stands for a teacher's that is not known."""
        own = {name: tokenizer or tokenizers.student for name, tokenizer in tokenizers.teachers.items()}
        encode = {name: prompt_encoder(tokenizer, args) for name, tokenizer in own.items()}
        contexts = {name: context_of(teacher, student, args) for name, teacher in teachers.items()}
        student_context = context_of(ITSELF, student, args)
        for name in ("max_completion_length", "eval_max_completion_length"):
            for role, context in (("student", student_context), *(("teacher", one) for one in contexts.values())):
                check_context(context, 1, getattr(args, name) or 0, role=role, setting=name)
        cap = "max_completion_length", args.max_completion_length
        return cls(encode, tuple(teachers), contexts, student_context, cap, args.teacher_prompt_template)

    def for_evaluation(self, args: PruneOPDConfig) -> "TeacherColumns":
        """The same for prompts whose answers have a cap of their own."""
        cap = args.eval_max_completion_length
        return self if cap is None else replace(self, cap=("eval_max_completion_length", cap))

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The columns `teacher_input_ids` and `teacher_index`, as far as this row, or the template, asks for them.

        Raises:
            InputError: a name that no teacher has, a prompt that cannot be used, or a column of the template that is not there.
        """
        found: dict[str, Any] = {}
        name = ""
        if self.names != ("",):
            name = str(row.get(TEACHER_COLUMN))
            if name not in self.names:
                raise InputError(
                    f"row {number} has {row.get(TEACHER_COLUMN)!r} in column {TEACHER_COLUMN!r}; there are {', '.join(self.names)}"
                )
            found[TEACHER_INDEX] = self.names.index(name)
        prompt = self._filled(row, number) if self.template is not None else row.get(TEACHER_PROMPT_COLUMN)
        if prompt is not None:
            found[TEACHER_IDS] = self.encode[name](prompt, f"the teacher's prompt in row {number}")
        elif TEACHER_PROMPT_COLUMN in row:
            raise InputError(
                f"row {number} has nothing in its column {TEACHER_PROMPT_COLUMN!r}: repeat the prompt there if the teacher reads "
                "no other"
            )
        return found

    def length_fault(self, prompt: Sequence[int], found: Mapping[str, Any], number: int) -> str | None:
        """Why a row leaves too little room for a response: its prompt in the student's context, or in its teacher's, which may read
        a prompt of its own among what was found in the row."""
        setting, cap = self.cap
        of_teacher, own = self.contexts[self.names[found.get(TEACHER_INDEX, 0)]], found.get(TEACHER_IDS)
        for role, context, ids in (("student", self.student_context, prompt), ("teacher", of_teacher, own or prompt)):
            if context is None or len(ids) + cap <= context:
                continue
            whose, leaves_out = (
                ("the teacher's", "") if ids is own else ("the", f" (max_prompt_length {context - cap} does)")
            )
            lower = f", or lower {setting} to {context - len(ids)}" if len(ids) < context else ""
            return (
                f"{whose} prompt in row {number} has {len(ids)} tokens, and with {setting} {cap} that is above the {role}'s "
                f"context of {context}: shorten it, or leave the row out{leaves_out}{lower}"
            )
        return None

    def _filled(self, row: Mapping[str, Any], number: int) -> Any:
        """The template with the row's columns; of a conversation its last user's message becomes it."""
        assert self.template is not None
        prompt, values = row[PROMPT_COLUMN], dict(row)
        messages = None if isinstance(prompt, str) else messages_of(prompt)
        user = None if messages is None else next((one for one in reversed(messages) if one["role"] == "user"), None)
        if messages is not None:
            values[PROMPT_COLUMN] = "" if user is None else user["content"]
        try:
            text = self.template.format(**values)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            columns = ", ".join(row)
            raise InputError(
                f"teacher_prompt_template cannot be filled from row {number} ({type(error).__name__}: {error}); it has the columns "
                f"{columns}, and a brace that is meant as such is written twice"
            ) from error
        if messages is None:
            return text
        if user is None:
            raise InputError(f"teacher_prompt_template needs a message of the user, and row {number} has none")
        return [{**one, "content": text} if one is user else one for one in messages]


def context_of(teacher: Any, student: Any, args: PruneOPDConfig) -> int | None:
    """Tokens that a teacher reads at most, where that is known before it is loaded."""
    if isinstance(teacher, Teacher):
        return teacher.context_length
    if teacher is ITSELF:
        return known_context(student, "student", **args.dictionary("model_init_kwargs"))
    return known_context(
        resolve_embedded(teacher, "teacher"), "teacher", **args.dictionary("teacher_model_init_kwargs")
    )


def prompt_encoder(tokenizer: Any, args: PruneOPDConfig) -> PromptEncoder:
    """How the settings of a run make token ids of prompts."""
    return PromptEncoder(tokenizer, args.dictionary("chat_template_kwargs"), args.final_assistant_message)


def contexts_of(rows: Iterable[Mapping[str, Any]], teacher: Teacher) -> list[TeacherContext]:
    """What the teachers of these rows are given; nothing where no row says anything."""
    found, names = [], tuple(getattr(teacher, "teachers", ()))
    for row in rows:
        ids, index = row.get(TEACHER_IDS), row.get(TEACHER_INDEX)
        found.append(TeacherContext(None if ids is None else tuple(ids), None if index is None else names[int(index)]))
    return found if any(one != TeacherContext() for one in found) else []


# ---------------------------------------------------------------------- the student as its own teacher


def describe_teachers(
    teacher: Teacher,
    asked: Mapping[str, Any],
    models: Mapping[str, str | None],
    args: PruneOPDConfig,
    prompts: Any,
) -> list[dict[str, Any]]:
    """Each teacher as a record names it: model, revision of one that was loaded by name, where it runs, what it reads.

    Args:
        asked: as of `asked_teachers`.
        models: what a record may call them, by name; "" is the name of an only one.
        prompts: to train on.
    """
    columns = getattr(prompts, "column_names", None) or ()
    own = "a prompt of its own (column teacher_prompt)" if TEACHER_IDS in columns else "the student's prompt"
    read = own if args.teacher_prompt_template is None else f"the template {args.teacher_prompt_template!r}"
    parts = getattr(teacher, "teachers", {"": teacher})
    revision = args.dictionary("teacher_model_init_kwargs").get("revision")
    loaded = {name: revision for name, one in asked.items() if isinstance(one, str)}
    return [
        {
            "name": name or None,
            "model": models.get(name),
            "revision": loaded.get(name),
            "where": where_it_runs(one, args),
            "read": read,
        }
        for name, one in parts.items()
    ]


def where_it_runs(teacher: Any, args: PruneOPDConfig) -> str:
    if isinstance(teacher, ServedTeacher):
        return "on vLLM servers"
    if args.teacher_model_kind == "ema":
        return f"the student itself, a moving average of its weights (rate {args.teacher_update_rate:g})"
    if args.teacher_model_kind is not None:
        return f"the student itself, {'as it was' if args.teacher_model_kind == 'base' else 'as it is'}"
    if isinstance(teacher, AdapterBaseTeacher):
        return "in the trainer's process, below the student's adapter"
    method = getattr(getattr(getattr(teacher, "model", None), "config", None), "quantization_config", None)
    kept = ", offloaded between the phases" if args.offload_teacher else ", quantized" if method else ""
    return f"in the trainer's process{'es, sharded' if args.shard_teacher else kept}"


class MovingAverage(TrainerCallback):
    """A teacher's weights that follow the student's: after every `sync_steps` steps  w <- (1 - rate) w + rate w_student.

    Args:
        teacher: a frozen copy of the student.
        student: whose trained weights are followed.
        rate, sync_steps: TRL's `teacher_update_rate` and `teacher_sync_steps`.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, rate: float, sync_steps: int) -> None:
        theirs = dict(teacher.named_parameters())
        self._pairs = {
            name: (theirs[name], weight) for name, weight in student.named_parameters() if weight.requires_grad
        }
        self.rate, self.sync_steps = rate, sync_steps

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.sync_steps == 0:
            for teacher, student in self._pairs.values():
                teacher.lerp_(student.to(teacher), self.rate)

    def save(self, folder: str) -> None:
        save_file(
            {name: teacher.detach() for name, (teacher, _) in self._pairs.items()}, os.path.join(folder, AVERAGE_FILE)
        )

    @torch.no_grad()
    def load(self, folder: str) -> None:
        state = load_file(os.path.join(folder, AVERAGE_FILE))
        for name, (teacher, _) in self._pairs.items():
            teacher.copy_(state[name])


def refuse_sharded_self(pair: Any, args: PruneOPDConfig, *, fsdp: bool, deepspeed: bool) -> None:
    """Refuse a teacher that is made of the student's weights, of which a process has a part alone."""
    if pair.average is not None and (fsdp or deepspeed or args.shard_teacher):
        raise ConfigError(
            "teacher_model_kind='ema' needs the student's whole weights in each process: train without FSDP and DeepSpeed, or "
            "set teacher_model_kind='base'"
        )
    if fsdp and any(teacher is pair.student for teacher in pair.teachers.values()):
        raise ConfigError(
            "the teacher is the student itself, or the base below its adapter, whose weights FSDP shards: train without FSDP, or "
            "give the teacher weights of its own"
        )


def tokenizer_by_name(given: Any, names: Iterable[str]) -> dict[str, Any]:
    """`teacher_processing_class` by the teacher's name; one for all stands for each."""
    names = list(names)
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    unknown = next((name for name in given if name not in names or not name), None)
    if unknown is not None:
        known = "there are " + ", ".join(names) if names != [""] else "there is one teacher: give its tokenizer alone"
        raise ConfigError(f"teacher_processing_class names the teacher {unknown!r}; {known}")
    return {name: given.get(name) for name in names}
