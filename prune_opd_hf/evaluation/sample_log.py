"""Samples on disk, written as they come, so that a killed run continues where it stopped.

One JSON line a sample, one file a process. A run begins with a line that states how it samples; a folder never mixes runs that
sample differently. A last line that the kill left incomplete is dropped, and its sample generated again.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TextIO

from pydantic import Field

from prune_opd_hf.errors import ConfigError, FileFormatError
from prune_opd_hf.records.files import FREE_TEXT, parse_record, printable, read_json
from prune_opd_hf.records.folders import naming_full_disk

_PATTERN = "samples-*.jsonl"
_Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Sample:
    """One generated response.

    Attributes:
        prompt_hash: of the prompt's tokens.
        problem, sample: which sample of which problem, from 0.
        prompt_tokens, response_tokens: their numbers; the token that ended the response is counted.
        ended: whether it ended by itself; otherwise it was truncated at the length limit.
        seconds: since that process's sample before.
    """

    benchmark: str
    prompt_hash: str
    problem: _Count
    sample: _Count
    response: str = field(metadata=FREE_TEXT)
    prompt_tokens: _Count
    response_tokens: _Count
    ended: bool
    process: _Count
    seconds: Annotated[float, Field(ge=0)]

    @property
    def key(self) -> tuple[str, int, int]:
        """What makes it this sample, whatever the benchmark's name and the process."""
        return self.prompt_hash, self.problem, self.sample


def read_samples(folder: str | os.PathLike[str]) -> Iterator[Sample]:
    """Every sample that evaluations have left in a folder, in the order of its files."""
    records = (record for path in sorted(Path(folder).glob(_PATTERN)) for record in _records(path))
    return (record for record in records if isinstance(record, Sample))


class SampleLog(contextlib.AbstractContextManager):
    """The samples of one folder, read at the start and written by one process. Use it as a context manager.

    Args:
        folder: is made where it is missing; None keeps nothing on disk.
        sampling: what must be equal for samples to belong together: weights, settings, engine.
        process: index of this process.

    Raises:
        ConfigError: the folder holds samples that were drawn otherwise, or another run is writing there.
        FileFormatError: a file there is no such log.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, sampling: Mapping[str, Any], process: int = 0) -> None:
        self.samples: dict[tuple[str, int, int], Sample] = {}
        self._stream: TextIO | None = None
        if folder is None:
            return
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        for path in sorted(root.glob(_PATTERN)):
            self._read(path, sampling)
        path = root / _PATTERN.replace("*", f"{process:05d}")
        self._stream = path.open("a", encoding="ascii")
        try:
            _lock(self._stream, path)
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # an incomplete last line
            self._write({"sampling": dict(sampling)})
        except BaseException:
            self.close()
            raise

    def append(self, sample: Sample) -> None:
        """Keep a sample; it is on its way to the disk when this returns."""
        self.samples[sample.key] = sample
        self._write(asdict(sample))

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self, record: dict[str, Any]) -> None:
        if self._stream is not None:
            with naming_full_disk(self._stream.name):
                self._stream.write(json.dumps(record) + "\n")
                self._stream.flush()

    def _read(self, path: Path, sampling: Mapping[str, Any]) -> None:
        changed = None
        for record in _records(path):
            if not isinstance(record, Sample):  # a run that ended before its first sample binds nobody
                changed = sorted(name for name in {*record, *sampling} if record.get(name) != sampling.get(name))
            elif changed is None:
                raise FileFormatError(f"{path.name} begins with a sample of unknown settings: choose another folder")
            elif changed:
                raise ConfigError(
                    f"{path.parent.name}/ holds samples that were drawn otherwise ({printable(', '.join(changed))} differ): "
                    "choose another folder, or evaluate with the same settings to continue"
                )
            else:
                self.samples[record.key] = record


def _records(path: Path) -> Iterator[Sample | dict[str, Any]]:
    """Samples of one file, and the settings before them. What follows the last line end is incomplete."""
    *lines, _ = path.read_bytes().decode("ascii", "surrogateescape").split("\n")
    for number, line in enumerate(lines, start=1):
        what = f"sample (line {number} of {path.name}; delete it, or choose another folder)"
        record = read_json(line, what)
        if set(record) == {"sampling"} and isinstance(record["sampling"], dict):
            yield record["sampling"]
        else:
            yield parse_record(Sample, record, f"not a valid {what}")


def _lock(stream: TextIO, path: Path) -> None:
    """Until the stream is closed, or its process dies, nobody else writes to the file; where the system knows such locks."""
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another evaluation is writing to {path.parent.name}/: let it end, or choose another folder"
            ) from None
        except OSError:
            return  # a file system without locks
