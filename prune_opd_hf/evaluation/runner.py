"""`evaluate_model`: from a model and benchmarks to a report.

For each benchmark: encode, generate what the log does not hold yet, gather from all processes, grade, score. The embedded task
goes the same way as every other benchmark.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.evaluation.benchmarks import Benchmark, load_benchmark
from prune_opd_hf.evaluation.chain_grading import ChainGrader
from prune_opd_hf.evaluation.grading import Grader, GradingPool
from prune_opd_hf.evaluation.processes import join_processes
from prune_opd_hf.evaluation.prompting import check_room, describe_prompts, encode_prompts, end_token_ids, prompt_hash
from prune_opd_hf.evaluation.sample_log import Sample, SampleLog, check_folder
from prune_opd_hf.evaluation.scores import score_verdicts
from prune_opd_hf.evaluation.subject import Subject, resolve_subject
from prune_opd_hf.generation.continuous_batching import generate_continuous
from prune_opd_hf.generation.draw import sample_seed
from prune_opd_hf.generation.refilling_loop import generate_refilling
from prune_opd_hf.generation.requests import Completion, Request
from prune_opd_hf.records.evaluation_report import BenchmarkResult, EvaluationReport, SamplingSettings
from prune_opd_hf.records.files import write_text

ENGINES = ("auto", "generate_batch", "refilling")
REPORT_FILE, TABLE_FILE = "report.json", "report.md"


def evaluate_model(
    model: PreTrainedModel | str | os.PathLike[str],
    benchmarks: Sequence[str | os.PathLike[str] | Benchmark],
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    samples: int = 16,
    temperature: float = 1.0,
    top_p: float = 0.95,
    top_k: int = 0,
    max_new_tokens: int = 31744,
    seed: int = 0,
    engine: str = "auto",
    slots: int = 32,
    limit: int | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    grader: Grader | None = None,
    model_name: str | None = None,
    model_hash: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    progress: bool = True,
) -> EvaluationReport:
    r"""Answer every problem of every benchmark `samples` times, grade, and report scores with their intervals.

    Under `accelerate launch` the processes share the samples, and all return the same report. With the refilling loop the
    samples are the same for any number of processes and slots, and after a restart, up to the rounding of the logits.

    Args:
        model: a Hub id, a folder, or a model (then with `processing_class`, its tokenizer).
        benchmarks: names of the registry, "chain" (the embedded task), paths of JSON files, or `Benchmark` objects.
        samples: for each problem.
        temperature, top_p, top_k, max_new_tokens, seed: how they are drawn; the defaults are those of the published results.
            Temperature 0 is greedy decoding.
        engine: "generate_batch" (Transformers' continuous batching), "refilling" (this package's loop), or "auto": the
            former on a GPU, the latter elsewhere.
        slots: rows that the refilling loop decodes at a time; continuous batching sizes itself.
        limit: take the first so many problems only; the report's content hash is then theirs.
        output_dir: where samples are written as they come, and report.json and report.md at the end. A killed run continues
            there. By default nothing is written.
        chat_template_kwargs: for the tokenizer's chat template, for example {"enable_thinking": True}.
        grader: of mathematical answers; a `GradingPool` by default.
        model_name, model_hash: instead of those found out.
        revision, dtype: to load the model with.
        progress: show a bar with tokens/s and the time left.

    Raises:
        ConfigError: a setting is out of range, the context is too short, or `output_dir` holds samples drawn otherwise, or
            another run writes there.
        FileNotFoundError, FileFormatError: a benchmark or the model cannot be read.
        HubError: a benchmark cannot be fetched.
        InputError: a problem is empty.
        UnsupportedGenerationError: the engine does not support the model.
        GraderStartError: answers cannot be graded here.

    Example: the embedded student on four problems of the embedded task.
        >>> from prune_opd_hf.tasks import load_student, load_tokenizer
        >>> report = evaluate_model(load_student(), ["chain"], processing_class=load_tokenizer(), samples=2, limit=4,
        ...                         max_new_tokens=112, model_name="embedded-student", progress=False)
        >>> report["chain"].problems, list(report["chain"].metrics)
        (4, ['avg@2', 'pass@2', 'maj@2'])
    """
    settings = SamplingSettings(
        temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens, seed=seed, samples=samples
    )
    if engine not in ENGINES:
        raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1 problem, got {limit}")
    if slots < 1:
        raise ConfigError(f"slots must be at least 1, got {slots}")
    if output_dir is not None:
        check_folder(output_dir)
    loaded = [_limited(item if isinstance(item, Benchmark) else load_benchmark(item), limit) for item in benchmarks]
    names = [benchmark.name for benchmark in loaded]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"at least one benchmark is needed, and each once, got {names}")
    state = join_processes()
    subject = resolve_subject(
        model,
        processing_class,
        device=state.device,
        name=model_name,
        weights_hash=model_hash,
        revision=revision,
        dtype=dtype,
    )
    if engine == "auto":
        engine = "generate_batch" if subject.model.device.type == "cuda" else "refilling"
    prompts = {
        benchmark.name: encode_prompts(benchmark, subject.tokenizer, chat_template_kwargs) for benchmark in loaded
    }
    for name, encoded in prompts.items():
        check_room(subject.model, encoded, max_new_tokens, name)
    end_token_ids(subject.model, subject.tokenizer)
    was_training = subject.model.training
    subject.model.eval()
    try:
        with ExitStack() as stack:
            log = stack.enter_context(SampleLog(output_dir, _identity(subject, settings, engine), state.process_index))
            state.wait_for_everyone()
            graders: dict[str, Grader] = {
                "math": stack.enter_context(GradingPool()) if grader is None else grader,
                "chain": ChainGrader(),
            }
            if (
                grader is None
                and state.is_main_process
                and any(benchmark.answer_type == "math" for benchmark in loaded)
            ):
                graders["math"].grade([r"\boxed{x}"], ["x"])  # a grader that cannot start says so before generation
            results = []
            for benchmark in loaded:
                run = _Run(subject, benchmark, prompts[benchmark.name], settings, engine, slots, log, state)
                gathered = run.generate(progress and state.is_main_process)
                if state.is_main_process:
                    form = describe_prompts(benchmark, subject.tokenizer, chat_template_kwargs)
                    results.append(run.grade(gathered, graders[benchmark.answer_type], form))
    finally:
        subject.model.train(was_training)
    report = _report(subject, settings, engine, slots, results, state) if state.is_main_process else None
    if report is not None and output_dir is not None:
        report.save(Path(output_dir) / REPORT_FILE)
        write_text(Path(output_dir) / TABLE_FILE, report.to_markdown())
    return _for_everyone(report, state)


class _Run:
    """One model on one benchmark."""

    def __init__(
        self,
        subject: Subject,
        benchmark: Benchmark,
        prompts: list[tuple[int, ...]],
        settings: SamplingSettings,
        engine: str,
        slots: int,
        log: SampleLog,
        state: PartialState,
    ) -> None:
        self.subject, self.benchmark, self.prompts, self.settings = subject, benchmark, prompts, settings
        self.engine, self.slots, self.log, self.state = engine, slots, log, state
        self.eos_token_ids = end_token_ids(subject.model, subject.tokenizer)
        self.keys = [
            (prompt_hash(prompt), problem, sample)
            for problem, prompt in enumerate(prompts)
            for sample in range(settings.samples)
        ]

    def generate(self, progress: bool) -> dict[tuple[str, int, int], Sample]:
        """Generate this process's share of what is missing; returns the samples of all processes."""
        mine = self.keys[self.state.process_index :: self.state.num_processes]
        missing = [key for key in mine if key not in self.log.samples]
        requests = [
            Request(self.prompts[problem], sample_seed(self.settings.seed, *key))
            for key in missing
            for problem in [key[1]]
        ]
        before = begun = time.perf_counter()
        tokens = 0
        with tqdm(
            total=len(mine),
            initial=len(mine) - len(missing),
            desc=self.benchmark.name,
            unit="sample",
            disable=not progress,
        ) as bar:
            for completion in self._complete(requests):
                now = time.perf_counter()
                self.log.append(self._sample(missing[completion.request], completion, now - before))
                before = now
                tokens += len(completion.token_ids)
                bar.set_postfix_str(f"{tokens / (now - begun):.0f} tokens/s", refresh=False)
                bar.update()
        held = [self.log.samples[key] for key in self.keys if key in self.log.samples]
        if self.state.num_processes > 1:
            held = gather_object(held)
        return {sample.key: sample for sample in held}

    def grade(
        self, samples: Mapping[tuple[str, int, int], Sample], grader: Grader, prompt_form: str
    ) -> BenchmarkResult:
        """Grade and score the samples of all processes."""
        begun = time.perf_counter()
        ordered = [samples[key] for key in self.keys]
        k = self.settings.samples
        golds = [gold for gold in self.benchmark.answers for _ in range(k)]
        verdicts = grader.grade([sample.response for sample in ordered], golds)
        scores = score_verdicts([verdicts[first : first + k] for first in range(0, len(verdicts), k)])
        seconds = [0.0] * (1 + max(sample.process for sample in ordered))
        for sample in ordered:
            seconds[sample.process] += sample.seconds
        return BenchmarkResult(
            name=self.benchmark.name,
            source=self.benchmark.source,
            revision=self.benchmark.revision,
            content_hash=self.benchmark.content_hash,
            problems=len(self.benchmark),
            samples=k,
            metrics=scores.metrics,
            problem_scores=scores.problem_scores,
            truncated_share=sum(not sample.ended for sample in ordered) / len(ordered),
            no_answer_share=scores.no_answer_share,
            timed_out_share=scores.timed_out_share,
            crashed_share=scores.crashed_share,
            prompt_tokens=sum(sample.prompt_tokens for sample in ordered),
            response_tokens=sum(sample.response_tokens for sample in ordered),
            wall_seconds=max(seconds) + time.perf_counter() - begun,
            prompt_suffix=self.benchmark.prompt_suffix,
            grader=grader.name,
            prompt_form=prompt_form,
        )

    def _complete(self, requests: list[Request]) -> Iterator[Completion]:
        if self.engine == "generate_batch":
            return generate_continuous(self.subject.model, requests, self.settings, self.eos_token_ids)
        return generate_refilling(self.subject.model, requests, self.settings, self.eos_token_ids, self.slots)

    def _sample(self, key: tuple[str, int, int], completion: Completion, seconds: float) -> Sample:
        hash_of_prompt, problem, sample = key
        with_special_tokens = self.benchmark.answer_type == "chain"  # its grader looks for the end
        return Sample(
            benchmark=self.benchmark.name,
            prompt_hash=hash_of_prompt,
            problem=problem,
            sample=sample,
            response=self.subject.tokenizer.decode(completion.token_ids, skip_special_tokens=not with_special_tokens),
            prompt_tokens=len(self.prompts[problem]),
            response_tokens=len(completion.token_ids),
            ended=completion.ended,
            process=self.state.process_index,
            seconds=seconds,
        )


