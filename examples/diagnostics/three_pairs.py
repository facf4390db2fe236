"""What every drift metric says at its default on three pairs: of a model that is its own teacher, of random tokens, of real drift.

    python examples/embedded_task/build_weights.py --task varied --output_dir runs/varied --seed 1
    python examples/real_pair/cold_start.py
    python examples/diagnostics/three_pairs.py

A model has not drifted from itself, however unsure it is: what is flagged there is a fault of the metric. Random tokens are drift
by any measure: up to a random place a response is the model's own, then eight tokens are drawn evenly from the vocabulary, by a
student that knows no better, and the model itself is the teacher. Tokens of the embedded tasks are labelled as in drift_metrics.py.
Nobody labels those of the real pair; there the question is where events lie.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drift_metrics import cell, sample_inputs, share, table
from rank_statistics import auc
from token_gradients import response_log_probs
from token_labels import CLEAN, DRIFT, PADDING, WRONG, label_rollouts
from token_signals import disagreement, settings_by_name
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_opd_hf import DriftConfig
from prune_opd_hf.preflight.replay import drift_events
from prune_opd_hf.preflight.settings_grid import SURPRISING, agreed_tokens, likelihood_ratio
from prune_opd_hf.records.environment import describe_hardware, package_versions
from prune_opd_hf.records.figures import Line, draw_lines
from prune_opd_hf.records.files import write_json, write_text
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.tasks import ChainTask, load_student, load_teacher, load_tokenizer

K = 16
PLANTED = 8
DEFAULTS = settings_by_name(K)
SETTINGS = {**DEFAULTS, "overlap of the top 2 at 0.5": DriftConfig("overlap", 2, 0.5)}
"""Each metric at its default, and what was set by hand for a vocabulary of 64 tokens."""

GOAL = {"flagged": 0.01, "auc": 0.95}
BAND = 8
SHUFFLES = 400


@dataclass(frozen=True)
class Pair:
    """Two models, prompts ready for generation, and the problems they were made of, where tokens can be labelled."""

    name: str
    models: Mapping[str, Any]
    inputs: Any
    cap: int
    problems: list | None = None


def pairs(varied: Path, real: Path, prompts: int, real_prompts: int) -> Iterator[Pair]:
    """The embedded pair, its variant with responses of different lengths, and SmolLM2."""
    tokenizer = load_tokenizer()
    loaded = {name: AutoModelForCausalLM.from_pretrained(varied / name) for name in ("student", "teacher")}
    for name, models, task, cap in (
        ("embedded", {"student": load_student(), "teacher": load_teacher()}, ChainTask(), 112),
        ("varied", loaded, ChainTask(operations=24, operations_min=4), 136),
    ):
        problems = task.problems(prompts, seed=500, split="evaluation")
        inputs = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True)
        yield Pair(name, models, inputs, cap, problems)
    folders = {"student": real / "cold_started", "teacher": real / "teacher"}
    models = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in folders.items()}
    tokenizer = AutoTokenizer.from_pretrained(real / "teacher", padding_side="left")
    lines = (real / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:real_prompts]
    inputs = tokenizer.apply_chat_template(
        [json.loads(line)["prompt"] for line in lines],
        add_generation_prompt=True,
        return_tensors="pt",
        padding=True,
        return_dict=True,
    )
    yield Pair("SmolLM2", models, inputs, 64)


def first_prompts(pair: Pair, count: int) -> dict[str, torch.Tensor]:
    """The inputs of the first prompts."""
    return {name: value[:count] for name, value in pair.inputs.items()}


@torch.no_grad()
def with_random_tokens(model, rollouts: Rollouts, seed: int) -> tuple[Rollouts, torch.Tensor]:
    """Rollouts of a model with itself as their teacher, up to a random place, followed there by tokens that a student has drawn
    evenly from the vocabulary; and which those are. Rows of less than two tokens are left out."""
    generator = torch.Generator().manual_seed(seed)
    parts, planted = [], []
    for row in (rollouts.lengths >= 2).nonzero().flatten().tolist():
        one = rollouts.select([row])
        length = int(one.lengths[0])
        onset = int(torch.randint(1, max(2, length - PLANTED + 1), (1,), generator=generator))
        end = min(onset + PLANTED, length)
        is_random = torch.zeros(1, length, dtype=torch.bool)
        is_random[:, onset:end] = True
        vocabulary = model.get_output_embeddings().weight.shape[0]
        drawn = torch.stack([torch.randperm(vocabulary, generator=generator)[:K] for _ in range(length)]).unsqueeze(0)
        ids = torch.where(is_random, drawn[..., 0], one.response_ids)
        log_q = response_log_probs(model, replace(one, response_ids=ids))
        own = log_q.topk(K)
        where = is_random.unsqueeze(-1)
        candidates = torch.where(where, drawn, own.indices)
        of_teacher = log_q.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        even = -float(np.log(vocabulary))
        columns = {
            "response_ids": ids,
            "token_log_probs": of_teacher.masked_fill(is_random, even),
            "teacher_token_log_probs": of_teacher,
            "student_topk_ids": candidates,
            "student_topk_log_probs": torch.where(where, even, own.values),
            "teacher_log_probs": log_q.gather(-1, candidates),
            "teacher_topk_ids": own.indices,
            "teacher_topk_log_probs": own.values,
        }
        short = {name: value[:, :end] for name, value in one.tensors().items() if not name.startswith("prompt")}
        parts.append(replace(one, **(short | {name: value[:, :end] for name, value in columns.items()})))
        planted.append(is_random[0, :end])
    return Rollouts.cat(parts), torch.nn.utils.rnn.pad_sequence(planted, batch_first=True)


def by_stretch(scores: torch.Tensor, is_random: torch.Tensor, mask: torch.Tensor) -> tuple[np.ndarray, ...]:
    """Means over the random tokens of each row, and over as many of its own before them at a time; which are which; and rows."""
    means, random, rows = [], [], []
    for row in range(len(scores)):
        own = scores[row][mask[row] & ~is_random[row]].split(PLANTED)
        whole = [part for part in own if len(part) == PLANTED]
        means += [float(part.mean()) for part in (*whole, scores[row][is_random[row]])]
        random += [False] * len(whole) + [True]
        rows += [row] * (len(whole) + 1)
    return np.array(means), np.array(random), np.array(rows)


def own_teacher(pair: Pair, counts: tuple[int, int], seed: int) -> tuple[list[dict], list[dict]]:
    """Shares flagged of a model that is its own teacher, and what is seen of random tokens."""
    identity, planted = [], []
    for name, model in pair.models.items():
        for temperature in (0.7, 1.0):
            rollouts = sample_inputs(model, model, first_prompts(pair, counts[0]), seed, temperature, pair.cap)
            row = {
                "pair": pair.name,
                "model": name,
                "temperature": str(temperature),
                "tokens": int(rollouts.lengths.sum()),
            }
            identity.append(
                row
                | {
                    metric: share(drift_events(rollouts, config), rollouts.response_mask)
                    for metric, config in DEFAULTS.items()
                }
            )
        spliced, is_random = with_random_tokens(model, rollouts.select(range(min(counts[1], len(rollouts)))), seed)
        mask = spliced.response_mask
        clusters = torch.arange(len(spliced)).unsqueeze(-1).expand(mask.shape)[mask].numpy()
        for metric, config in DEFAULTS.items():
            score = disagreement(spliced, config.metric, K).double()
            found = auc(score[mask].numpy(), is_random[mask].numpy(), clusters, draws=100)
            whole = auc(*by_stretch(score, is_random, mask), draws=100)
            events = drift_events(spliced, config)
            planted.append(
                {
                    "pair": pair.name,
                    "model": name,
                    "metric": metric,
                    "tokens": int(mask.sum()),
                    "random": int(is_random.sum()),
                    "auc": found.value,
                    "auc_low": found.low,
                    "auc_high": found.high,
                    "stretch_auc": whole.value,
                    "stretch_auc_low": whole.low,
                    "stretch_auc_high": whole.high,
                    "flagged": share(events, is_random),
                    "clean_flagged": share(events, mask & ~is_random),
                }
            )
    return identity, planted


def labelled(pair: Pair, rollouts: Rollouts) -> list[dict]:
    """Shares flagged of the student's labelled tokens."""
    labels = label_rollouts(rollouts, pair.problems, load_tokenizer().convert_ids_to_tokens(range(64)))
    mask = labels != PADDING
    clusters = torch.arange(len(rollouts)).unsqueeze(-1).expand(mask.shape)[mask].numpy()
    rows = []
    for name, config in SETTINGS.items():
        events = drift_events(rollouts, config)
        score = disagreement(rollouts, config.metric, config.top_k)[mask].double().numpy()
        found = auc(score, (labels != CLEAN)[mask].numpy(), clusters, draws=100)
        row = {"pair": pair.name, "setting": name, "tokens": int(mask.sum())}
        row |= {"auc": found.value, "auc_low": found.low, "auc_high": found.high}
        kinds = {"clean": CLEAN, "wrong": WRONG, "drift": DRIFT}
        rows.append(row | {f"{kind} flagged": share(events, labels == label) for kind, label in kinds.items()})
    return rows


