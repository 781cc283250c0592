"""The log as JSON, and without the ids of scans."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote_plus

import pytest

from aslseg.serving.logs import CaseIdHider, JsonFormatter, configure_logs
from aslseg.settings import Paths, load_settings

CASES = {"Mueller_Anna", "scan.1", "Jörg_Weiß", "Meier, Eva Maria"}


def record(message: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord("aslseg.test", logging.WARNING, "file.py", 1, message, args, None)


def test_a_line_is_a_json_object() -> None:
    found = json.loads(JsonFormatter().format(record('said "%s"\nand more', "yes")))
    assert found["message"] == 'said "yes"\nand more'
    assert (found["level"], found["logger"]) == ("WARNING", "aslseg.test")
    assert found["time"].endswith("+00:00")


@pytest.mark.parametrize(
    "message",
    [
        "Saving Label for Image: Mueller_Anna; Tag: final",
        "read /data/studies/Mueller_Anna.nii.gz.",
        "{'image': 'Mueller_Anna', 'path': '/x/labels/final/Mueller_Anna.nrrd'}",
        "versions/Mueller_Anna/1795656442646828539.nii.gz",
        "no scan Mueller_Anna.",
        "scan.1 and scan.1.nii",
        "read /data/Jörg_Weiß.nii.gz, then Mueller_Anna.nii and scan.1",
        "GET /infer/sam?image=J%C3%B6rg_Wei%C3%9F&output=image",
        "passed over: Meier, Eva Maria.nii.gz: no scan",
        "GET /datastore/label?label=Meier%2C+Eva+Maria&tag=final",
    ],
)
def test_no_id_of_a_scan_is_left(message: str) -> None:
    hider = CaseIdHider(logging.Formatter("%(message)s"), CASES.__contains__, b"key")
    shown = hider.format(record(message))
    assert not any(case in shown or quote_plus(case) in shown for case in CASES)
    assert "case-" in shown
    assert hider.format(record(message)) == shown, "the same scan can be followed through the log"
    other = CaseIdHider(logging.Formatter("%(message)s"), CASES.__contains__, b"another")
    assert other.format(record(message)) != shown


def test_other_words_stay() -> None:
    hider = CaseIdHider(logging.Formatter("%(message)s"), CASES.__contains__, b"key")
    message = "GET /datastore/label: 422: expected .nii.gz, got Mueller at 127.0.0.1:8000"
    assert hider.format(record(message)) == message


def test_tracebacks_name_no_scan_either() -> None:
    try:
        raise ValueError("Mueller_Anna.nii.gz is broken")
    except ValueError:
        line = record("failed")
        line.exc_info = sys.exc_info()
    for inner in (JsonFormatter(), logging.Formatter()):
        shown = CaseIdHider(inner, CASES.__contains__, b"key").format(line)
        assert "Mueller_Anna" not in shown
        assert "is broken" in shown


@pytest.fixture
def handler() -> Iterator[logging.Handler]:
    """A handler of a logger of its own, with the text that it writes in ``shown``."""
    added = logging.StreamHandler()
    added.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("aslseg.test_logs")
    logger.addHandler(added)
    yield added
    logger.removeHandler(added)


def test_settings_change_the_handlers(
    handler: logging.Handler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aslseg.serving.logs._handlers", lambda: [handler])
    for conf in ({}, {"log_format": "json", "log_case_ids": "hashed"}):
        settings = load_settings(conf, env={})[0]
        configure_logs(settings, Paths(settings, tmp_path), CASES.__contains__)
        shown = handler.format(record("Mueller_Anna"))
        assert (shown == "Mueller_Anna") == (not conf)
    assert json.loads(shown)["message"].startswith("case-")
    assert len((tmp_path / ".aslseg" / "log.key").read_bytes()) == 32
