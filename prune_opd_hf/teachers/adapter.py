"""The model below a PEFT adapter as a teacher: one copy of the weights, the adapter switched off while the teacher is asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prune_opd_hf.teachers.base import TeacherScores
from prune_opd_hf.teachers.local import LocalTeacher
from prune_opd_hf.teachers.ragged import RaggedRows


class AdapterBaseTeacher(LocalTeacher):
    """A `LocalTeacher` that is the model below an adapter, as it was before the adapter was trained."""

    def __init__(self, model: Any, **arguments: Any) -> None:
        self._adapted = model
        super().__init__(model, **arguments)

    def score(self, *args: Any, **kwargs: Any) -> TeacherScores:
        with self._adapted.disable_adapter():
            return super().score(*args, **kwargs)

    def add_rows(self, *args: Any, **kwargs: Any) -> None:
        with self._adapted.disable_adapter():
            super().add_rows(*args, **kwargs)

    def follow_rows(self) -> RaggedRows:
        super().follow_rows()
        return RaggedRows(self, self._adapted.disable_adapter)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with super()._alone(), self._adapted.disable_adapter():
            yield