def unlabelled(rollouts: Rollouts) -> list[dict]:
    """Where the events of the real pair lie."""
    mask, agreed = rollouts.response_mask, agreed_tokens(rollouts)
    surprising = (likelihood_ratio(rollouts) < np.log(SURPRISING)) & mask
    sure = mask & (rollouts.teacher_topk_log_probs[..., 0].exp() >= 0.9)
    halves = torch.arange(mask.shape[1]) < mask.shape[1] // 2
    rows = []
    for name, config in DEFAULTS.items():
        events = drift_events(rollouts, config)
        before = torch.nn.functional.pad(events[:, :-1], (1, 0))
        lengths, counts = rollouts.lengths.double(), events.sum(dim=-1).double()
        rate = counts.sum() / lengths.sum()
        rows.append(
            {
                "setting": name,
                "tokens": int(mask.sum()),
                "all": share(events, mask),
                "agreed": share(events, agreed),
                "surprising": share(events, surprising),
                "teacher sure": share(events, sure),
                "first half": share(events, mask & halves),
                "second half": share(events, mask & ~halves),
                "behind an event": share(events, mask & before),
                "mean_spread": float(((counts - rate * lengths) ** 2).sum() / (rate * (1 - rate) * lengths).sum()),
            }
        )
    return rows


