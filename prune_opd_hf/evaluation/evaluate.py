"""`evaluate_model`: from a model and benchmarks to a report.

1. Whatever can be refused is refused before a token is generated.
2. For each benchmark: generate the samples that the log does not hold yet, gather them from all processes, grade, score.
3. The main process writes the report, and every process returns it.

The embedded task goes the same way as every other benchmark. Which engine generates is decided once.
"""

import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.evaluation.benchmarks import BOXED, BOXED_SUFFIX, Benchmark, load_benchmark
from prune_opd_hf.evaluation.evaluated_model import (
    EvaluatedModel,
    encode_prompts,
    load_evaluated_model,
    prompt_hash,
    takes_template,
)
from prune_opd_hf.evaluation.grading import ChainGrader, Grader, GradingPool, Verdict, score_verdicts
from prune_opd_hf.evaluation.grading.math_grader.extraction import thought_opened_by
from prune_opd_hf.evaluation.sample_log import Sample, SampleLog, read_samples
from prune_opd_hf.generation import (
    ENGINES,
    Request,
    RolloutEngine,
    Sampling,
    VLLMSettings,
    make_engine,
    resolve_engine,
)
from prune_opd_hf.generation.engine import request_seed
from prune_opd_hf.models.lm_head import evaluating
from prune_opd_hf.records.environment import describe_hardware, package_versions, today
from prune_opd_hf.records.evaluation_report import REPORT_FILE, BenchmarkResult, EvaluationReport, SamplingSettings
from prune_opd_hf.records.files import write_text
from prune_opd_hf.records.folders import check_folder

GRADED_FILE = "graded.jsonl"
"""One JSON line a sample: prompt, response, gold, the answer that was found and what became of it."""

logger = logging.getLogger(__name__)

LONGEST_WAIT = timedelta(days=2)
"""How long a process waits for the slowest one. A process that dies ends the others at once, by their launcher."""


