"""What reading a scan gave is known once for each version of its file."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from aslseg.cases import scan_checks
from aslseg.cases.scan_checks import ScanChecks
from aslseg.serving.scan_watch import look_at_headers


def write(path: Path, unit: str = "mm", value: float = 0.0) -> Path:
    image = nib.Nifti1Image(np.full((4, 4, 4), value, np.float32), np.eye(4) * [800, 800, 800, 1])
    if unit == "mm":
        image = nib.Nifti1Image(np.full((4, 4, 4), value, np.float32), np.eye(4))
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return path


def test_a_header_that_can_be_understood_in_two_ways_gives_a_note(tmp_path: Path) -> None:
    checks = ScanChecks(1e6)
    assert checks.look(write(tmp_path / "plain.nii.gz")).notes == ()
    assert "micrometres" in checks.look(write(tmp_path / "small.nii.gz", "micron")).notes[0]
    (message,) = checks.messages()
    assert message.startswith("small.nii.gz: its header is in micrometres")


def test_voxels_count_only_when_the_scan_is_read_whole(tmp_path: Path) -> None:
    checks, path = ScanChecks(1e6), write(tmp_path / "holes.nii.gz", value=np.nan)
    assert checks.look(path).error is None
    assert "NaN" in (checks.read(path).error or "")
    assert "NaN" in (checks.look(path).error or ""), "known from then on"
    assert "It is not handed out" in checks.messages()[0]


def test_a_scan_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = scan_checks.read_image, []
    monkeypatch.setattr(scan_checks, "read_image", lambda path, most: calls.append(path) or read(path, most))
    checks, path = ScanChecks(1e6), tmp_path / "scan.nii.gz"
    path.write_bytes(b"no image")
    assert [bool(checks.read(path).error) for _ in range(3)] == [True] * 3
    assert len(calls) == 1
    write(path)
    assert [bool(checks.read(path).error) for _ in range(3)] == [False] * 3
    assert len(calls) == 2
    assert checks.messages() == []


def test_a_scan_that_is_gone_gives_no_message(tmp_path: Path) -> None:
    checks, path = ScanChecks(1e6), write(tmp_path / "small.nii.gz", "micron")
    checks.read(path)
    path.unlink()
    assert checks.messages() == []
    assert "no such file" in (checks.read(path).error or "")
    assert checks.messages() == []


def test_all_headers_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz", "micron")
    (tmp_path / "b.nrrd").write_bytes(b"NRRD0004\n")
    (tmp_path / "notes.txt").write_text("no scan")
    checks = ScanChecks(1e6)
    look_at_headers(tmp_path, checks)
    assert [m.partition(":")[0] for m in checks.messages()] == ["a.nii.gz", "b.nrrd"]
