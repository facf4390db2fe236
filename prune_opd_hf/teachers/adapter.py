"""The base of an adapter as its own teacher: one model in memory, the adapter switched off while it is asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prune_opd_hf.teachers.local import Teacher, TeacherScores


class BaseOfAdapter(Teacher):
    """A `Teacher` that is the model below a PEFT adapter, as it was before the adapter was trained.

    Args:
        model: the PEFT model; its adapter stays where it is.
        arguments: as for `Teacher`.
    """

    def __init__(self, model: Any, **arguments: Any) -> None:
        self._adapted = model
        super().__init__(model, **arguments)

    @torch.no_grad()
    def score(self, *args: Any, **kwargs: Any) -> TeacherScores:
        """As `Teacher.score`, without the adapter."""
        with self._adapted.disable_adapter():
            return super().score(*args, **kwargs)


@contextmanager
def asking(teacher: Teacher) -> Iterator[nn.Module]:
    """The teacher's model, ready for a forward pass of its own: in evaluation mode, which it may have left if it is the student
    as well, outside of autocast, and without the student's adapter."""
    model = teacher.model
    training = model.training
    model.eval()
    try:
        with torch.autocast(teacher.device.type, enabled=False):
            if isinstance(teacher, BaseOfAdapter):
                with teacher._adapted.disable_adapter():
                    yield model
            else:
                yield model
    finally:
        model.train(training)
