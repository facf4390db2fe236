"""The model below a PEFT adapter as a teacher: one copy of the weights, the adapter switched off while the teacher is asked."""

from contextlib import AbstractContextManager
from typing import Any

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.teachers.local import LocalTeacher


class AdapterBaseTeacher(LocalTeacher):
    """A `LocalTeacher` that is the model below an adapter, as it was before the adapter was trained.

    Raises:
        ConfigError: the adapter trains biases of the model itself, which stay when it is switched off.
    """

    def __init__(self, model: Any, **arguments: Any) -> None:
        if any(getattr(config, "bias", "none") != "none" for config in model.peft_config.values()):
            raise ConfigError("the student's adapter trains biases of the teacher below it: bias must be 'none'")
        self._adapted = model
        super().__init__(model, **arguments)

    def while_asked(self) -> AbstractContextManager:
        """Without the adapter."""
        return self._adapted.disable_adapter()
