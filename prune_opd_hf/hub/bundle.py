"""What would be published of a student's folder, put together and checked before anything leaves the machine.

A bundle is a mapping from paths in the repository to content: weights stay where they are on disk, texts are held in
memory. Only files that a reader of a student needs are taken; checkpoints, optimizer states, logs and pickles stay here.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from prune_opd_hf.errors import InputError, PruneOPDError, PublishError
from prune_opd_hf.hub.card import CardOptions, ModelFacts, build_card
from prune_opd_hf.hub.client import is_hub_id, is_local
from prune_opd_hf.hub.folder import (
    CARD_FILE,
    adapter_base,
    refuse_leaks,
    student_facts,
    student_files,
)
from prune_opd_hf.hub.leaks import Machine
from prune_opd_hf.hub.results import eval_results_files
from prune_opd_hf.records.student_records import StudentRecords
from prune_opd_hf.records.training_figures import training_figures
from prune_opd_hf.records.training_summary import TrainingSummary
from prune_opd_hf.records.weights import ADAPTER_CONFIG, weights_hash


@dataclass(frozen=True)
class Bundle:
    """A student, ready to be published.

    Attributes:
        files: content by path in the repository: a file on disk, or the bytes themselves.
        card: what stands in README.md.
        facts: what the student is.
        model_hash: identifies its weights.
        left_out: files of the folder that stay here.
        warnings: what a reader of the card will miss.
    """

    files: Mapping[str, Path | bytes]
    card: ModelCard
    facts: ModelFacts
    model_hash: str
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]

    def describe(self) -> str:
        """What will be uploaded and how large it is, one line a file."""
        sizes = {
            path: len(content) if isinstance(content, bytes) else content.stat().st_size
            for path, content in sorted(self.files.items())
        }
        lines = [f"{size:>15,} B  {path}" for path, size in sizes.items()]
        total = f"{sum(sizes.values()):>15,} B"
        lines.append(f"{total}  in {len(sizes)} files, weights {self.model_hash[:19]}")
        if self.left_out:
            shown = ", ".join(self.left_out[:8]) + (", ..." if len(self.left_out) > 8 else "")
            lines.append(f"left out: {shown}")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the folder that would be uploaded, atomically.

        Raises:
            PublishError: the folder exists and is not empty, or cannot be written.
        """
        target = Path(folder)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise PublishError(f"{target} exists and is not empty: name another folder, nothing was written")
        try:
            target.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target, prefix=".unfinished-") as unfinished:
                for path, content in self.files.items():
                    place = Path(unfinished) / path
                    place.parent.mkdir(parents=True, exist_ok=True)
                    if isinstance(content, bytes):
                        place.write_bytes(content)
                    else:
                        shutil.copyfile(content, place)
                for written in Path(unfinished).iterdir():
                    written.rename(target / written.name)
        except OSError as error:
            raise PublishError(
                f"{target} could not be written ({error.strerror}): make room or name another folder; nothing was left there"
            ) from error
        return target


def build_bundle(
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    repo_id: str | None = None,
    records: StudentRecords | None = None,
    options: CardOptions | None = None,
    token: str | None = None,
    figures: bool = True,
) -> Bundle:
    """Check a student's folder and put together what would be published. Needs no network.

    Args:
        folder: as `save_pretrained` and the trainer write it.
        name: what the card calls it; by default the last part of `repo_id`, else the folder's name.
        repo_id: where it will be.
        records: training summary and evaluation reports; by default those that lie in the folder.
        options: what the card says beyond them.
        token: the Hub token in use, which must not appear in any file.
        figures: whether to draw how training went (needs matplotlib; without it they are left out with a warning).

    Raises:
        PublishError: everything in the folder that stands against publishing, each with its remedy.
        LeakError: a secret or a path of this machine stands in what would be published.
    """
    root, options = Path(folder), options or CardOptions()
    if not root.is_dir():
        raise PublishError(f"{folder} is not a folder: name the one that the trained student was saved to")
    facts, model_hash, files, records = _checked(root, records)
    captions: dict[str, str] = {}
    drawn: dict[str, bytes] = {}
    warnings: list[str] = []
    if figures and records.training is not None:
        try:
            captions, drawn = training_figures(records.training)
        except InputError as error:
            warnings.append(f"the card has no figures: {error}")
    card = build_card(
        records,
        name=name or (repo_id or root.resolve().name).rsplit("/", 1)[-1],
        repo_id=repo_id,
        facts=facts,
        figures=captions,
        options=options,
    )
    texts = {**eval_results_files(records.reports), CARD_FILE: str(card)}
    files = {**files, **records.files(), **drawn, **{path: text.encode() for path, text in texts.items()}}
    refuse_leaks(files, Machine.here(root, token), _namespaces(repo_id, records))
    taken = {path.split("/")[0] for path in files}
    return Bundle(
        files=files,
        card=card,
        facts=facts,
        model_hash=model_hash,
        left_out=tuple(path.name + "/" * path.is_dir() for path in sorted(root.iterdir()) if path.name not in taken),
        warnings=(*warnings, *_missing(root, records, options, card)),
    )


