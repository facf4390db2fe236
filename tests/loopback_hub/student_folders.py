"""Tiny students in folders, as a trainer leaves them, with records that belong to their weights."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from prune_opd_hf.records.evaluation_report import BenchmarkResult, EvaluationReport, SamplingSettings
from prune_opd_hf.records.statistics import Estimate
from prune_opd_hf.records.training_summary import TrainingSummary
from prune_opd_hf.records.weights import weight_files, weights_hash

WORDS = ["<pad>", "<eos>", *"0123456789+*=", "what", "is"]


def tiny_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Words and digits, built offline."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    if chat:
        fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return fast


def tiny_qwen3(seed: int = 0, **changes) -> Qwen3ForCausalLM:
    """About ten thousand parameters."""
    settings = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**{**settings, **changes}))


def save_student(
    folder: Path,
    seed: int = 0,
    *,
    max_shard_size: str = "5GB",
    chat: bool = False,
    records: bool = True,
    history: bool = True,
) -> Path:
    """A student's folder: weights, tokenizer, generation config, records, and what a trainer leaves beside them.

    Without a history in its summary, no figures are drawn for it.
    """
    tiny_qwen3(seed).save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer(chat).save_pretrained(folder)
    torch.save({"learning_rate": 1e-4}, folder / "training_args.bin")
    (folder / "checkpoint-10").mkdir(exist_ok=True)
    (folder / "checkpoint-10" / "optimizer.pt").write_bytes(b"state")
    if records:
        (training_summary() if history else training_summary(history=())).save(folder)
        evaluation_report(weights_hash(folder)).save(folder / "evaluation" / "chain.json")
    return folder


def training_summary(**changes) -> TrainingSummary:
    """A run of three logged steps."""
    history = [
        {
            "step": step,
            "reward/mean": -0.5 + 0.1 * step,
            "budget/length": 40.0 + step,
            "tokens/kept": 100 * step,
            "tokens/saved": 50 * step,
            "prune/effective_length_mean": 20.0,
            "prune/overlap_by_position/00000": 0.9,
            "prune/overlap_by_position/00010": 0.5 + 0.1 * step,
        }
        for step in (1, 2, 3)
    ]
    values = {
        "dataset": "embedded chains",
        "loss": "topk_policy_gradient",
        "pruning": "drift",
        "steps": 3,
        "rollouts": 24,
        "generated_tokens": 450,
        "kept_tokens": 300,
        "saved_tokens": 150,
        "wall_seconds": 12.5,
        "student_base": "org/base",
        "teacher": "org/teacher",
        "drift": {"metric": "overlap", "top_k": 2, "threshold": 0.5},
        "budget": {"initial": 40, "minimum": 8, "maximum": 64},
        "hyperparameters": {"learning_rate": 1e-3, "optimizer": "adamw"},
        "phase_seconds": {"generate": 8.0, "teacher": 1.0, "update": 3.5},
        "hardware": "2 CPU cores",
        "versions": {"torch": "2.13.0"},
        "seeds": {"data": 0},
        "history": history,
        "created": "2026-11-23",
    }
    return TrainingSummary(**{**values, **changes})


def evaluation_report(
    model_hash: str, *, model_name: str = "org/student", value: float = 0.75, **changes
) -> EvaluationReport:
    """Two problems, two samples each; `changes` are fields of the benchmark's result."""
    result = {
        "name": "chain",
        "source": "embedded",
        "revision": None,
        "content_hash": "sha256:" + "0" * 64,
        "problems": 2,
        "num_generations": 2,
        "metrics": {"avg@2": Estimate(value, value - 0.2, value + 0.1, "bootstrap over problems")},
        "problem_scores": {"avg@2": (value, value)},
        "truncated_share": 0.25,
        "no_answer_share": 0.0,
        "timed_out_share": 0.0,
        "crashed_share": 0.0,
        "prompt_tokens": 40,
        "response_tokens": 100,
        "wall_seconds": 1.5,
        "prompt_suffix": "",
        "grader": "exact match",
    }
    return EvaluationReport(
        model_name=model_name,
        model_hash=model_hash,
        sampling=SamplingSettings(temperature=1.0, top_p=0.95, max_completion_length=32, seed=0, num_generations=2),
        benchmarks=(BenchmarkResult(**{**result, **changes}),),
        versions={"transformers": "5.23.0"},
        hardware="2 CPU cores",
        engine="generate",
        dtype="float32",
        date="2026-11-23",
    )


def same_weights(first: Path, second: Path) -> bool:
    """Whether two folders hold the same tensors, however they are spread over files."""
    one, other = (
        {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}
        for folder in (first, second)
    )
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
