"""With a PACS: OHIF, served by MONAI Label, segments with our models, and a saved label comes back as DICOM SEG."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests

pytestmark = [pytest.mark.orthanc, pytest.mark.slow]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]


@pytest.fixture(scope="session")
def pacs_server(orthanc: Any, trained: Any, serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server on the PACS with the models that the phantoms' first round published; PATH without .venv/bin."""
    home, models = tmp_path_factory.mktemp("home"), trained.folder / "published"
    return serve(orthanc.url, env={"PATH": "/usr/bin:/bin"}, home=home, model_dir=models).wait()


def overlay(picture: bytes) -> int:
    """Number of reddish pixels: the viewer is grey and blue, the first segment is not."""
    from PIL import Image

    rgb = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
    return int(((rgb[..., 0] - rgb[..., 2] > 40) & (rgb[..., 0] > 100)).sum())


def test_mask_lies_on_the_series(pacs_server: Any, orthanc: Any) -> None:
    """The voxels come in the order of the converted series, which OHIF relies on."""
    assert list(pacs_server.client().info()["models"]) == ["aslseg", "ssl", "adapter", "sam", "sam_2d"]
    params = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False}
    answer = requests.post(
        f"{pacs_server.url}/infer/ssl?image={orthanc.series}&output=image",
        data={"params": json.dumps(params | {"restore_label_idx": False})},
        timeout=120,
    )
    assert answer.ok, answer.text
    shape = nib.load(orthanc.scan).shape
    header, _, voxels = answer.content.partition(b"\n\n")
    assert f"sizes: {shape[0]} {shape[1]} {shape[2]}".encode() in header
    assert len(voxels) == np.prod(shape)
    assert np.frombuffer(voxels, np.uint8).any()


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed: apt-get install chromium")
def test_auto_segmentation_in_ohif(pacs_server: Any, orthanc: Any, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(f"{pacs_server.url}/ohif/monai-label?StudyInstanceUIDs={orthanc.study}", timeout=120_000)
        page.get_by_text("Confirm and Hide").click(timeout=90_000)
        page.get_by_text("phantom").first.wait_for(timeout=90_000)
        assert page.locator("#monailabelServerURL").input_value() == f"{pacs_server.url}/"
        page.locator(".settingsTable .actionButton").click()
        tab = page.locator(".tab", has=page.locator("label.tab-label", has_text="Auto-Segmentation"))
        tab.locator("label.tab-label").click(timeout=60_000)
        assert tab.locator("option").all_inner_texts() == ["aslseg ", "ssl ", "adapter "]
        tab.locator("select.selectBox").select_option("ssl")  # the few steps of this round make no adapter that draws
        page.wait_for_timeout(3000)
        before = overlay(page.screenshot())
        with page.expect_response(lambda r: "/infer/" in r.url, timeout=120_000) as got:
            tab.get_by_role("button", name="Run").click()
        assert got.value.ok
        mask = got.value.body().partition(b"\n\n")[2]
        assert np.frombuffer(mask, np.uint8).any()
        after = before
        for _ in range(30):
            page.wait_for_timeout(1000)
            picture = page.screenshot()
            after = overlay(picture)
            if after > before + 500:
                break
        Path(os.environ.get("ASLSEG_SCREENSHOT", tmp_path / "ohif.png")).write_bytes(picture)
        browser.close()
    assert after > before + 500, "the mask came, but the viewer does not show it"


def test_saved_label_goes_to_the_pacs(pacs_server: Any, orthanc: Any, tmp_path: Path) -> None:
    """As DICOM SEG with the right names; the case is not handed out again; machine masks stay here."""
    client = pacs_server.client()
    assert client.next_sample("random", {})["SeriesInstanceUID"] == orthanc.series
    scan = nib.load(client.next_sample("random", {})["path"])
    drawn = np.zeros(scan.shape, np.uint8)
    drawn[20:26, 20:26, 8:12] = 1
    path = tmp_path / "label.nii.gz"
    nib.save(nib.Nifti1Image(drawn, scan.affine), path)

    def segs() -> list[dict]:
        return requests.get(f"{orthanc.url}/series?Modality=SEG", timeout=30).json()

    answer = requests.put(
        f"{pacs_server.url}/datastore/label?image={orthanc.series}&tag=aslseg_pseudo",
        files={"label": ("l.nii.gz", path.read_bytes())},
        data={"params": "{}"},
        timeout=60,
    )
    assert answer.status_code == 403
    assert segs() == []
    client.save_label(orthanc.series, str(path), "final", {"label_info": [{"name": "tumour", "idx": 1}]})
    (seg,) = segs()
    uid = seg["0020000E"]["Value"][0]
    study = f"{orthanc.url}/studies/{orthanc.study}/series/{uid}/metadata"
    names = [s["00620005"]["Value"][0] for s in requests.get(study, timeout=30).json()[0]["00620002"]["Value"]]
    assert names == ["tumour"]
    assert client.next_sample("agreement", {}) == {}
