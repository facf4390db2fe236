"""Folders to write to: what may not be used, and what is said of a full disk."""

import errno
import shutil
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from prune_opd_hf.errors import ConfigError, DiskFullError
from prune_opd_hf.records.folders import FULL, check_folder, check_room, naming_full_disk, refuse_used_folder


def test_a_folder_that_holds_something_is_refused_and_an_empty_or_new_one_is_not(tmp_path):
    refuse_used_folder(tmp_path)
    refuse_used_folder(tmp_path / "new")
    (tmp_path / "work").write_text("")
    with pytest.raises(ConfigError, match="exists and is not empty: take another"):
        refuse_used_folder(tmp_path, "take another")
    with pytest.raises(ConfigError, match="work is a file"):
        refuse_used_folder(tmp_path / "work")


def test_what_can_be_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"file is a file: choose another"):
            check_folder(path)
    with pytest.raises(ConfigError, match="output_dir is empty"):
        check_folder("")
    check_folder(tmp_path / "new" / "folders")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(ConfigError, match="is read-only for this user"):
        check_folder(tmp_path / "new" / "folder")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
        RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file data/0"),
    ],
    ids=str,
)
def test_a_full_disk_is_named_whoever_found_it(tmp_path, error):
    said = rf"{tmp_path}.* could not be written: No space left on device; make room"
    with pytest.raises(DiskFullError, match=said), naming_full_disk(tmp_path / "a" / "file"):
        raise error


@pytest.mark.parametrize("error", [ValueError("wrong"), OSError(errno.EACCES, "denied"), KeyboardInterrupt()], ids=repr)
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, naming_full_disk(tmp_path):
        raise error
    assert caught.value is error


def test_any_failure_on_a_disk_without_room_is_one_of_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=FULL - 1))
    with pytest.raises(DiskFullError), naming_full_disk(tmp_path):
        raise RuntimeError("unexpected pos 64 vs 0")


def test_what_could_not_be_saved_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    check_room(tmp_path / "new", 10**9, "the student")
    with pytest.raises(DiskFullError, match=r"the student takes 1\.50 GB, and the disk of .*new has 1\.00 GB free"):
        check_room(tmp_path / "new", 15 * 10**8, "the student")
