"""``aslseg import`` as it is typed."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aslseg import cli, console
from foreign_folders import label, scan
from synthetic_dicom import make_series, write_series

Run = Callable[..., tuple[int, str, str]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, typed: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aslseg", "import", *map(str, arguments), "--conf", "min_free_gb", "0"])
        monkeypatch.setattr(sys, "stdin", io.StringIO() if typed is None else Terminal(typed))
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for n in range(2):
        scan(tmp_path / "in" / f"volume-{n}.nii.gz", n)
    label(tmp_path / "in" / "segmentation-0.nii.gz", 1, 255)
    return tmp_path / "in"


def test_in_doubt_without_a_terminal_it_says_what_to_write_and_writes_nothing(run: Run, source: Path) -> None:
    code, out, err = run(source, "studies")
    assert (code, out) == (2, "")
    assert "write --map '255=liver' if it is the liver, '255=0' to leave it out" in err
    assert not Path("studies").exists()


def test_it_shows_what_it_found_and_a_second_run_has_nothing_to_do(run: Run, source: Path) -> None:
    code, out, _ = run(source, "studies", "--map", "255=tumour", "--yes")
    assert code == 0
    assert "LiTS (volume-N, segmentation-N)" in out
    assert "2 scans, 1 of them labelled" in out
    assert "labels: 1 = liver, 255 = tumour" in out
    assert "scans: 2 written" in out
    code, out, _ = run(source, "studies", "--map", "255=tumour", "--yes")
    assert code == 0
    assert "nothing to do: 2 scans found, and there already" in out


def test_on_a_terminal_it_draws_a_table(run: Run, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "on_terminal", lambda stream: stream is sys.stdout)
    _, out, _ = run(source, "studies", "--map", "255=2", "--yes")
    assert "│ volume-0" in out
    assert "segmentation-0.nii.gz" in out


def test_json_is_all_that_is_printed(run: Run, source: Path) -> None:
    code, out, _ = run(source, "studies", "--map", "255=2", "--json")
    assert code == 0
    shown = json.loads(out)
    assert shown["layout"].startswith("LiTS")
    assert [(c["case"], c["scan"], c["label"]) for c in shown["cases"]] == [
        ("volume-0", "written", "written"),
        ("volume-1", "written", "none"),
    ]


def test_at_a_terminal_it_asks_and_goes_on(run: Run, source: Path) -> None:
    code, out, err = run(source, "studies", typed="tumour\ny\n")
    assert code == 0
    assert "value 255 in 1 label file is none of the labels" in err
    assert "255 = tumour" in out
    assert Path("studies/labels/final/volume-0.nii.gz").exists()


def test_an_answer_that_cannot_be_used_is_asked_for_again(run: Run, source: Path) -> None:
    code, _, err = run(source, "studies", typed="spleen\ntumour\ny\n")
    assert code == 0
    assert "expected VALUE=LABEL" in err


def test_no_means_no(run: Run, source: Path) -> None:
    code, _, _ = run(source, "studies", typed="tumour\nn\n")
    assert code == 1
    assert not Path("studies").exists()


def test_a_case_that_fails_ends_with_code_1_after_the_others(run: Run, source: Path) -> None:
    (source / "volume-1.nii.gz").write_bytes(b"no image")
    code, out, _ = run(source, "studies", "--map", "255=2", "--yes")
    assert code == 1
    assert "volume-1.nii.gz: cannot be read as an image" in out
    assert "scans: 1 failed, 1 written" in out


def test_dicom(run: Run, tmp_path: Path) -> None:
    write_series(tmp_path / "in", make_series(5))
    code, out, _ = run("in", "studies", "--yes")
    assert code == 0
    assert "5 CT images" in out


@pytest.mark.parametrize("address", ["http://127.0.0.1:8042/dicom-web", "https://pacs.example/dicom-web"])
def test_an_address_is_no_folder(run: Run, source: Path, address: str) -> None:
    code, _, err = run(source, address)
    assert code == 2
    assert "DICOMweb address" in err


@pytest.mark.parametrize("command", [["round"], ["rank"], ["train", "ssl"], ["embed"], ["ledger", "list"]])
def test_commands_that_need_a_folder_recognise_an_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["aslseg", *command, "--studies", "http://127.0.0.1:8042/dicom-web"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "aslseg serve --studies http://127.0.0.1:8042/dicom-web" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ["import", "ADDRESS", "out"],
        ["phantom", "ADDRESS"],
        ["info", "--sam-checkpoint", "ADDRESS"],
        ["infer", "--model", "ssl", "--studies", "s", "--output", "out", "--input", "ADDRESS"],
        ["infer", "--model", "ssl", "--studies", "s", "--input", "scans", "--output", "ADDRESS"],
        ["evaluate", "--pred", "ADDRESS", "--truth", "t"],
        ["evaluate", "--pred", "p", "--truth", "ADDRESS"],
        ["info", "--conf", "home", "ADDRESS"],
        ["info", "--conf", "model_dir", "ADDRESS"],
        ["round", "--studies", "ADDRESS"],
    ],
)
@pytest.mark.parametrize("address", ["http://127.0.0.1:8042/dicom-web", "HTTPS://pacs.example/dicom-web"])
def test_an_address_in_the_place_of_a_folder_is_recognised(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    command: list[str],
    address: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["aslseg", *(word.replace("ADDRESS", address) for word in command)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert f"{address}: " in err or f"address {address};" in err
    assert "folder" in err
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_went_through_pathlib_is_still_an_address() -> None:
    from aslseg.settings import Paths, Settings

    text = "http://127.0.0.1:8042/dicom-web"
    assert Paths(Settings(), Path(text)).studies is None
    assert Paths(Settings(), Path(text)).models == Paths(Settings(), text).models
