"""The records that travel with a student: where they lie in its folder and repository, and how they are read back."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prune_opd_hf.errors import FileFormatError
from prune_opd_hf.records.evaluation_report import EvaluationReport
from prune_opd_hf.records.training_summary import SUMMARY_FILE, TrainingSummary

REPORTS_FOLDER = "evaluation"
COMPARISONS_FOLDER = "evaluation/comparisons"
REPORT_FILES = "[!.]*.json"  # not what a kill or a Mac leaves beside them


@dataclass(frozen=True)
class StudentRecords:
    """How a student was trained and how well it does.

    Attributes:
        training: None where no summary came with it.
        reports: of the student itself.
        comparisons: of other models, by the name of their column in the card.
    """

    training: TrainingSummary | None = None
    reports: tuple[EvaluationReport, ...] = ()
    comparisons: Mapping[str, tuple[EvaluationReport, ...]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "StudentRecords":
        """Read the records of a folder, as `files` named them; those that are not there are left empty.

        Raises:
            FileFormatError: a record is damaged or of a version this package does not read.
        """
        root = Path(folder)
        training = TrainingSummary.load(root) if (root / SUMMARY_FILE).is_file() else None
        places = [place for place in sorted((root / COMPARISONS_FOLDER).glob("*")) if place.is_dir()]
        comparisons = {re.sub(r"^[0-9]{2}-", "", place.name): load_reports([place]) for place in places}
        return cls(training, load_reports(sorted((root / REPORTS_FOLDER).glob(REPORT_FILES))), comparisons)

    def files(self) -> dict[str, bytes]:
        """The records' content by path in the repository."""
        found: dict[str, bytes] = {}
        if self.training is not None:
            found[SUMMARY_FILE] = self.training.to_json().encode()
        places = {REPORTS_FOLDER: self.reports}
        for number, (column, reports) in enumerate(self.comparisons.items()):  # numbered, to come back in order
            places[f"{COMPARISONS_FOLDER}/{number:02d}-{_file_name(column)}"] = reports
        for place, reports in places.items():
            for number, report in enumerate(reports):
                name = _file_name("-".join(result.name for result in report.benchmarks))
                found[f"{place}/{number:02d}-{name}.json"] = report.to_json().encode()
        return found


def load_reports(paths: Sequence[str | os.PathLike[str]]) -> tuple[EvaluationReport, ...]:
    """Reports from files and from folders of files.

    Raises:
        FileFormatError: a path does not exist, a folder holds none, or a file is no report.
    """
    reports: list[EvaluationReport] = []
    for path in map(Path, paths):
        files = sorted(path.glob(REPORT_FILES)) if path.is_dir() else [path]
        if not files or not path.exists():
            raise FileFormatError(f"{path} does not exist or holds no report: name one that prune-opd evaluate wrote")
        reports += map(EvaluationReport.load, files)
    return tuple(reports)


def _file_name(words: str) -> str:
    """`words` as a file's name, readable and harmless on every system.

    Example:
        >>> _file_name("base student"), _file_name("../a:b"), _file_name("🙂")
        ('base student', 'a b', 'other')
    """
    return re.sub(r"[^A-Za-z0-9_+-]+", " ", words).strip()[:80] or "other"
