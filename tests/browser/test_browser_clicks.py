"""With a PACS: OHIF's "Point Prompts" draw with our click models, from the mouse to the coloured pixels."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

pytestmark = [
    pytest.mark.orthanc,
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM := shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")),
        reason="Chromium is not installed: apt-get install chromium",
    ),
]

ARGUMENTS = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]
PATIENCE_MS = 300_000  # a busy machine renders slowly


@pytest.fixture(scope="module")
def server(orthanc: Any, serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server on the PACS with nothing trained: clicks are answered from the first second."""
    return serve(orthanc.url, home=tmp_path_factory.mktemp("home")).wait(2 * PATIENCE_MS / 1000)


@pytest.fixture
def annotator(server: Any, orthanc: Any, tmp_path: Path) -> Iterator[Annotator]:
    """In front of OHIF with the phantom open and "Point Prompts" chosen."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1300, "height": 800}, reduced_motion="reduce")
        page.set_default_timeout(PATIENCE_MS)
        page.goto(f"{server.url}/ohif/monai-label?StudyInstanceUIDs={orthanc.study}")
        page.get_by_text("Confirm and Hide").click()
        page.get_by_text("phantom").first.wait_for()
        page.locator(".settingsTable .actionButton").click()
        found = Annotator(page, nib.load(orthanc.scan).shape)
        found.tab.locator("label.tab-label").click()
        try:
            yield found
        finally:
            page.screenshot(path=os.environ.get("ASLSEG_SCREENSHOT", tmp_path / "clicks.png"))
            browser.close()


class Annotator:
    """Somebody with a mouse. Positions are fractions of the axial viewport, which is the first one."""

    def __init__(self, page: Any, shape: tuple[int, ...]) -> None:
        self.page, self.shape = page, shape
        self.tab = page.locator(".tab", has=page.locator("label.tab-label", has_text="Point Prompts"))
        self.row = self.tab.locator("tr.clickable-row")

    @property
    def axial(self) -> dict[str, float]:
        """Where the axial viewport is."""
        return self.page.locator(".cornerstone-canvas").first.bounding_box()

    def choose(self, label: str) -> None:
        self.row.filter(has_text=label).click()
        self.page.wait_for_timeout(300)

    def click(self, x: float, y: float) -> None:
        """On the picture, x pixels to the right and y below the axial viewport's middle."""
        box = self.axial
        self.page.mouse.click(box["x"] + box["width"] / 2 + x, box["y"] + box["height"] / 2 + y)
        self.page.wait_for_timeout(2000)  # OHIF waits for a second click, which would make it a double click

    def run(self) -> tuple[dict[str, Any], np.ndarray]:
        """Press Run: what OHIF wrote, and the voxels that it got."""
        with self.page.expect_response(lambda r: "/infer/" in r.url) as got:
            self.tab.get_by_role("button", name="Run").click()
        assert got.value.ok, got.value.text()
        written = re.search(r'name="params"\r\n\r\n(.*?)\r\n--', got.value.request.post_data, re.S)
        assert written, got.value.request.post_data
        voxels = np.frombuffer(got.value.body().partition(b"\n\n")[2], np.uint8)
        return json.loads(written[1]), voxels.reshape(self.shape, order="F")

    def coloured(self) -> np.ndarray:
        """Pixels (x, y) of the axial viewport in the liver's colour, from its middle; the picture itself is grey."""
        from PIL import Image

        picture = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        box = self.axial
        left, top = box["x"], box["y"]
        rgb = np.asarray(picture.crop((left, top, left + box["width"], top + box["height"]))).astype(int)
        y, x = np.nonzero((rgb[..., 0] - rgb[..., 2] > 40) & (rgb[..., 0] > 100))
        return np.stack([x - box["width"] / 2, y - box["height"] / 2], 1)

    def shown(self, good: Callable[[np.ndarray], bool]) -> np.ndarray:
        """Coloured pixels once they are as they should be, or as they are when patience ends."""
        end = time.monotonic() + 60
        while True:
            pixels = self.coloured()
            if good(pixels) or time.monotonic() > end:
                return pixels
            self.page.wait_for_timeout(500)


