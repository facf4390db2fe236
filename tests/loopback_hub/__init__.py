"""A Hub on 127.0.0.1 that speaks the real client's protocol, with users, roles and faults.

    state.py     repositories, commits, large files: what the Hub remembers
    faults.py    what goes wrong, when, and how often
    cards.py     what the Hub demands of a card's metadata
    messages.py  requests and answers
    api.py       the JSON interface
    files.py     uploads and downloads of contents
    xet.py       the same by way of Xet storage
    server.py    sockets

    student_folders.py   tiny students as the trainer leaves them, to be published

The Hub itself uses nothing of the package under test.
"""

from loopback_hub.faults import Fault
from loopback_hub.server import LoopbackHub
from loopback_hub.state import User

__all__ = ["ALICE", "Fault", "LoopbackHub", "User"]

ALICE = User("alice", "token-of-alice")
