"""Students on the Hub with cards that can be trusted, and back again.

card.py        the card, from records alone
results.py     its scores, and the commands that measure them again
markdown.py    untrusted words in Markdown
figures.py     how training went
folder.py      which files of a student are published, and whether it loads
leaks.py       secrets and paths of this machine
publish.py     all of it, checked, put together and sent
commit.py      one commit, exactly once
client.py      calls to a Hub that fails or hangs
download.py    the whole way back
generate_repository.py, hub_generate.py   the decoding loop as a repository of its own
trainer_push.py     a trainer's student by the same way
"""

from prune_opd_hf.hub.card import License, ModelFacts, build_card
from prune_opd_hf.hub.client import Patience
from prune_opd_hf.hub.commit import Target
from prune_opd_hf.hub.download import Downloaded, download_student
from prune_opd_hf.hub.folder import StudentRecords
from prune_opd_hf.hub.generate_repository import build_generate_repository, publish_generate_repository
from prune_opd_hf.hub.publish import Bundle, CardOptions, Published, build_bundle, publish_student
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
