"""The viewer's bundle as the wheel has it can still be patched, and other files are left alone."""

from __future__ import annotations

import logging
from pathlib import Path

import monailabel
import pytest

from aslseg.serving.ohif_patches import MARK, PATCHES, patched_text
from aslseg.types import Labels

FOLDER = Path(monailabel.__file__).parent / "endpoints" / "static" / "ohif"
LABELS = Labels.parse("liver,tumour,vessel,cyst", "tumour:liver,cyst:tumour")


def test_every_patch_finds_its_place_in_the_wheels_bundle(caplog: pytest.LogCaptureFixture) -> None:
    (bundle,) = (f for f in FOLDER.glob("*.js") if MARK in f.read_text(encoding="utf-8", errors="surrogateescape"))
    with caplog.at_level(logging.WARNING):
        text = patched_text(bundle, LABELS)
    assert not caplog.records
    assert text is not None
    for before, after, _ in PATCHES:
        assert after.replace("INSIDE[l]", INSIDE) in text
        assert before in after or before not in text
    assert "INSIDE" not in text


INSIDE = '({"liver": [], "tumour": ["liver"], "vessel": [], "cyst": ["liver", "tumour"]})[l]'


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "app.js"
    file.write_text("let fg = points[currentLabel];")
    assert patched_text(file, LABELS) is None
    assert patched_text(file.with_suffix(".css"), LABELS) is None


def test_a_bundle_that_reads_differently_is_patched_where_it_can_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "bundle.js"
    file.write_text(f"{MARK}; let fg = points[currentLabel]; a; a;")
    text = patched_text(file, LABELS)
    assert text == f"{MARK}; let fg = points[currentLabel] || []; a; a;"
    assert len(caplog.records) == len(PATCHES) - 1