def test_clicks_in_ohif(annotator: Annotator, orthanc: Any) -> None:
    truth_folder = orthanc.scan.parent.with_name(f"{orthanc.scan.parent.name}_truth")
    liver = np.asarray(nib.load(truth_folder / orthanc.scan.name).dataobj) > 0
    assert annotator.tab.locator("option").all_inner_texts() == ["sam ", "sam_2d "]
    assert [t.strip() for t in annotator.row.all_inner_texts()] == ["background", "liver", "tumour"]
    nothing = len(annotator.coloured())

    # the first click, into the liver: to the left of the picture's middle, as its right is the patient's left
    annotator.choose("liver")
    annotator.click(-20, 0)
    asked, mask = annotator.run()
    (first,) = asked["foreground"]
    k = first[2]
    assert asked["label"] == "liver"
    assert asked["background"] == []
    assert liver[tuple(first)]
    assert mask[tuple(first)] == 1
    assert set(np.unique(mask)) == {0, 1}
    assert len(annotator.shown(lambda p: len(p) > nothing + 1000)) > nothing + 1000

    # a further click goes along with the first
    annotator.click(-60, 24)
    asked, mask = annotator.run()
    assert asked["foreground"][0] == first
    second = asked["foreground"][1]
    assert len(asked["foreground"]) == 2
    assert liver[tuple(second)]
    assert all(mask[tuple(v)] == 1 for v in asked["foreground"])
    # both clicks say where a voxel is in the picture; the mask is drawn there
    per_voxel = np.array([-40, 24]) / np.subtract(second, first)[:2]

    def centre(pixels: np.ndarray) -> np.ndarray:
        return pixels.mean(0) if len(pixels) else np.full(2, np.inf)

    def expected(mask: np.ndarray) -> np.ndarray:
        return (np.argwhere(mask[..., k]).mean(0) - first[:2]) * per_voxel + [-20, 0]

    def drawn(mask: np.ndarray) -> np.ndarray:
        pixels = annotator.shown(lambda p: np.allclose(centre(p), expected(mask), atol=6))
        assert np.allclose(centre(pixels), expected(mask), atol=6)
        return pixels

    before = len(drawn(mask))

    # a click outside, well inside the mask: OHIF has a row for it, and wants the object's row again before Run
    inside = np.argwhere(ndimage.binary_erosion(mask[..., k], iterations=2))
    far = inside[np.abs(inside[:, None] - [first[:2], second[:2]]).sum(2).min(1).argmax()]
    annotator.choose("background")
    annotator.click(*(far - first[:2]) * per_voxel + [-20, 0])
    annotator.choose("liver")
    asked, corrected = annotator.run()
    assert asked["foreground"] == [first, second]
    (outside,) = asked["background"]
    assert np.abs(np.subtract(outside, [*far, k])).max() <= 1
    assert corrected[tuple(outside)] == 0
    assert corrected[..., k].sum() < mask[..., k].sum()
    assert len(annotator.shown(lambda p: len(p) < before)) < before

    # without points there is nothing to draw; OHIF leaves the mask of before on the screen
    annotator.tab.get_by_text("Clear All Points", exact=True).click()
    asked, mask = annotator.run()
    assert not asked.get("foreground")
    assert not mask.any()

    # one slice only
    annotator.tab.locator("select").select_option("sam_2d")
    annotator.choose("liver")
    annotator.click(-20, 0)
    asked, mask = annotator.run()
    assert asked["foreground"] == [first]
    assert np.flatnonzero(mask.any((0, 1))).tolist() == [k]
    assert mask[tuple(first)] == 1
    before = len(drawn(mask))

    # a tumour inside the liver that is there: it takes the liver's place on the screen
    annotator.choose("tumour")
    annotator.click(-20, 0)
    asked, mask = annotator.run()
    assert asked["label"] == "tumour"
    assert mask[tuple(first)] == 1
    assert len(annotator.shown(lambda p: len(p) < before)) < before
