"""The drift viewer: stored rollouts as one HTML file that needs no network.

visible.py    token ids as text in which nothing is hidden: controls, bidi marks and half characters become signs
encoding.py   rollouts as compact blocks of bytes, one pair for each rollout, and their summary numbers
document.py   the HTML file: template, styles and scripts of `page/` under a strict content security policy
page/         what runs in the browser, plain JavaScript without a library

The browser unpacks a rollout when it is looked at and draws only the lines that are in sight.
"""

from prune_opd_hf.viewer.document import write_drift_view

__all__ = ["write_drift_view"]
