"""Atomic files: a full disk is called a full disk, other errors say what they are, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from aslseg.errors import AslsegError, DiskFullError, FileWriteError
from aslseg.files import FileStamp, atomic_file, require_disk_budget, temporary_files, write_json

Usage = namedtuple("Usage", "total used free")


def failing(path: Path, error: Exception) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_old_file(tmp_path: Path, number: int) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    before = path.read_bytes()
    with pytest.raises(DiskFullError, match=r"disk full while writing .*a\.json; free some space and run again"):
        failing(path, OSError(number, os.strerror(number)))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_other_errors_say_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileWriteError, match=r"b\.json cannot be written \(Input/output error\)") as caught:
        failing(tmp_path / "b.json", OSError(errno.EIO, os.strerror(errno.EIO)))
    assert isinstance(caught.value, AslsegError)
    assert isinstance(caught.value, OSError)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileWriteError, match=r"cannot be written \((Not a directory|File exists)\)"):
        write_json(tmp_path / "file" / "c.json", {})
    with pytest.raises(ValueError, match="ours"):
        failing(tmp_path / "d.json", ValueError("ours"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_writers_that_hide_the_error_number_are_asked_by_the_space_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(_: Path) -> Usage:
        # the half-written file is still there when the space is looked at
        assert [p.name[:5] for p in tmp_path.iterdir()] == [".tmp-"]
        return Usage(10**12, 10**12, 0)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(DiskFullError, match="disk full while writing"):
        failing(
            tmp_path / "model.safetensors", RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos")
        )
    assert not any(tmp_path.iterdir())


def test_safetensors_meets_a_full_disk_while_there_is_space(tmp_path: Path) -> None:
    """It asks for the space of the whole file first, and gets none of it."""
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(DiskFullError, match=r"disk full while writing .*model\.safetensors"):
        failing(tmp_path / "model.safetensors", error)
    with pytest.raises(SafetensorError):
        failing(tmp_path / "model.safetensors", SafetensorError("Error while deserializing header"))


def test_a_stamp_changes_when_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert FileStamp.of(path) is None
    write_json(path, 1)
    first = FileStamp.of(path)
    assert first == FileStamp.of(path)
    write_json(path, 2)
    assert FileStamp.of(path) != first


def test_files_of_rounds_may_take_only_so_much_disk(tmp_path: Path) -> None:
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "model").write_bytes(bytes(3_000_000))
    require_disk_budget(tmp_path, 0)
    require_disk_budget(tmp_path, 0.004)
    require_disk_budget(tmp_path / "nowhere", 0.001)
    with pytest.raises(DiskFullError, match=r"takes 0\.0 GB, but round_disk_gb allows 0\.002 GB"):
        require_disk_budget(tmp_path, 0.002)


@pytest.mark.parametrize("order", [["kept", "session"], ["session", "kept"]])
def test_what_is_deleted_while_files_are_counted_or_listed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: list[str]
) -> None:
    """A server deletes a folder that was seen, or a file of it, before they are looked at."""
    for name in order:
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f".tmp-{number}").write_bytes(bytes(1_000_000))
    scandir, lstat = os.scandir, Path.lstat

    def deleting(folder: Any = ".") -> Any:
        if not isinstance(folder, int) and Path(folder).name == "session":
            shutil.rmtree(folder, ignore_errors=True)
        return scandir(folder)

    def gone(path: Path) -> os.stat_result:
        if path.name == ".tmp-1":
            path.unlink()
        return lstat(path)

    monkeypatch.setattr(os, "scandir", deleting)
    require_disk_budget(tmp_path, 0.0035)
    monkeypatch.setattr(Path, "lstat", gone)
    assert sorted(p.name for p in temporary_files(tmp_path, tmp_path / "nowhere")) == [".tmp-0", ".tmp-2"]


def test_temporary_files_by_age_and_depth(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / ".tmp-folder").mkdir()
    for path in (tmp_path / ".tmp-old", tmp_path / ".tmp-new", tmp_path / "kept", tmp_path / "below" / ".tmp-old"):
        path.touch()
        if "old" in path.name:
            os.utime(path, (0, 0))
    assert list(temporary_files(tmp_path, seconds=600, deep=False)) == [tmp_path / ".tmp-old"]
    assert len(list(temporary_files(tmp_path, seconds=600))) == 2
    assert len(list(temporary_files(tmp_path))) == 3


def test_as_many_open_files_as_the_system_permits():
    code = (
        "import resource as r; from aslseg.files import allow_open_files; hard = r.getrlimit(r.RLIMIT_NOFILE)[1]; "
        "r.setrlimit(r.RLIMIT_NOFILE, (64, hard)); allow_open_files(); "
        "print(r.getrlimit(r.RLIMIT_NOFILE) == (hard, hard))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True"
