"""Students on the Hub with cards that can be trusted, and back again.

cards.py            the card's text and metadata, from records alone      results.py   scores in the Hub's forms
markdown.py         untrusted words in Markdown                           figures.py   how training went
weights.py          weights as files, and what identifies them            records.py   summaries and reports in a folder
student_files.py    which files are published, and in what form           leaks.py     secrets and paths of this machine
student_checks.py   whether a student loads                               bundle.py    all of it, checked and put together
patience.py         calls to a Hub that fails                             access.py    who may write where
commit.py           one commit, exactly once                              publish.py   the whole way to the Hub
download.py         the whole way back                                    commands.py  both, for the command line
"""

from prune_opd_hf.publishing.access import Target
from prune_opd_hf.publishing.bundle import Bundle, CardOptions, build_bundle
from prune_opd_hf.publishing.cards import License, ModelFacts, build_card
from prune_opd_hf.publishing.download import Downloaded, download_student
from prune_opd_hf.publishing.patience import Patience
from prune_opd_hf.publishing.publish import Published, publish_student
from prune_opd_hf.publishing.records import StudentRecords
from prune_opd_hf.publishing.weights import weights_hash

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
    "download_student",
    "publish_student",
    "weights_hash",
]