def evaluate_model(
    model: PreTrainedModel | str | os.PathLike[str],
    benchmarks: Sequence[str | os.PathLike[str] | Benchmark],
    *,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    num_generations: int = 16,
    temperature: float = 1.0,
    top_p: float = 0.95,
    top_k: int = 0,
    max_completion_length: int = 31744,
    seed: int = 0,
    engine: str = "auto",
    vllm: VLLMSettings = VLLMSettings(),
    slots: int = 32,
    limit: int | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    prompt_suffix: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    grader: Grader | None = None,
    model_name: str | None = None,
    model_hash: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    progress: bool = True,
) -> EvaluationReport:
    r"""Answer every problem of every benchmark `num_generations` times, grade, and report scores with their intervals.

    Under `accelerate launch` the processes share the samples, and all return the same report. With the loop the samples are
    the same for any number of processes and slots, and after a restart, up to the rounding of the logits.

    Args:
        model: a Hub id or a folder, of whole weights or of an adapter, or a model (then with `processing_class`, its tokenizer).
        benchmarks: names of the registry, "chain" (the embedded task), paths of JSON files, or `Benchmark` objects.
        num_generations: samples for each problem.
        temperature, top_p, top_k, max_completion_length, seed: how they are drawn; the defaults are those of the published
            results. Temperature 0 is greedy decoding.
        engine: "continuous_batching" (of Transformers), "loop" (this package's decoding loop), or "auto": the former on a
            GPU, the latter elsewhere. "vllm": as `vllm` says; the model's weights are sent there.
        vllm: where vLLM runs.
        slots: rows that the loop decodes at a time; continuous batching sizes itself.
        limit: take the first so many problems only; the report's content hash is then theirs.
        output_dir: where samples are written as they come, and at the end graded.jsonl (each with its gold, the answer found
            and the verdict), report.json and report.md. A killed run continues there. By default nothing is written.
        prompt_suffix: appended to each problem after a blank line; "boxed" asks for reasoning and a final \boxed{}, "" is
            none. By default the benchmarks of the registry are asked with "boxed", files as they stand, and `Benchmark`
            objects with their own. The embedded task takes none.
        chat_template_kwargs: for the tokenizer's chat template, for example {"enable_thinking": True}.
        grader: of mathematical answers; a `GradingPool` by default.
        model_name, model_hash: instead of those found out. A model in memory is saved to a temporary folder to be hashed.
        revision, trust_remote_code, dtype: to load the model with.
        progress: show a bar with tokens/s and the time left.

    Raises:
        ConfigError: a setting is out of range, the context is too short, or `output_dir` holds samples drawn otherwise, or
            another run writes there.
        PruneOPDError, FileNotFoundError: model, benchmark or grader cannot be loaded, or the engine does not support the model.

    Example: the embedded student on four problems of the embedded task.
        >>> from prune_opd_hf.tasks import load_student, load_tokenizer
        >>> report = evaluate_model(load_student(), ["chain"], processing_class=load_tokenizer(), num_generations=2, limit=4,
        ...                         max_completion_length=112, model_name="embedded-student", progress=False)
        >>> report["chain"].problems, list(report["chain"].metrics)
        (4, ['avg@2', 'pass@2', 'maj@2'])
    """
    sampling = SamplingSettings(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_completion_length=max_completion_length,
        seed=seed,
        num_generations=num_generations,
    )
    if engine not in ENGINES:
        raise ConfigError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    for name, value in (("limit", limit), ("slots", slots)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if output_dir is not None:
        check_folder(output_dir)
        if (Path(output_dir) / REPORT_FILE).exists() and next(read_samples(output_dir), None) is None:
            raise ConfigError(
                f"{output_dir} holds a report without its samples, which would be lost: choose another folder"
            )
    loaded = [item if isinstance(item, Benchmark) else load_benchmark(item) for item in benchmarks]
    loaded = [replace(each, questions=each.questions[:limit], answers=each.answers[:limit]) for each in loaded]
    if prompt_suffix is not None:
        suffix = BOXED_SUFFIX if prompt_suffix == BOXED else prompt_suffix
        loaded = [each if each.answer_type == "chain" else replace(each, prompt_suffix=suffix) for each in loaded]
    names = [benchmark.name for benchmark in loaded]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"at least one benchmark is needed, and each once, got {names}: name=path renames a file")
    processes = join_processes()
    subject = load_evaluated_model(
        model,
        processing_class,
        device=processes.device,
        name=model_name,
        model_hash=model_hash,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
    )
    if chat_template_kwargs and not any(takes_template(benchmark, subject.tokenizer) for benchmark in loaded):
        raise ConfigError(
            "chat_template_kwargs has no effect: the tokenizer has no chat template, or the embedded task alone is asked, which "
            "takes none; leave it out"
        )
    tasks = []
    for benchmark in loaded:
        if (
            prompt_suffix is None
            and benchmark.answer_type == "math"
            and not any("boxed" in each for each in benchmark.prompts)
        ):
            logger.warning(
                "%s is asked as it stands, and no problem asks for a \\boxed{} answer, the one that grading finds surely: "
                "prompt_suffix='boxed' appends a request for one, '' silences this line",
                benchmark.name,
            )
        prompts, form = encode_prompts(benchmark, subject, max_completion_length, chat_template_kwargs)
        hashes = enumerate(map(prompt_hash, prompts))
        keys = [(each, problem, sample) for problem, each in hashes for sample in range(num_generations)]
        tasks.append(_Task(benchmark, prompts, form, keys))
    engine = resolve_engine(engine, subject.model)
    results, graded = [], []
    with ExitStack() as stack:
        stack.enter_context(evaluating(subject.model))
        log = stack.enter_context(SampleLog(output_dir, _identity(subject, sampling, engine), processes.process_index))
        processes.wait_for_everyone()  # every process has read the log before one writes
        graders: dict[str, Grader] = {
            "math": grader or stack.enter_context(GradingPool(progress=progress)),
            "chain": ChainGrader(),
        }
        if grader is None and processes.is_main_process and any(item.answer_type == "math" for item in loaded):
            graders["math"].grade([r"\boxed{x}"], ["x"])  # a grader that cannot start fails before generation
        settings = Sampling(
            max_completion_length=max_completion_length,
            eos_token_ids=subject.eos_token_ids,
            pad_token_id=subject.eos_token_ids[0],
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
        )
        rollouts = stack.enter_context(closing(make_engine(engine, subject.model, settings, slots=slots, vllm=vllm)))
        rollouts.update_weights(subject.model, step=0)
        run = _Run(subject, sampling, rollouts, log, processes, progress)
        for task in tasks:
            run.generate(task)
            samples = run.gather(task)
            if processes.is_main_process:
                result, lines = _grade(task, samples, graders[task.benchmark.answer_type], subject)
                results.append(result)
                graded += lines
    if not processes.is_main_process:
        return _broadcast_report(None)
    several = f", {processes.num_processes} processes" if processes.num_processes > 1 else ""
    report = EvaluationReport(
        model_name=subject.name,
        model_hash=subject.weights_hash,
        sampling=sampling,
        benchmarks=tuple(results),
        versions=package_versions() | {"math-verify": version("math-verify")},
        hardware=describe_hardware() + several,
        engine=engine,
        dtype=subject.dtype,
        date=today(),
    )
    if output_dir is not None:
        write_text(Path(output_dir) / GRADED_FILE, "".join(json.dumps(line) + "\n" for line in graded))
        report.save(Path(output_dir) / REPORT_FILE)
        write_text(Path(output_dir) / "report.md", report.to_markdown())
    return _broadcast_report(report) if processes.num_processes > 1 else report


