"""Two annotators and a server, over HTTP: everybody gets the answer to their own clicks."""

from __future__ import annotations

import gzip
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests
import SimpleITK as sitk  # noqa: N813 - the library's own abbreviation

CASES = ("phantom_000", "phantom_001")


def scan(server: Any, case: str) -> Any:
    return nib.load(Path(server.studies) / f"{case}.nii.gz")


def spots(server: Any, case: str) -> list[list[int]]:
    """A voxel deep in the liver, and one of bright bone or muscle elsewhere on another slice."""
    folder = Path(server.studies).with_name("studies_truth")
    truth = np.asarray(nib.load(next(folder.rglob(f"{case}.nii.gz"))).dataobj) > 0
    inside = np.argwhere(truth)
    deep = inside[np.abs(inside - inside.mean(0)).sum(1).argmin()]
    array = np.where(truth, -1000, np.asarray(scan(server, case).dataobj))
    other = np.argwhere(array[..., 4] > 30)
    i, j = other[len(other) // 2]
    return [deep.tolist(), [int(i), int(j), 4]]


def ask(server: Any, model: str, case: str, **params: Any) -> tuple[np.ndarray, dict[str, Any]]:
    client = server.client()
    params = {"label": "liver", "result_extension": ".nrrd", "result_dtype": "uint8", "whole": True, **params}
    file, told = client.infer(model, case, params)
    return sitk.GetArrayFromImage(sitk.ReadImage(file)).transpose(2, 1, 0), told


def test_two_annotators_on_the_same_and_on_different_scans(untrained: Any) -> None:
    questions = {
        (who, case): {"foreground": [spots(untrained, case)[n]], "client_id": who}
        for n, who in enumerate(("ann", "bob"))
        for case in CASES
    }
    alone = {
        key: ask(untrained, "sam", key[1], **(params | {"client_id": f"{key[0]}-alone"}))[0]
        for key, params in questions.items()
    }
    assert not np.array_equal(alone["ann", CASES[0]], alone["bob", CASES[0]])
    ready = threading.Barrier(4)

    def work(key: tuple[str, str]) -> list[np.ndarray]:
        ready.wait(60)
        return [ask(untrained, "sam", key[1], **questions[key])[0] for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        together = dict(zip(questions, pool.map(work, questions), strict=True))
    for key, masks in together.items():
        for mask in masks:
            assert np.array_equal(mask, alone[key]), key


def test_slicers_default_name_stands_for_everybody_and_mixes_nobody(untrained: Any) -> None:
    deep, other = spots(untrained, CASES[0])
    first, _ = ask(untrained, "sam", CASES[0], foreground=[deep], client_id="user-xyz")
    second, _ = ask(untrained, "sam", CASES[0], foreground=[other], client_id="user-xyz")
    again, _ = ask(untrained, "sam", CASES[0], foreground=[deep], client_id="user-xyz")
    own, _ = ask(untrained, "sam", CASES[0], foreground=[other], client_id="nobody-else")
    assert np.array_equal(again, first)
    assert np.array_equal(second, own)


def test_undo_by_a_shorter_list_and_by_asking(untrained: Any) -> None:
    deep, other = spots(untrained, CASES[0])
    one, _ = ask(untrained, "sam", CASES[0], foreground=[deep], client_id="undo")
    two, _ = ask(untrained, "sam", CASES[0], foreground=[deep], background=[other], client_id="undo")
    assert two[tuple(other)] == 0
    shorter, _ = ask(untrained, "sam", CASES[0], foreground=[deep], client_id="undo")
    asked, _ = ask(untrained, "sam", CASES[0], foreground=[deep], background=[other], undo=1, client_id="undo")
    assert np.array_equal(shorter, one)
    assert np.array_equal(asked, one)


def test_a_hasty_answer_holds_the_clicked_slice_and_grows_on(untrained: Any) -> None:
    deep, _ = spots(untrained, CASES[1])
    whole, told = ask(untrained, "sam", CASES[1], foreground=[deep], client_id="patient")
    assert told["growing"] is False
    hasty, told = ask(untrained, "sam", CASES[1], foreground=[deep], client_id="hasty", whole=False)
    assert np.array_equal(hasty[..., deep[2]], whole[..., deep[2]])
    filled = hasty.any((0, 1))
    assert np.array_equal(hasty[..., filled], whole[..., filled])
    final, _ = ask(untrained, "sam", CASES[1], foreground=[deep], client_id="hasty")
    assert np.array_equal(final, whole)


def test_one_slice_for_2d_viewers(untrained: Any) -> None:
    deep, _ = spots(untrained, CASES[0])
    mask, told = ask(untrained, "sam_2d", CASES[0], foreground=[deep], slice=deep[2])
    assert np.flatnonzero(mask.any((0, 1))).tolist() == [deep[2]]
    assert told["label_names"] == {"liver": 1}
    roi = [deep[0] + 12, deep[0] - 12, deep[1] - 12, deep[1] + 12, deep[2], deep[2]]
    boxed, _ = ask(untrained, "sam_2d", CASES[0], roi=roi, slice=800)
    assert np.flatnonzero(boxed.any((0, 1))).tolist() == [deep[2]]


@pytest.mark.parametrize("model", ["sam", "sam_2d"])
def test_bad_clicks_get_an_answer_or_a_reason(untrained: Any, model: str) -> None:
    nothing, told = ask(untrained, model, CASES[0], foreground=[[999, -5, 3]], roi=[5, 5, 6, 6, 7, 7])
    assert not nothing.any()
    assert any("outside the volume" in n for n in told["notes"])
    assert any("no extent" in n for n in told["notes"])
    deep, _ = spots(untrained, CASES[0])
    many, _ = ask(untrained, model, CASES[0], foreground=[deep] * 1000, slice=deep[2])
    assert many[tuple(deep)] == 1
    for params, said in (
        ({"foreground": [deep] * 1001}, "more than 1000 entries"),
        ({"foreground": "all"}, "expected a list"),
        ({"foreground": [deep], "use_ssl": "perhaps"}, "expected true or false"),
        ({"foreground": [deep], "undo": "last"}, "how many"),
        ({"foreground": [deep], "client": "ann"}, None),
    ):
        url = f"{untrained.url}/infer/{model}?image={CASES[0]}"
        answer = requests.post(url, data={"params": json.dumps(params)}, timeout=300)
        assert answer.status_code == 200 if said is None else answer.status_code in (400, 413)
        assert said is None or said in answer.json()["detail"]


def test_a_scan_that_is_replaced_under_its_name(untrained: Any, tmp_path: Path) -> None:
    """Another scan under the same name gets the answer that it gets under a new name."""
    deep, _ = spots(untrained, CASES[0])
    client = untrained.client()
    original = scan(untrained, CASES[0])
    turned = nib.Nifti1Image(np.ascontiguousarray(np.asarray(original.dataobj)[:, ::-1]), original.affine)
    for name, image in (("swapped", original), ("fresh", turned)):
        nib.save(image, tmp_path / f"{name}.nii.gz")
        client.upload_image(str(tmp_path / f"{name}.nii.gz"), name)
    before, _ = ask(untrained, "sam", "swapped", foreground=[deep], client_id="ann")
    nib.save(turned, Path(untrained.studies) / "swapped.nii.gz")
    after, _ = ask(untrained, "sam", "swapped", foreground=[deep], client_id="ann")
    fresh, _ = ask(untrained, "sam", "fresh", foreground=[deep], client_id="ann")
    assert np.array_equal(after, fresh)
    assert not np.array_equal(after, before)
    for name in ("swapped", "fresh"):
        assert requests.delete(f"{untrained.url}/datastore/image?id={name}", timeout=60).ok


@pytest.mark.parametrize(("slices", "spacing"), [(1, 1.0), (5, 0.3), (5, 10.0)])
def test_single_thin_and_thick_slices(untrained: Any, tmp_path: Path, slices: int, spacing: float) -> None:
    deep, _ = spots(untrained, CASES[0])
    original = scan(untrained, CASES[0])
    low = min(max(deep[2] - slices // 2, 0), original.shape[2] - slices)
    image = nib.Nifti1Image(np.asarray(original.dataobj)[..., low : low + slices], np.diag([1, 1, spacing, 1.0]))
    nib.save(image, tmp_path / "odd.nii.gz")
    point = [*deep[:2], deep[2] - low]
    for model in ("sam", "sam_2d"):
        params = {"label": "liver", "foreground": [point], "whole": True, "result_extension": ".nrrd"}
        file, _ = untrained.client().infer(model, "", params, file=str(tmp_path / "odd.nii.gz"))
        mask = sitk.GetArrayFromImage(sitk.ReadImage(file)).transpose(2, 1, 0)
        assert mask.shape == (*original.shape[:2], slices)
        assert mask[tuple(point)] == 1


def test_replies_are_compressed_as_each_client_can_read(untrained: Any) -> None:
    deep, _ = spots(untrained, CASES[0])
    url = f"{untrained.url}/infer/sam?image={CASES[0]}"
    params = {"foreground": [deep], "result_extension": ".nrrd", "result_dtype": "uint8", "whole": True}
    slicer = requests.post(
        url, data={"params": json.dumps(params)}, headers={"Accept-Encoding": "identity"}, timeout=300
    )
    assert "content-encoding" not in slicer.headers
    assert b"encoding: gzip" in slicer.content
    # small phantoms are under the size from which OHIF's raw voxels are worth compressing; a larger scan is not
    tall = scan(untrained, CASES[0])
    image = nib.Nifti1Image(np.tile(np.asarray(tall.dataobj), (1, 1, 6)), tall.affine)
    path = Path(untrained.folder) / "tall.nii.gz"
    nib.save(image, path)
    untrained.client().upload_image(str(path), "tall")
    raw = {"data": {"params": json.dumps(params | {"result_compress": False, "whole": False})}, "timeout": 300}
    url = f"{untrained.url}/infer/sam?image=tall&output=image"
    plain = requests.post(url, headers={"Accept-Encoding": "identity"}, **raw)
    packed = requests.post(url, headers={"Accept-Encoding": "gzip, deflate"}, stream=True, **raw)
    body = packed.raw.read(decode_content=False)
    assert packed.headers["content-encoding"] == "gzip"
    assert len(gzip.decompress(body)) == len(plain.content)
    assert len(body) < len(plain.content) / 10
    assert len(plain.content.partition(b"\n\n")[2]) == np.prod(image.shape)
    assert requests.delete(f"{untrained.url}/datastore/image?id=tall", timeout=60).ok


def test_the_stored_automatic_mask_is_repaired_where_it_is_clicked(untrained: Any, tmp_path: Path) -> None:
    case = "phantom_002"
    stored = np.zeros(scan(untrained, case).shape, np.uint8)
    stored[8:16, 8:16, 6:12] = 1
    stored[34:44, 30:40, 6:14] = 1
    path = tmp_path / "mask.nii.gz"
    nib.save(nib.Nifti1Image(stored, scan(untrained, case).affine), path)
    untrained.client().save_label(case, str(path), "original", {})
    mask, told = ask(untrained, "sam", case, background=[[12, 12, 9]], client_id="repair")
    assert told["repaired"] is True
    assert mask[34:44, 30:40, 6:14].all(), "the component that nobody clicked on stays"
    assert mask[12, 12, 9] == 0
    anew, told = ask(untrained, "sam", case, background=[[12, 12, 9]], use_ssl=False, client_id="repair")
    assert told["repaired"] is False
    assert not anew.any()
