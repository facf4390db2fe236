"""The `evaluate` metric module of this package: `evaluate.load(METRIC_PATH)`, which works offline."""

from pathlib import Path

METRIC_PATH = str(Path(__file__).parent)
"""What to pass to `evaluate.load`."""
