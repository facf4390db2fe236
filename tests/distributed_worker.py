"""One of two processes; run by test_training_distributed.py. What each finds it writes down.

FSDP2 is prepared by Accelerate itself, which refuses to start it on a CPU: `on_cpus_too` is all that is changed about that.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState
from datasets import Dataset
from tiny_models import tiny_model
from torch import Tensor
from trainer_helpers import make_trainer, settings
from transformers import AutoModelForCausalLM, PreTrainedModel

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.tasks import ChainTask, load_student, load_teacher, load_tokenizer
from prune_opd_hf.training import PruneOPDTrainer

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@contextmanager
def fsdp2() -> Iterator[None]:
    """Trainers made inside shard their students."""
    original = AcceleratorState.__init__

    def on_cpus_too(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState._reset_state()
    AcceleratorState.__init__ = on_cpus_too
    os.environ.update(FSDP2)
    try:
        yield
    finally:
        AcceleratorState.__init__ = original
        for name in FSDP2:
            del os.environ[name]
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


def weights(trainer: PruneOPDTrainer) -> dict[str, Tensor]:
    """By name, whole, and no longer those that are trained."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        name: (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().clone()
        for name, weight in model.named_parameters()
    }


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def student_of(*, tied: bool) -> PreTrainedModel:
    config = load_student().config
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def stream(folder: Path) -> dict:
    """Two steps on a stream whose prompts differ in length."""
    prompts = [ChainTask(operations=1 + index % 5).problems(1, seed=index)[0].prompt for index in range(8)]
    args = settings(folder, max_steps=2, per_device_train_batch_size=1, num_generations=1)
    data = Dataset.from_dict({"prompt": prompts}).to_iterable_dataset()
    trainer = PruneOPDTrainer(load_student(), load_teacher(), args, data, processing_class=load_tokenizer())
    answered, generate = [], trainer.generate_rollouts

    def note(*batches):
        rollouts = generate(*batches)
        answered.extend(
            ids[mask.bool()].tolist() for ids, mask in zip(rollouts.prompt_ids, rollouts.prompt_mask, strict=True)
        )
        return rollouts

    trainer.generate_rollouts = note
    trainer.train()
    return {"prompts": [trainer.processing_class(prompt).input_ids for prompt in prompts], "answered": answered}


def vision(folder: Path) -> dict:
    """Two steps of a student with a vision tower, with gradient checkpointing."""
    student = tiny_model("gemma3_vision", 1, vocab_size=64, eos=2)
    before = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    trainer = make_trainer(folder, student=student, max_steps=2, gradient_checkpointing=True)
    trainer.train()
    after = weights(trainer)
    sums = torch.stack([weight.double().sum() for weight in after.values()])
    others = [torch.empty_like(sums) for _ in range(2)]
    dist.all_gather(others, sums)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    return {"moved": moved, "all": list(before), "equal": bool(torch.equal(*others))}