def _limited(benchmark: Benchmark, limit: int | None) -> Benchmark:
    return replace(benchmark, questions=benchmark.questions[:limit], answers=benchmark.answers[:limit])


def _identity(subject: Subject, settings: SamplingSettings, engine: str) -> dict[str, Any]:
    """What samples must share to belong to one run; their number may grow."""
    drawn = {name: value for name, value in asdict(settings).items() if name != "samples"}
    return {
        "weights": subject.weights_hash,
        "config": _config_hash(subject.model),
        "end_tokens": sorted(end_token_ids(subject.model, subject.tokenizer)),
        "dtype": _dtype(subject),
        "engine": engine,
        **drawn,
    }


def _config_hash(model: PreTrainedModel) -> str:
    """Of what the configuration makes of the weights, such as the scaling of the rotary embedding."""
    neutral = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
    told = {name: value for name, value in model.config.to_diff_dict().items() if name not in neutral}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _dtype(subject: Subject) -> str:
    return str(subject.model.dtype).removeprefix("torch.")


def _report(
    subject: Subject,
    settings: SamplingSettings,
    engine: str,
    slots: int,
    results: list[BenchmarkResult],
    state: PartialState,
) -> EvaluationReport:
    from prune_opd_hf.records.environment import describe_hardware, package_versions, today

    processes = f", {state.num_processes} processes" if state.num_processes > 1 else ""
    return EvaluationReport(
        model_name=subject.name,
        model_hash=subject.weights_hash,
        sampling=settings,
        benchmarks=tuple(results),
        versions=package_versions() | {"math-verify": version("math-verify")},
        hardware=describe_hardware() + processes,
        engine="continuous batching (generate_batch)"
        if engine == "generate_batch"
        else f"refilling loop, {slots} slots",
        dtype=_dtype(subject),
        date=today(),
    )


def _for_everyone(report: EvaluationReport | None, state: PartialState) -> EvaluationReport:
    if state.num_processes > 1:
        texts = [report.to_json() if report is not None else None]
        broadcast_object_list(texts)
        if report is None:
            assert texts[0] is not None
            report = EvaluationReport.from_json(texts[0])
    assert report is not None
    return report
