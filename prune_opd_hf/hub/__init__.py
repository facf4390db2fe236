"""Students on the Hub with cards that can be trusted, and back again.

cards.py            the card, from records alone
card_tables.py      its results
card_code.py        its snippet and commands
card_template.py    how its template prints
markdown.py         untrusted words in Markdown
results.py          scores in the Hub's forms
figures.py          how training went
weights.py          weights as files, and what identifies them
records.py          summaries and reports in a folder
student_files.py    which files are published, and in what form
student_checks.py   whether a student loads
leaks.py            secrets and paths of this machine
bundle.py           all of it, checked and put together
hub_ids.py          names of repositories
access.py           who may write where
patience.py         calls to a Hub that fails
time_limit.py       and to one that hangs
commit.py           one commit, exactly once
publish.py          the whole way to the Hub
download.py         the whole way back
generate_repository.py, hub_generate.py   the decoding loop as a repository of its own
trainer_push.py     a trainer's student by the same way
commands.py         `prune-opd publish` and `prune-opd download`
"""

from prune_opd_hf.hub.access import Target
from prune_opd_hf.hub.bundle import Bundle, CardOptions, build_bundle
from prune_opd_hf.hub.cards import License, ModelFacts, build_card
from prune_opd_hf.hub.download import Downloaded, download_student
from prune_opd_hf.hub.generate_repository import build_generate_repository, publish_generate_repository
from prune_opd_hf.hub.patience import Patience
from prune_opd_hf.hub.publish import Published, publish_student
from prune_opd_hf.hub.records import StudentRecords
from prune_opd_hf.records.weights import weights_hash

__all__ = [
    "Bundle",
    "CardOptions",
    "Downloaded",
    "License",
    "ModelFacts",
    "Patience",
    "Published",
    "StudentRecords",
    "Target",
    "build_bundle",
    "build_card",
    "build_generate_repository",
    "download_student",
    "publish_generate_repository",
    "publish_student",
    "weights_hash",
]