def join_processes() -> PartialState:
    """The processes that `accelerate launch` or `torchrun` started, as the state that `accelerate` keeps.

    `PartialState()` alone does not initialise the process group of processes without an accelerator: each would evaluate
    everything, and all would write to the same files.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=LONGEST_WAIT) if started > 1 else PartialState(cpu=cpu)
    if started != state.num_processes and state.num_processes == 1:
        raise ConfigError(
            f"{started} processes were started, but accelerate was set up for one before evaluation began: create "
            "PartialState(cpu=True) or your Accelerator with all of them first, or start one process"
        )
    return state


@dataclass(frozen=True)
class _Task:
    """A benchmark for one model: prompts as token ids, what they were put into, and the keys of the wanted samples."""

    benchmark: Benchmark
    prompts: list[tuple[int, ...]]
    prompt_form: str
    keys: list[tuple[str, int, int]]


@dataclass(frozen=True)
class _Run:
    """What is the same for all benchmarks."""

    subject: EvaluatedModel
    sampling: SamplingSettings
    engine: RolloutEngine
    log: SampleLog
    processes: PartialState
    progress: bool

    def generate(self, task: _Task) -> None:
        """Generate this process's share of what the log does not hold yet, into the log."""
        mine = task.keys[self.processes.process_index :: self.processes.num_processes]
        missing = [key for key in mine if key not in self.log.samples]
        # Prompts of like length are read together with little padding; the longest first, since they need most memory.
        missing.sort(key=lambda key: -len(task.prompts[key[1]]))
        requests = [Request(task.prompts[key[1]], request_seed(self.sampling.seed, *key)) for key in missing]
        before = begun = time.perf_counter()
        tokens = 0
        with_end = task.benchmark.answer_type == "chain"  # whose grader looks for the end token
        with tqdm(
            total=len(mine),
            initial=len(mine) - len(missing),
            desc=task.benchmark.name,
            unit="sample",
            disable=not (self.progress and self.processes.is_main_process),
        ) as bar:
            for completion in self.engine.generate(requests):
                now = time.perf_counter()
                hash_of_prompt, problem, number = missing[completion.request]
                sample = Sample(
                    benchmark=task.benchmark.name,
                    prompt_hash=hash_of_prompt,
                    problem=problem,
                    sample=number,
                    response=self.subject.decode(completion.token_ids, skip_special_tokens=not with_end),
                    prompt_tokens=len(task.prompts[problem]),
                    response_tokens=len(completion.token_ids),
                    ended=completion.stop_reason == "eos",
                    process=self.processes.process_index,
                    seconds=now - before,
                )
                self.log.append(sample)
                before = now
                tokens += len(completion.token_ids)
                bar.set_postfix_str(f"{tokens / (now - begun):.0f} tokens/s", refresh=False)
                bar.update()

    def gather(self, task: _Task) -> list[Sample]:
        """The wanted samples of all processes, in the order of their keys."""
        held = [self.log.samples[key] for key in task.keys if key in self.log.samples]
        samples = {sample.key: sample for sample in gather_object(held)}
        return [samples[key] for key in task.keys]


