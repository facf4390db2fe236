"""What this package raises and warns of. Exceptions have one root, and each is also the standard type that callers would catch."""

import logging
from functools import cache


class PruneOPDError(Exception):
    """Root of every error this package raises on purpose.

    Example:
        >>> try:
        ...     raise ConfigError("top_k must be at least 1, got 0")
        ... except PruneOPDError as error:
        ...     print(error)
        top_k must be at least 1, got 0
    """


class ConfigError(PruneOPDError, ValueError):
    """A setting is outside its range, unknown, or contradicts another setting."""


class InputError(PruneOPDError, ValueError):
    """An argument has the wrong shape, the wrong padding or a value that cannot be worked with."""


class UnsupportedGenerationError(PruneOPDError, ValueError):
    """A decoding mode or model family that the drift monitor cannot follow."""


class VocabularyMismatchError(PruneOPDError, ValueError):
    """Teacher and student do not give the same meaning to the same token ids."""


class NonFiniteLogitsError(PruneOPDError, ArithmeticError):
    """A model returned NaN or infinite logits; the message names the model and the position.

    Attributes:
        row, token: the position among what was scored, where one is known.
    """

    def __init__(self, message: str, *, row: int | None = None, token: int | None = None) -> None:
        super().__init__(message)
        self.row, self.token = row, token


class MonitorStateError(PruneOPDError, RuntimeError):
    """A drift monitor was used outside its order: twice, unfinished, or on tokens it did not see."""


class FileFormatError(PruneOPDError, ValueError):
    """A file is cut short, of another kind, or of a version this package does not read."""


class DiskFullError(PruneOPDError, OSError):
    """There is no room for what should be written; the message names the place."""


class PublishError(PruneOPDError, ValueError):
    """A student's folder is not fit to be published; the message names every reason and its remedy."""


class LeakError(PublishError):
    """A secret or a path of this machine stands in what would be published; the message never repeats it."""


class HubError(PruneOPDError, ConnectionError):
    """The Hub refused, failed or did not confirm; the message says what is there now and what to do."""


class HubAccessError(HubError, PermissionError):
    """No token, a token that may not write, or a namespace of somebody else. Nothing was uploaded."""


class ServingError(PruneOPDError, ConnectionError):
    """A server that samples is not there, fails, hangs or refuses; the message names its URL and the remedy."""


class TrainingStoppedError(PruneOPDError, RuntimeError):
    """A training run could not go on; the message says why and where its last checkpoint lies."""


@cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning, unless this process has logged it before."""
    logger.warning("%s", message)
