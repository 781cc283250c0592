"""The command line: help without torch, exit codes, one message instead of a traceback, JSON on stdout only."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from aslseg import cli, console
from aslseg.files import write_json
from aslseg.rounds.ledger.ledger import Entry, Ledger
from aslseg.rounds.scheduling import brake
from aslseg.rounds.scheduling.lock import round_lock
from aslseg.settings import Paths
from aslseg.ssl import engine
from tiny_rounds import tiny_sam, tiny_settings, tiny_studies

Run = Callable[..., tuple[int, str, str]]


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['aslseg', '--help']; import aslseg.cli as c\ntry: c.main()\nexcept SystemExit: pass\n"
    )
    code += "assert 'torch' not in sys.modules and 'monai' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_info_says_where_settings_come_from(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASLSEG_SEED", "7")
    code, out, _ = run("info", "--json", "--conf", "promote_threshold", "0.8,liver=0.5", "--conf=labels=liver")
    assert code == 0
    shown = json.loads(out)
    assert set(shown) >= {"versions", "settings", "ssl_methods", "recipes", "models"}
    assert shown["settings"]["promote_threshold"] == {"value": "0.8,liver=0.5", "source": "conf"}
    assert shown["settings"]["labels"] == {"value": "liver", "source": "conf"}
    assert shown["settings"]["seed"] == {"value": 7, "source": "environment"}
    network = "vnet" if torch.cuda.is_available() else "vnet_small"
    assert shown["settings"]["network"] == {"value": "auto", "source": "default", "used": network}
    assert "mean_teacher" in shown["ssl_methods"]
    assert shown["versions"]["monailabel"]


def test_info_describes_a_sam_file(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("info", "--sam-checkpoint", tiny_sam(tmp_path / "sam.safetensors"), "--json")
    assert code == 0
    assert {"kind", "image_size", "adapters", "parameters", "missing", "unexpected"} <= set(json.loads(out))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["info", "--conf", "lables", "x"], 2, "did you mean 'labels'?"),
        (["info", "--conf", "labels"], 2, "expected a key and a value"),
        (["info", "--conf", "patch", "native"], 2, "patch: expected auto or three positive whole numbers"),
        (["info", "--conf", "device", "foo"], 2, "device: expected auto, cpu, cuda or cuda:N, got 'foo'"),
        (["info", "--conf", "device", "cuda:99"], 2, "but cuda:99 is asked for; set device to"),
        (["inof"], 2, "No such command"),
        (["round"], 2, "--studies"),
        (["train", "everything", "--studies", "x"], 2, "expected ssl, sam or adapter"),
        (["infer", "--model", "x", "--input", "i", "--output", "o", "--studies", "s"], 2, "expected ssl, sam"),
        (["evaluate", "--pred", "p", "--truth", "t", "--unit", "inch"], 2, "expected mm or voxel"),
        (["round", "--studies", "nowhere"], 1, "nowhere: no such folder"),
        (["evaluate", "--pred", "p", "--truth", "t"], 1, "no such folder"),
        (
            ["infer", "--model", "ssl", "--input", "i", "--output", "o", "--studies", "s"],
            1,
            "no ssl model is published",
        ),
        (["phantom", "out", "--cases", "0"], 2, "phantom: 0 cases"),
    ],
)
def test_mistakes_give_one_line_and_the_right_code(run: Run, arguments: list[str], code: int, message: str) -> None:
    got, out, err = run(*arguments)
    assert got == code
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize("command", ["round", "nightly"])
def test_a_folder_that_cannot_be_written_is_named(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / ".aslseg").touch()  # tests may run as root, who may write every folder
    code, out, err = run(command, "--studies", tmp_path / "studies")
    assert (code, out) == (1, "")
    assert err.startswith(f"aslseg: {tmp_path / 'studies' / '.aslseg'}: File exists; mend that, and run again")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/s/labels"), "/s/labels: Permission denied; expected"),
        (OSError(errno.ENOSPC, "No space left on device"), "aslseg: No space left on device; free some space"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: OSError, said: str
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", refuse)
    code, out, err = run("rank")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert said in err


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError("a library is missing")])
def test_other_errors_are_left_to_python(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(type(error)) as caught:
        cli.main()
    assert caught.value is error


def test_a_round_infer_evaluate_and_ledger(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "STATISTICS_BATCHES", 2)
    torch.set_num_threads(1)
    studies, settings = tiny_studies(tmp_path, cases=3, labelled=2), tiny_settings(tmp_path)
    conf = [p for k, v in settings.model_dump(exclude_unset=True).items() for p in ("--conf", k, v)]
    code, out, err = run("round", "--studies", studies, "--json", *conf)
    assert code == 0, err
    summary = json.loads(out)
    assert summary["round"] == 1
    assert "ssl" in err
    code, out, _ = run("round", "--studies", studies, *conf)
    assert code == 0
    assert "round: 2" in out

    code, out, _ = run("rank", "--studies", studies, *conf)
    assert code == 0
    assert out.split()[1] == "phantom_002"
    models = json.loads(run("info", "--json", "--studies", studies, *conf)[1])["models"]
    assert {m["kind"] for m in models} == {"ssl", "sam", "adapter"}
    assert all({"sha256", "date", "validation_dice"} <= set(m) for m in models)

    code, out, err = run("report", "--studies", studies, "--out", tmp_path / "r.html", *conf)
    assert code == 0, err
    assert out.startswith("Round 2: ")
    assert out.endswith(f"Look at these first: phantom_002\nReport: {tmp_path / 'r.html'}\n")
    assert "Round 2" in (tmp_path / "r.html").read_text()
    assert json.loads(run("report", "--studies", studies, "--round", 1, "--json", *conf)[1])["round"] == 1
    code, _, err = run("report", "--studies", studies, "--round", 9, *conf)
    assert code == 1
    assert "there is no round 9" in err

    (studies / "broken.nii.gz").write_bytes(b"no image")
    common = ("--input", studies, "--studies", studies, "--json", *conf)
    code, out, _ = run("infer", "--model", "aslseg", "--output", tmp_path / "pred", *common)
    assert code == 1  # one scan could not be read; the others are there
    assert set(json.loads(out)["skipped"]) == {"broken"}
    assert len(list((tmp_path / "pred").iterdir())) == 3
    code, out, _ = run(
        "evaluate", "--pred", tmp_path / "pred", "--truth", studies / "labels" / "final", "--json", *conf
    )
    assert code == 0
    assert json.loads(out)["summary"]

    ledger = Ledger(Paths(settings, studies).ledger)
    ledger.append([Entry("note", details={})])
    listed = json.loads(run("ledger", "list", "--studies", studies, "--json", *conf)[1])
    assert [r["state"] for r in listed["rounds"]] == ["done", "done"]
    assert run("ledger", "verify", "--studies", studies, *conf)[0] == 0
    (studies / "labels" / "original" / "phantom_002.nii.gz").unlink()
    code, out, _ = run("ledger", "verify", "--studies", studies, *conf)
    assert code == 1
    assert "phantom_002.nii.gz: missing" in out
    code, out, _ = run("ledger", "verify", "--repair", "--studies", studies, *conf)
    assert code == 0
    assert out.splitlines()[0] == "labels/original/phantom_002: as the ledger says again"
    label = studies / "labels" / "final" / "phantom_000.nii.gz"
    entry = {"ext": ".nii.gz", "info": {"sha256": "0" * 64}}
    objects = {"phantom_000": {"image": {"ext": ".nii.gz", "info": {}}, "labels": {"final": entry}}}
    write_json(studies / "datastore_v2.json", {"name": "x", "description": "x", "objects": objects})
    before = label.read_bytes()
    assert "another file" in run("ledger", "verify", "--studies", studies, *conf)[1]
    repaired = json.loads(run("ledger", "verify", "--repair", "--json", "--studies", studies, *conf)[1])
    assert repaired == {
        "ok": True,
        "problems": [],
        "repaired": ["labels/final/phantom_000.nii.gz: its info was corrected"],
    }
    assert label.read_bytes() == before

    code, _, err = run("ledger", "rollback", "--studies", studies, *conf)
    assert code == 2
    assert "give one of" in err
    code, _, err = run("ledger", "rollback", "--studies", studies, "--case", "phantom_000", *conf)
    assert code == 1
    assert "'phantom_000' has no promoted mask" in err
    code, _, err = run("ledger", "rollback", "--studies", studies, "--model", "canvas", *conf)
    assert code == 1
    assert "no canvas model is published" in err
    code, _, err = run("ledger", "rollback", "--studies", studies, "--round", 9, *conf)
    assert code == 1
    assert "there is no round 9" in err
    code, out, _ = run("ledger", "rollback", "--studies", studies, "--round", 1, *conf)
    assert code == 0
    assert "round 2 rolled back" in out
    assert "round 1: rolled back" in run("ledger", "list", "--studies", studies, *conf)[1]


def test_phantom(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("phantom", tmp_path / "made", "--cases", 1, "--labelled", 1, "--seed", 3, "--json")
    assert code == 0
    assert json.loads(out)["labelled"] == ["phantom_000"]


def test_serve_hands_over_to_monailabel(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def instead(path: str, arguments: list[str]) -> None:
        started.append(arguments)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", instead)
    studies = tmp_path / "two words"
    assert run("serve", "--studies", studies, "--port", 8001, "--conf", "labels", "liver", "--", "--dryrun")[0] == 0
    command = started[0]
    assert command[1:5] == ["-P", "-m", "monailabel.main", "start_server"]
    assert command[command.index("--studies") + 1] == str(studies)
    assert command[-4:] == ["--conf", "labels", "liver", "--dryrun"]
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]) == ("ACTIVE", "5000")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert run("serve", "--studies", studies)[0] == 0
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE", "a value of one's own is left alone"
    assert run("serve", "--studies", studies, "--conf", "lables", "liver")[0] == 2
    assert len(started) == 2


def test_progress_in_a_log_is_not_too_frequent() -> None:
    written: list[str] = []
    report = console.PlainProgress(written.append, every=3600)
    report(1, 10, stage="ssl", eta=65, loss=0.25)
    report(2, 10, stage="ssl", eta=60)
    report(3, 10, stage="sam", eta=61.0, loss=0.5)
    assert written == [" 10%  ssl  loss 0.2500  1:05 left", " 30%  sam  loss 0.5000  1:01 left"]


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "on_terminal", lambda _: True)
    monkeypatch.setenv("COLUMNS", "120")
    with console.progress() as report:
        report(1, 4, stage="[predict]", eta=61.0, loss=0.5)
    err = capsys.readouterr().err
    assert all(text in err for text in ("[predict]", "25%", "loss 0.5000", "1:01 left"))


def test_a_terminal_gets_tables(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    studies, settings = tiny_studies(tmp_path, cases=1, labelled=1), tiny_settings(tmp_path)
    ledger = Ledger(Paths(settings, studies).ledger)
    ledger.open_round({})
    kept = {"sha256": "ab" * 32, "agreement": {"liver": 0.91, "tumour": None}, "models": {}}
    kept["threshold"] = {"liver": 0.9, "tumour": 0.75}
    ledger.append([Entry("mask", 1, "phantom_000", "aslseg_pseudo", kept)])
    plain = run("ledger", "list", "--studies", studies)[1]
    assert (
        "phantom_000: active, agreement liver 0.9100, tumour -; asked liver 0.9, tumour 0.75; mask abababababab"
        in plain
    )
    monkeypatch.setattr(console, "on_terminal", lambda _: True)
    for arguments, expected in (
        (
            ("ledger", "list", "--studies", studies),
            ("Rounds", "open", "Promotions", "liver 0.9100, tumour -", "liver 0.9, tumour 0.75"),
        ),
        (("info", "--conf", "labels", "liver"), ("Settings", "labels", "liver", "conf", "mean_teacher")),
    ):
        code, out, _ = run(*arguments)
        assert code == 0
        assert all(text in out for text in expected)
        assert "─" in out or "━" in out
    assert json.loads(run("ledger", "list", "--studies", studies, "--json")[1])["rounds"][0]["state"] == "open"


def test_joined_leaves_other_arguments_alone() -> None:
    assert console.joined(["a", "--conf", "k", "v", "--x"]) == ["a", "--conf", "k=v", "--x"]
    assert console.joined(["--conf", "k=a=b", "--conf", "k"]) == ["--conf", "k=a=b", "--conf", "k"]
    assert console.joined(["--", "--conf", "k", "v"]) == ["--", "--conf", "k", "v"]


def test_a_round_until_a_time_of_day_and_a_night_of_cron(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aslseg.rounds.ledger import rows
    from aslseg.rounds.scheduling import schedule

    studies = tiny_studies(tmp_path, cases=2, labelled=1)
    settings = tiny_settings(tmp_path, night_hours=2, time_zone="UTC")
    conf = [part for k in settings.model_fields_set for part in ("--conf", k, settings.model_dump()[k])]
    now = [datetime(2026, 11, 27, 5, 59, 58, tzinfo=UTC)]

    def later() -> datetime:
        now[0] += timedelta(seconds=1)
        return now[0]

    monkeypatch.setattr(schedule, "utc_now", later)
    monkeypatch.setattr(brake, "utc_now", later)
    # by the machine's clock the first round could lie in the night that is missed
    monkeypatch.setattr(rows, "utc", lambda: now[0].isoformat(timespec="microseconds"))
    code, out, err = run("round", "--studies", studies, "--until", "06:00", "--json", *conf)
    assert code == 0, err
    assert json.loads(out)["ended"].startswith("the time for this round ended before the stage prepare")
    code, out, err = run("round", "--studies", studies, "--until", "25:00", *conf)
    assert (code, "expected a time of day such as 06:00" in err) == (2, True)

    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run("nightly", "--studies", studies, *conf)
    assert (code, "leave torchrun out" in err) == (2, True)
    monkeypatch.delenv("WORLD_SIZE")
    with round_lock(Paths(settings, studies).home):
        code, out, _ = run("nightly", "--studies", studies, *conf)
    assert (code, "already running" in out) == (0, True)
    code, out, _ = run("nightly", "--studies", studies, *conf, "--conf", "night", "22:00-05:00")
    assert (code, "no round is due before 2026-11-27T22:00:00+00:00" in out) == (0, True)
    monkeypatch.setattr(engine, "STATISTICS_BATCHES", 2)
    code, out, err = run("nightly", "--studies", studies, "--json", *conf)
    assert code == 0, err
    assert json.loads(out)["round"] == 1
    # a night in which the machine was off is made up by the next call, once
    now[0] += timedelta(days=1, hours=3)
    code, out, err = run("nightly", "--studies", studies, "--json", *conf, "--conf", "night", "22:00-05:00")
    assert (code, json.loads(out).get("round")) == (0, 2), err
    code, out, _ = run("nightly", "--studies", studies, *conf, "--conf", "night", "22:00-05:00")
    assert (code, "no round is due" in out) == (0, True)
    outcomes = [e.details["outcome"] for e in Ledger(Paths(settings, studies).ledger).events(kinds=("night",))]
    assert outcomes == ["scheduled", "round 1 is done", "round 2 is done"]