def _checked(
    root: Path, records: StudentRecords | None
) -> tuple[ModelFacts, str, dict[str, Path | bytes], StudentRecords]:
    """What the folder holds, after every check; faults of its files and of its records are reported together."""
    problems: list[PruneOPDError] = []
    try:
        facts, files, model_hash = student_facts(root), student_files(root), weights_hash(root)
    except PruneOPDError as error:
        problems.append(error)
    try:
        records = records or StudentRecords.load(root)
        if not problems:
            for report in records.reports:
                if report.model_hash != model_hash:
                    raise PublishError(
                        f"the report on {', '.join(result.name for result in report.benchmarks)} was made with other weights "
                        f"({report.model_hash[:19]}) than those in the folder ({model_hash[:19]}): evaluate these, or leave it out"
                    )
            training = _published_names(records.training, adapter_base(root) if facts.adapter else None)
            return facts, model_hash, files, replace(records, training=training)
    except PruneOPDError as error:
        problems.append(error)
    if len(problems) == 1:
        raise PublishError(f"{root.resolve().name} cannot be published: {problems[0]}") from problems[0]
    listed = "; ".join(f"({number}) {error}" for number, error in enumerate(problems, start=1))
    raise PublishError(f"{root.resolve().name} cannot be published, for {len(problems)} reasons: {listed}")


def _published_names(training: TrainingSummary | None, adapter_base: str | None) -> TrainingSummary | None:
    """The summary with names that mean the same to others: an adapter's own base, and no relative path taken for a Hub id."""
    if training is None:
        return None
    names: dict[str, Any] = {name: getattr(training, name) for name in ("dataset", "student_base", "teacher")}
    if adapter_base is not None:
        if is_hub_id(training.student_base) and training.student_base != adapter_base:
            raise PublishError(
                f"the training summary names {training.student_base} as base, {ADAPTER_CONFIG} names {adapter_base}: "
                "publish the records of this adapter"
            )
        names["student_base"] = adapter_base
    names = {name: f"{Path(value).name} (local)" if is_local(value) else value for name, value in names.items()}
    return replace(training, **names)


def _namespaces(repo_id: str | None, records: StudentRecords) -> set[str]:
    """Owners of the repositories that the records name; a user may be called the same here and there."""
    training = records.training
    named = [repo_id] if training is None else [repo_id, training.student_base, training.teacher, training.dataset]
    for report in (*records.reports, *(report for reports in records.comparisons.values() for report in reports)):
        named += [report.model_name, *(result.source for result in report.benchmarks)]
    return {name.split("/")[0] for name in named if name is not None and is_hub_id(name)}


def _missing(root: Path, records: StudentRecords, options: CardOptions, card: ModelCard) -> list[str]:
    base, own = records.training and records.training.student_base, root / CARD_FILE
    warnings = {
        "no training summary: the card cannot say how the student was trained": records.training is None,
        "the base model is not a repository on the Hub: the card has no base_model": base and not is_hub_id(base),
        "no evaluation report: the card makes no claim (prune-opd evaluate writes one)": not records.reports,
        "no licence: the card says that its publisher states none (--license)": options.license is None,
        f"the folder's {CARD_FILE} stays here: the card is made from the records. Say more with --limitations, or edit it "
        "on the Hub afterwards": own.is_file() and own.read_text(encoding="utf-8", errors="replace") != str(card),
    }
    return [warning for warning, holds in warnings.items() if holds]
