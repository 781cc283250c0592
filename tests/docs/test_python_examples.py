"""docs/python.md: its examples run as they are printed, on phantoms and with settings for a few training steps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import aslseg
from aslseg.errors import BadLabelError, BadPromptError, BadSettingsError, NoModelError
from aslseg.settings import Settings
from aslseg.ssl import engine
from aslseg.types import Volume
from aslseg.volume.phantom import make_phantom
from tiny_rounds import tiny_settings, tiny_studies

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return tiny_settings(tmp_path)


@pytest.fixture
def scan() -> Volume:
    return make_phantom(3, 0, shape=(24, 24, 8))[0]


def test_the_examples_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny_studies(tmp_path, cases=4, labelled=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "STATISTICS_BATCHES", 2)
    monkeypatch.setattr(aslseg, "Settings", lambda **conf: tiny_settings(tmp_path, **conf), raising=False)
    names: dict = {}
    for example in examples():
        exec(compile(example, str(PAGE), "exec"), names)
    shape = names["scan"].array.shape
    assert names["summary"].keys() >= {"dice", "hd95"}
    for mask in ("mask", "first", "second", "boxed", "repaired"):
        assert names[mask].shape == shape, mask
        assert names[mask].dtype == np.uint8, mask
    assert (names["first"][12, 10, 4], names["second"][2, 2, 4]) == (1, 0)
    outside = np.ones(shape, bool)
    outside[4:21, 4:21, 1:7] = False
    assert not names["boxed"][outside].any()
    assert names["repaired"][12, 10, 4] == 1
    assert list(names["scores"]["cases"]) == ["phantom_003"]


def test_every_public_name_is_explained() -> None:
    page = PAGE.read_text()
    assert 7 <= len(aslseg.__all__) <= 9
    for name in aslseg.__all__:
        assert f"`{name}`" in page, name
        assert getattr(aslseg, name).__doc__, name
    assert set(aslseg.__all__) <= set(dir(aslseg))


def test_importing_the_package_imports_no_torch() -> None:
    code = "import aslseg, sys; aslseg.Settings(); aslseg.__version__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'segmnet'"):
        _ = aslseg.segmnet


def test_clicks_follow_the_scans_orientation(scan: Volume, settings: Settings) -> None:
    """A scan stored the other way round gets the same object, stored the other way round."""
    inside = np.array([[12, 10, 4]])
    mask = aslseg.Clicks(scan, settings).segment(inside)
    flipped = Volume(scan.array[::-1], scan.affine @ _flip(scan.array.shape[0]))
    again = aslseg.Clicks(flipped, settings).segment([[23 - 12, 10, 4]])
    np.testing.assert_array_equal(again[::-1], mask)


def test_clicks_outside_the_scan_are_left_out_with_a_warning(scan: Volume, settings: Settings) -> None:
    with pytest.warns(UserWarning, match="outside the volume"):
        mask = aslseg.Clicks(scan, settings).segment([[100, 0, 0]])
    assert not mask.any()


def test_bad_input_is_refused(scan: Volume, settings: Settings, tmp_path: Path) -> None:
    clicks = aslseg.Clicks(scan, settings)
    with pytest.raises(BadPromptError, match="foreground"):
        clicks.segment([[1, 2]])
    with pytest.raises(BadPromptError, match="six numbers"):
        clicks.segment(box=(1, 2, 3))
    with pytest.raises(BadLabelError, match="expected the scan's shape"):
        aslseg.Clicks(scan, settings, automatic_mask=np.zeros((2, 2, 2)))
    with pytest.raises(BadSettingsError, match="did you mean 'adapter'"):
        aslseg.load_model(tmp_path / "studies", "adaptor", settings)
    with pytest.raises(NoModelError, match="no ssl model is published"):
        aslseg.load_model(tmp_path / "studies", "ssl", settings)


def _flip(size: int) -> np.ndarray:
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = size - 1
    return flip
