"""The figures of a preflight, each with its numbers as CSV."""

import os
from pathlib import Path

from prune_opd_hf.preflight.report import PreflightReport
from prune_opd_hf.records.figures import Line, draw_lines, draw_points


def draw_preflight(report: PreflightReport, folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Draw what there is to draw.

    Returns:
        File by caption; none for a pair that was ruled out before any rollout.
    """
    target = Path(folder)
    if not report.bands:
        return {}
    middles = [(band.first + band.last) / 2 for band in report.bands]
    figures = {
        "Agreement by position, with the 10th to 90th percentile of the rollouts": draw_lines(
            target / "agreement_by_position.png",
            [
                Line(
                    f"overlap of the top {report.top_k}",
                    middles,
                    [band.overlap for band in report.bands],
                    [band.overlap_low for band in report.bands],
                    [band.overlap_high for band in report.bands],
                ),
                Line(
                    "shared mass",
                    middles,
                    [band.mass for band in report.bands],
                    [band.mass_low for band in report.bands],
                    [band.mass_high for band in report.bands],
                ),
                Line("share of agreed tokens", middles, [band.agreed for band in report.bands]),
            ],
            title="Agreement by position: mean, 10th to 90th percentile of rollouts",
            x_label="response position (middle of the band)",
            y_label="agreement",
            y_range=(0, 1.02),
        ),
        "Drift events so far by position": draw_lines(
            target / "drift_events.png",
            [Line(events.setting, middles, list(events.cumulative)) for events in report.events],
            title="Drift events so far: mean over the rollouts that get there",
            x_label="response position (middle of the band)",
            y_label="events so far",
        ),
    }
    metrics = list(dict.fromkeys(row.metric for row in report.grid))
    chosen = report.recommendation.row
    groups = {
        metric: [(row.false_alarms or 0.0, row.step_share, row.setting) for row in report.grid if row.metric == metric]
        for metric in metrics
    }
    figures["What each setting saves, and what it flags in error"] = draw_points(
        target / "settings.png",
        groups,
        title="Settings by replay: cheap and few false alarms is good (bottom left)",
        x_label="share of agreed tokens flagged as drift",
        y_label="projected step time, share of unpruned",
        marked=None if chosen is None else (chosen.false_alarms or 0.0, chosen.step_share, "recommended"),
        x_range=(-0.02, 1.02),
        y_range=(0, 1.05),
    )
    return figures