def _grade(
    task: _Task, samples: list[Sample], grader: Grader, subject: EvaluatedModel
) -> tuple[BenchmarkResult, list[dict[str, Any]]]:
    """The scores of a benchmark, and each sample with what became of it."""
    begun = time.perf_counter()
    benchmark, k = task.benchmark, len(samples) // len(task.benchmark)
    golds = [gold for gold in benchmark.answers for _ in range(k)]
    inside = [thought_opened_by(subject.tokenizer.decode(list(prompt[-8:]))) for prompt in task.prompts]
    verdicts = grader.grade([inside[sample.problem] + sample.response for sample in samples], golds)
    seconds: defaultdict[int, float] = defaultdict(float)
    for sample in samples:
        seconds[sample.process] += sample.seconds
    result = BenchmarkResult(
        name=benchmark.name,
        source=benchmark.source,
        revision=benchmark.revision,
        content_hash=benchmark.content_hash,
        problems=len(benchmark),
        num_generations=k,
        truncated_share=sum(not sample.ended for sample in samples) / len(samples),
        prompt_tokens=sum(sample.prompt_tokens for sample in samples),
        response_tokens=sum(sample.response_tokens for sample in samples),
        wall_seconds=max(seconds.values()) + time.perf_counter() - begun,
        prompt_suffix=benchmark.prompt_suffix,
        grader=grader.name,
        prompt_form=task.prompt_form,
        **score_verdicts([verdicts[first : first + k] for first in range(0, len(verdicts), k)]),
    )
    return result, [_graded(benchmark, *each) for each in zip(samples, golds, verdicts, strict=True)]


def _graded(benchmark: Benchmark, sample: Sample, gold: str, verdict: Verdict) -> dict[str, Any]:
    return {
        "benchmark": benchmark.name,
        "problem": sample.problem,
        "sample": sample.sample,
        "prompt": benchmark.prompts[sample.problem],
        "response": sample.response,
        "ended": sample.ended,
        "gold": gold,
        "answer": verdict.extracted,
        "correct": verdict.correct,
        "status": verdict.status,
    }


def _identity(subject: EvaluatedModel, sampling: SamplingSettings, engine: str) -> dict[str, Any]:
    """What samples must share to belong to one run; their number may grow."""
    return {
        "weights": subject.weights_hash,
        "config": subject.config_hash,
        "end_tokens": sorted(subject.eos_token_ids),
        "dtype": subject.dtype,
        "engine": engine,
        **{name: value for name, value in asdict(sampling).items() if name != "num_generations"},
    }


def _broadcast_report(report: EvaluationReport | None) -> EvaluationReport:
    """The report of the main process, in every process."""
    texts = [None if report is None else report.to_json()]
    broadcast_object_list(texts)
    return report or EvaluationReport.from_json(str(texts[0]))
