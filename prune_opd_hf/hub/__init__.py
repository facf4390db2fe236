"""Students on the Hub with cards that can be trusted, and back again."""

from prune_opd_hf.hub.bundle import Bundle, build_bundle
from prune_opd_hf.hub.card import CardOptions, License, ModelFacts, build_card
from prune_opd_hf.hub.client import Retries
from prune_opd_hf.hub.commit import Target
from prune_opd_hf.hub.download import Downloaded, download_student
from prune_opd_hf.hub.publish import Published, publish_output, publish_student
from prune_opd_hf.records.student_records import StudentRecords

__all__ = [
    "Bundle",
    "CardOptions",
    "Downloaded",
    "License",
    "ModelFacts",
    "Published",
    "Retries",
    "StudentRecords",
    "Target",
    "build_bundle",
    "build_card",
    "download_student",
    "publish_output",
    "publish_student",
]
