"""What a preflight found: one record, as text for a terminal, as JSON and as figures with their numbers in CSV."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from prune_opd_hf.preflight.pair_checks import Check
from prune_opd_hf.preflight.settings_grid import AGREED, MOST_FALSE_ALARMS, SURPRISING, GridRow, Recommendation
from prune_opd_hf.preflight.step_cost import StepCost
from prune_opd_hf.preflight.step_memory import StepMemory
from prune_opd_hf.records.figures import Line, can_draw, draw_lines, draw_points
from prune_opd_hf.records.files import SavedRecord

SHOWN_ROWS = 12
"""Settings in the printed table; all of them are in the JSON."""

USUAL = (("weighted_overlap", 0.5, 0.01), ("overlap", 0.7, 0.01))
"""Metric, threshold and drop of the default and of the published scripts."""

LEVEL_STYLES = {"fine": "green", "note": "cyan", "warning": "yellow", "stop": "bold red"}

COLUMNS = ("setting", "false alarms", "detection", "kept", "stopped", "agreed lost", "step")
LEGEND = f"""\
setting       metric, top k, threshold and weight drop
agreed        a token's probability by the teacher is at least {AGREED:g} of the student's
surprising    it is less than {SURPRISING:g} of the student's
false alarms  share of the agreed tokens that are drift events
detection     share of the surprising tokens that are drift events
kept          tokens that enter the loss, as a share of those without pruning
stopped       share of the rollouts that drift ends early
agreed lost   share of the agreed tokens that are cut
step          projected time of a step, as a share of that without pruning"""
"""The words of the table; each line fits a terminal of 80 columns. What else is known of a setting is in the JSON."""


@dataclass(frozen=True)
class PositionBand:
    """Agreement in one range of response positions.

    Attributes:
        first, last: the range, counted from 0, both included.
        rollouts: how many reach it.
        overlap: of their mean overlap there, over all recorded candidates: mean, 10th and 90th percentile over the rollouts.
        mass: the same of the shared mass.
        agreed: share of tokens that the teacher finds at least half as likely as the student.
    """

    first: int
    last: int
    rollouts: int
    overlap: tuple[float, float, float]
    mass: tuple[float, float, float]
    agreed: float


@dataclass(frozen=True)
class EventSummary:
    """Drift events under one setting.

    Attributes:
        setting: its name.
        events_per_rollout: 10th, 50th and 90th percentile.
        first_event: percentiles of the position of the first event, over rollouts that have one.
        without_events: share of rollouts.
        cumulative: mean number of events so far at the end of each of the bands.
    """

    setting: str
    events_per_rollout: tuple[float, float, float]
    first_event: tuple[float, float, float] | None
    without_events: float
    cumulative: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class PreflightReport(SavedRecord):
    """Whether a pair fits, and what pruning would save.

    Attributes:
        student, teacher: names.
        checks: what was looked at.
        memory: bytes of a step, by part.
        memory_available: name and bytes of the device; None where unknown.
        rollouts, tokens: how many were sampled.
        mean_length, longest: response tokens of a rollout.
        stop_reasons: rollouts by how they ended.
        bands: agreement by position.
        events: under the default, the published and the recommended setting.
        cost: fitted seconds; None where nothing was generated.
        unpruned_seconds: projected for a step of as many rollouts without pruning.
        grid: what every setting makes of the rollouts.
        recommendation: what to do.
        top_k: candidates recorded at each position.
        check_every, min_length: as replayed.
        hardware, versions: what it ran on.
    """

    KIND: ClassVar[str] = "prune_opd_hf.preflight_report"
    FILE_NAME: ClassVar[str] = "preflight.json"

    student: str
    teacher: str
    checks: tuple[Check, ...]
    memory: StepMemory
    memory_available: tuple[str, int] | None
    rollouts: int = 0
    tokens: int = 0
    mean_length: float = 0.0
    longest: int = 0
    stop_reasons: Mapping[str, int] = field(default_factory=dict)
    bands: tuple[PositionBand, ...] = ()
    events: tuple[EventSummary, ...] = ()
    cost: StepCost | None = None
    unpruned_seconds: float = 0.0
    grid: tuple[GridRow, ...] = ()
    recommendation: Recommendation
    top_k: int
    check_every: int
    min_length: int
    hardware: str
    versions: Mapping[str, str]

    @property
    def works(self) -> bool:
        """Whether this pair can be distilled."""
        return self.recommendation.works

    def show(self, console: Console) -> None:

        def line(text: str) -> None:
            console.print(text, highlight=False)

        line(f"[bold]Preflight[/bold]: student {escape(self.student)}, teacher {escape(self.teacher)}")
        for check in self.checks:
            level = f"  [{LEVEL_STYLES[check.level]}]{check.level:<7}[/] {check.name}: "
            console.print(level + escape(check.message), highlight=False, soft_wrap=True)
        console.print(self._memory_table())
        if self.memory.most_tokens is not None:
            most = f"{self.memory.most_tokens:,}" if self.memory.most_tokens else "none"
            line(f"The largest max_tokens_per_micro_batch that fits: {most}")
        if self.rollouts:
            ended = ", ".join(f"{count} {reason}" for reason, count in self.stop_reasons.items() if count)
            line(
                f"{self.rollouts} unpruned rollouts, {self.tokens:,} tokens, {self.mean_length:.0f} each on average, "
                f"{self.longest} at most ({ended})."
            )
            console.print(self._band_table())
            for events in self.events:
                line(_event_line(events))
            console.print(self._grid_table())
            line(f"{LEGEND}\n")
        chosen = self.recommendation.row
        style = "bold red" if not self.works else "bold green" if chosen else "bold cyan"
        for reason in self.recommendation.reason:
            console.print(reason, style=style, highlight=False, markup=False)
        if chosen is not None:
            for name, value in asdict(chosen.config).items():
                line(f"  drift_{name}: {value}")
            line(f"  check_every: {self.check_every}")

    def _memory_table(self) -> Table:
        moments = {"": self.memory.always, "generation: ": self.memory.generation, "update: ": self.memory.update}
        sizes = {f"{moment}{part}": size for moment, parts in moments.items() for part, size in parts.items()}
        sizes["peak, in generation or update"] = self.memory.peak
        if self.memory_available is not None:
            sizes[f"{self.memory_available[0]} has"] = self.memory_available[1]
        rows = [(name, f"{size / 2**30:.3g}") for name, size in sizes.items()]
        return _table("Memory of a training step", ("part", "GiB"), rows)

    def _band_table(self) -> Table:
        names = ("positions", "rollouts", f"overlap, top {self.top_k}", "shared mass", "agreed tokens")
        rows = [
            (
                f"{band.first}-{band.last}",
                str(band.rollouts),
                "{:.2f} [{:.2f}, {:.2f}]".format(*band.overlap),
                "{:.2f} [{:.2f}, {:.2f}]".format(*band.mass),
                f"{band.agreed:.0%}",
            )
            for band in self.bands
        ]
        return _table("Agreement by position: mean over rollouts [10th, 90th percentile]", names, rows)

    def _grid_table(self) -> Table:
        chosen, rows = self.recommendation.row, []
        for row in shown_rows(self.grid, chosen):
            shares = row.false_alarms, row.detection, row.kept_share, row.stopped_share, row.agreed_lost, row.step_share
            percent = ("-" if share is None else f"{share:.0%}" for share in shares)
            config = row.config
            setting = f"{config.metric} {config.top_k}, {config.threshold:g}, {config.weight_drop:g}"
            rows.append((f"{'→' if row == chosen else ' '} {setting}", *percent))
        unpruned = f"{self.unpruned_seconds:.3g} s without pruning"
        title = f"Settings by replay; a step of {self.rollouts} rollouts is projected at {unpruned}"
        return _table(title, COLUMNS, rows, gap=0)


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]], gap: int = 1) -> Table:
    """A table for terminals of 80 columns; `gap`: spaces between columns beyond the first."""
    columns = Column(names[0], no_wrap=True), *(Column(name, justify="right") for name in names[1:])
    look: dict[str, Any] = {"box": SIMPLE_HEAD, "show_edge": False, "padding": (0, gap, 0, 0)}
    table = Table(*columns, title=f"\n{title}", title_justify="left", **look)
    for row in rows:
        table.add_row(*row)
    return table


def _event_line(events: EventSummary) -> str:
    first = "no rollout has any"
    if events.first_event is not None:
        first = "the first at position {1:.0f} [{0:.0f}, {2:.0f}]".format(*events.first_event)
    counts = "{1:.0f} a rollout [{0:.0f}, {2:.0f}]".format(*events.events_per_rollout)
    return f"Drift events, {events.setting}: {counts}, {first}; {events.without_events:.0%} of the rollouts have none."


def shown_rows(rows: Sequence[GridRow], chosen: GridRow | None) -> list[GridRow]:
    """The chosen, the default and the published setting, and for each metric, k and threshold the cheapest drop with few false
    alarms, up to `SHOWN_ROWS`."""
    by_name: dict[tuple[str, float, float], GridRow] = {}
    for row in sorted(rows, key=lambda row: row.config.top_k):
        by_name[row.config.metric, row.config.threshold, row.config.weight_drop] = row
    first = [row for row in (chosen, *map(by_name.get, USUAL)) if row is not None]
    best: dict[tuple[str, int, float], GridRow] = {}
    for row in sorted(rows, key=lambda row: (row.false_alarms or 0.0, row.step_seconds)):
        best.setdefault((row.config.metric, row.config.top_k, row.config.threshold), row)
    others = sorted(best.values(), key=lambda row: ((row.false_alarms or 0.0) > MOST_FALSE_ALARMS, row.step_seconds))
    return list(dict.fromkeys([*first, *others]))[:SHOWN_ROWS]


def draw_preflight(report: PreflightReport, folder: str | os.PathLike[str]) -> list[Path]:
    """Draw agreement by position, drift events and settings; nothing for a pair that was ruled out before any rollout, nor where
    figures cannot be drawn."""
    target, bands, row = Path(folder), report.bands, report.recommendation.row
    if not bands or not can_draw():
        return []
    middles = [(band.first + band.last) / 2 for band in bands]
    position = "response position (middle of the band)"
    agreement = [
        Line(f"overlap of the top {report.top_k}", middles, *zip(*(band.overlap for band in bands), strict=True)),
        Line("shared mass", middles, *zip(*(band.mass for band in bands), strict=True)),
        Line("share of agreed tokens", middles, [band.agreed for band in bands]),
    ]
    points: dict[str, list[tuple[float, float, str]]] = {}
    for setting in report.grid:
        point = (setting.false_alarms or 0.0, setting.step_share, setting.setting)
        points.setdefault(setting.config.metric, []).append(point)
    return [
        draw_lines(
            target / "agreement_by_position.png",
            agreement,
            title="Agreement by position: mean, 10th to 90th percentile of rollouts",
            x_label=position,
            y_label="agreement",
            y_range=(0, 1.02),
        ),
        draw_lines(
            target / "drift_events.png",
            [Line(events.setting, middles, events.cumulative) for events in report.events],
            title="Drift events so far: mean over the rollouts that get there",
            x_label=position,
            y_label="events so far",
        ),
        draw_points(
            target / "settings.png",
            points,
            title="Settings by replay: cheap and few false alarms is good (bottom left)",
            x_label="share of agreed tokens flagged as drift",
            y_label="projected step time, share of unpruned",
            marked=None if row is None else (row.false_alarms or 0.0, row.step_share, "recommended"),
            x_range=(-0.02, 1.02),
            y_range=(0, 1.05),
        ),
    ]