def packed(folder: Path) -> dict:
    """One step where one process has five times the tokens of the other: micro-batches of rows under DDP, and of tokens under DDP
    and FSDP2. Then two updates of each batch, and a run that goes on between them."""
    length = (3, 15)[dist.get_rank()]
    changes = {"pruning": "fixed", "pruning_length": length, "max_completion_length": 15, "max_steps": 1}
    changes |= {"optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.0}

    def train(name: str, limit: int | None, resumed: str | None = None, **more: Any) -> tuple[PruneOPDTrainer, int]:
        trainer, passes = make_trainer(folder / name, max_tokens_per_micro_batch=limit, **{**changes, **more}), []
        trainer.model.register_forward_pre_hook(lambda module, _: passes.append(1) if module.training else None)
        trainer.train(resumed)
        return trainer, len(passes)

    found: dict[str, Any] = {"passes": [], "distances": []}
    for loss in ("topk_policy_gradient", "reverse_kl"):
        by_rows, _ = train(f"{loss}/rows", None, loss_type=loss)
        found["tokens"] = int(by_rows.step.rollouts.lengths.sum())
        for name, context in (("ddp", nullcontext()), ("fsdp2", fsdp2())):
            with context:
                by_tokens, passes = train(f"{loss}/{name}", 60, loss_type=loss)
                found["passes"].append(passes)
                found["distances"].append(distance(weights(by_rows), weights(by_tokens)))
    changes |= {"pruning": "drift", "pruning_length": None}  # a checkpoint has the settings of the first process
    several = {"num_iterations": 2, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole, _ = train("several", 60, **several)
    went_on, _ = train("several", 60, str(folder / "several" / "run" / "checkpoint-1"), **several)
    return found | {"resumed": distance(weights(whole), weights(went_on))}


def sharded(folder: Path) -> dict:
    """Two steps under FSDP2 and under DDP; a run that goes on from a checkpoint; the saved student."""
    found = {}
    for tied in (True, False):
        place, settings = folder / str(tied), {"max_steps": 2, "learning_rate": 1e-2}
        whole = make_trainer(place / "ddp", student=student_of(tied=tied), **settings)
        whole.train()
        with fsdp2():
            trainer = make_trainer(
                place, student=student_of(tied=tied), save_strategy="steps", save_steps=1, **settings
            )
            trainer.train()
            trained = weights(trainer)
            trainer.save_model()
            resumed = make_trainer(
                place, student=student_of(tied=tied), save_strategy="steps", save_steps=1, **settings
            )
            resumed.train(resume_from_checkpoint=str(place / "run" / "checkpoint-1"))
            went_on = weights(resumed)
        dist.barrier()
        loaded = AutoModelForCausalLM.from_pretrained(place / "run")
        head, embeddings = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
        found[str(tied)] = {
            "sharded": trainer.is_fsdp_enabled and "DTensor" in {type(p).__name__ for p in trainer.model.parameters()},
            "from_ddp": distance(trained, weights(whole)),
            "moved": distance(trained, dict(student_of(tied=tied).named_parameters())),
            "resumed": distance(went_on, trained),
            "loaded": distance(dict(loaded.named_parameters()), trained),
            "loaded_tied": head is embeddings,
            "bytes": (place / "run" / "model.safetensors").stat().st_size,
            "needed": sum(weight.numel() * weight.element_size() for weight in trained.values()),
        }
    return found


def taught(folder: Path) -> dict:
    """Two steps with a teacher whose layers are shared by the processes, against one that each has whole: with drift, and where one
    process has five times the tokens of the other. An evaluation of three rows by two processes."""
    common = {"max_completion_length": 15, "max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.0}
    fixed = {"pruning": "fixed", "pruning_length": (3, 15)[dist.get_rank()]}
    found = {}
    for loss, how in (("topk_policy_gradient", {}), ("reverse_kl", fixed)):
        changes = {**common, **how}
        whole = make_trainer(folder / loss, loss_type=loss, **changes)
        expected = whole.evaluate(whole.eval_dataset.select(range(3)))["eval_kl"]
        whole.train()
        for student, context in (("ddp", nullcontext()), ("fsdp2", fsdp2())):
            with context:
                trainer = make_trainer(folder / student / loss, loss_type=loss, shard_teacher=True, **changes)
                evaluated = trainer.evaluate(trainer.eval_dataset.select(range(3)))["eval_kl"]
                trainer.train()
                distances = distance(weights(trainer), weights(whole))
            layers = [*trainer.teacher.model.model.layers.parameters()]
            held = sum(weight.to_local().numel() for weight in layers)
            found[f"{student}, {loss}"] = {
                "share": held / sum(weight.numel() for weight in layers),
                "kl": [evaluated, expected],
                "distance": distances,
            }
    student = load_student()
    with fsdp2():
        try:
            make_trainer(folder / "itself", student=student, teacher=student, **changes)
        except ConfigError as error:
            found["itself"] = str(error)
    return found


PARTS = {part.__name__: part for part in (stream, vision, packed, sharded, taught)}


def main(folder: Path, *parts: str) -> None:
    torch.set_num_threads(1)
    found = {part: PARTS[part](folder / part) for part in parts}
    (folder / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # what is found is written; threads of collectives now and then abort a process that ends in order


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
