"""One model of the embedded task as an `EvaluationReport`: one sample a problem, exact match, Wilson's interval."""

import hashlib
import json
import time
from pathlib import Path

import torch
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_opd_hf.generation import pruned_generate
from prune_opd_hf.records.environment import describe_hardware, package_versions, today
from prune_opd_hf.records.evaluation_report import BenchmarkResult, EvaluationReport, SamplingSettings
from prune_opd_hf.records.statistics import Estimate
from prune_opd_hf.records.weights import weights_hash
from prune_opd_hf.tasks import Problem, extract_answer

BATCH_SIZE = 256


def embedded_report(
    folder: Path, name: str, problems: list[Problem], *, max_new_tokens: int, seed: int, device: str
) -> EvaluationReport:
    """Load a saved model, answer each problem once at temperature 1, and grade by exact match.

    Args:
        folder: a model in Hub form.
        name: what to call it in the report.
        problems: of the embedded task.
        max_new_tokens: cap on the response.
        seed: of the sampling.
        device: where to generate.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    started, answers, truncated, tokens, prompt_tokens = time.perf_counter(), [], 0, 0, 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for first in range(0, len(problems), BATCH_SIZE):
            prompts = [problem.prompt for problem in problems[first : first + BATCH_SIZE]]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(device)
            sequences = model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                max_new_tokens=max_new_tokens,
                custom_generate=pruned_generate,
            )
            prompt_tokens += int(inputs["attention_mask"].sum())
            for ids in sequences[:, inputs["input_ids"].shape[1] :].tolist():
                ended = tokenizer.eos_token_id in ids
                length = ids.index(tokenizer.eos_token_id) + 1 if ended else len(ids)
                truncated += not ended
                tokens += length
                answers.append(extract_answer(tokenizer.decode(ids[:length])))
    scores = tuple(float(answer == problem.answer) for answer, problem in zip(answers, problems, strict=True))
    right = int(sum(scores))
    bounds = binomtest(right, len(scores)).proportion_ci(method="wilson")
    content = json.dumps([[problem.prompt, problem.answer] for problem in problems])
    result = BenchmarkResult(
        name="embedded",
        source="prune_opd_hf.tasks.ChainTask",
        revision=None,
        content_hash="sha256:" + hashlib.sha256(content.encode()).hexdigest(),
        problems=len(problems),
        samples=1,
        metrics={
            "avg@1": Estimate(right / len(scores), float(bounds.low), float(bounds.high), "Wilson score interval")
        },
        problem_scores={"avg@1": scores},
        truncated_share=truncated / len(problems),
        no_answer_share=sum(answer is None for answer in answers) / len(problems),
        timed_out_share=0.0,
        crashed_share=0.0,
        prompt_tokens=prompt_tokens,
        response_tokens=tokens,
        wall_seconds=time.perf_counter() - started,
        prompt_suffix="",
        grader="exact match on the digit before the end",
    )
    return EvaluationReport(
        model_name=name,
        model_hash=weights_hash(folder),
        sampling=SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=max_new_tokens, seed=seed, samples=1),
        benchmarks=(result,),
        versions=package_versions(),
        hardware=describe_hardware(),
        engine="pruned_generate",
        dtype=str(model.dtype).removeprefix("torch."),
        date=today(),
    )