def draw_events(rollouts: Rollouts, folder: Path) -> None:
    """Share of events by position, by likelihood ratio, and by rollout beside what an even spread would give."""
    mask = rollouts.response_mask
    by_position, by_rollout = [], []
    generator = np.random.default_rng(0)
    for name in ("weighted_overlap", "overlap"):
        events = drift_events(rollouts, DEFAULTS[name])
        bands = torch.arange(mask.shape[1]).split(BAND)
        by_position.append(
            Line(name, [float(band[0]) for band in bands], [share(events[:, band], mask[:, band]) for band in bands])
        )
        lengths = rollouts.lengths.numpy()
        found = np.sort(events.sum(dim=-1).numpy() / lengths)
        even = np.sort(generator.binomial(lengths, share(events, mask), (SHUFFLES, len(lengths))) / lengths, axis=1)
        numbers = list(range(1, len(lengths) + 1))
        by_rollout += [
            Line(name, numbers, found.tolist()),
            Line(
                f"{name}, spread evenly",
                numbers,
                even.mean(axis=0).tolist(),
                *np.quantile(even, (0.025, 0.975), axis=0).tolist(),
            ),
        ]
    label = "share of tokens that are events"
    title = "SmolLM2 without three layers: events at the defaults"
    ratios = likelihood_ratio(rollouts)
    edges = torch.quantile(ratios[mask], torch.linspace(0, 1, 11)[1:-1])
    tenth = torch.bucketize(ratios, edges)
    tenths = [10 * (number + 0.5) for number in range(10)]
    by_ratio = [
        Line(name, tenths, [float((events & mask & (tenth == number)).sum() / events.sum()) for number in range(10)])
        for name in ("weighted_overlap", "overlap")
        for events in [drift_events(rollouts, DEFAULTS[name])]
    ]
    draw_lines(
        folder / "events_by_ratio.png",
        [*by_ratio, Line("spread evenly", tenths, [0.1] * 10)],
        title=title,
        x_label="tokens by teacher's over student's probability, lowest first (%)",
        y_label="share of the events",
    )
    draw_lines(folder / "events_by_position.png", by_position, title=title, x_label="response position", y_label=label)
    draw_lines(folder / "events_by_rollout.png", by_rollout, title=title, x_label="rollouts, in order", y_label=label)


def marked(rows: list[dict], names: Mapping[str, str], misses) -> list[str]:
    """A table in which what misses its goal is bold."""
    lines = table(rows, names)
    for number, row in enumerate(rows):
        cells = [f"**{cell(row, name)}**" if misses(name, row[name]) else cell(row, name) for name in names]
        lines[number + 2] = f"| {' | '.join(cells)} |"
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--varied", type=Path, default=Path("runs/varied"))
    parser.add_argument("--real", type=Path, default=Path("runs/real"))
    parser.add_argument("--prompts", type=int, default=192, help="of each embedded task")
    parser.add_argument("--real_prompts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("examples/results/three_pairs"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    output = arguments.output_dir
    output.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict]] = {"identity": [], "random": [], "labelled": [], "real": []}
    for pair in pairs(arguments.varied, arguments.real, arguments.prompts, arguments.real_prompts):
        counts = (96, 48) if pair.problems else (32, 16)
        identity, planted = own_teacher(pair, counts, arguments.seed)
        found["identity"] += identity
        found["random"] += planted
        rollouts = sample_inputs(*pair.models.values(), pair.inputs, arguments.seed, 1.0, pair.cap)
        if pair.problems:
            found["labelled"] += labelled(pair, rollouts)
        else:
            found["real"] += unlabelled(rollouts)
            draw_events(rollouts, output)
        print(pair.name, "done", flush=True)
    write_json(output / "three_pairs.json", found)
    numbers = " ".join(f"--{name} {getattr(arguments, name)}" for name in ("prompts", "real_prompts", "seed"))
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    reading = output / "reading.md"
    lines = [
        "# Every drift metric at its default, on three pairs",
        "",
        f"Command: `python examples/diagnostics/three_pairs.py {numbers}`. {describe_hardware()}; {versions}.",
        "",
        *([reading.read_text(encoding="utf-8")] if reading.is_file() else []),
        f"## A model that is its own teacher: share of the tokens flagged, goal at most {GOAL['flagged']:.0%}",
        "",
        *marked(
            found["identity"],
            {name: name for name in found["identity"][0]},
            lambda name, value: name in DEFAULTS and value > GOAL["flagged"],
        ),
        "",
        f"## Random tokens in its text: goal an AUC above {GOAL['auc']}",
        "",
        f"The AUC of single tokens; then that of the mean over the {PLANTED} random tokens of a response against means over "
        f"{PLANTED} of its own.",
        "",
        *marked(
            found["random"],
            {name: name for name in found["random"][0] if not name.endswith(("_low", "_high"))},
            lambda name, value: name in ("auc", "stretch_auc") and value <= GOAL["auc"],
        ),
        "",
        "## Labelled tokens of the student",
        "",
        *table(found["labelled"], {name: name for name in found["labelled"][0] if name not in ("auc_low", "auc_high")}),
        "",
        "## The real pair: shares of the tokens that are events",
        "",
        "Agreed: the teacher gives the token at least half of the student's probability; surprising: less than a tenth; teacher "
        "sure: its first choice has at least 0.9. Spread: variance of the number of events of a rollout, as a multiple of what an "
        "even spread would give.",
        "",
        *table(found["real"], {name: name.removeprefix("mean_") for name in found["real"][0]}),
        "",
        "![Events by position](events_by_position.png)",
        "",
        "![Events by rollout](events_by_rollout.png)",
        "",
        "![Events by likelihood](events_by_ratio.png)",
        "",
    ]
    write_text(output / "README.md", "\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
