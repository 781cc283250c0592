"""A PACS as the datastore: a series is served with all of its images, at their places, or refused with the reason."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from aslseg.errors import BadImageError, DiskFullError
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.serving import series_cache
from aslseg.serving.dicomweb_datastore import DicomWebDatastore
from aslseg.serving.http_errors import RefusedError
from aslseg.settings import Paths, load_settings
from aslseg.volume.io import LPS_TO_RAS, read_image, write_label
from synthetic_dicom import CORONAL, Pacs, make_series


def open_store(pacs: Pacs, home: Path) -> DicomWebDatastore:
    settings, _ = load_settings({"min_free_gb": "0", "home": str(home)}, env={})
    paths = Paths(settings, pacs.base_url)
    return DicomWebDatastore(settings, paths, pacs, {"Modality": "CT"}, str(home / "dicom"))


def slices_served(store: DicomWebDatastore, uid: str) -> int:
    return read_image(Path(store.get_image_uri(uid))).array.shape[2]


@pytest.mark.parametrize("counts", [True, False], ids=["counted by QIDO", "counted by metadata"])
def test_a_series_that_was_still_arriving_is_fetched_again(tmp_path: Path, counts: bool) -> None:
    slices = make_series(12)
    uid = str(slices[0].SeriesInstanceUID)
    pacs = Pacs(slices[:7], counts=counts)
    assert slices_served(open_store(pacs, tmp_path), uid) == 7
    pacs.series[uid] = slices
    store = open_store(pacs, tmp_path)
    assert slices_served(store, uid) == 12
    assert store.get_image_info(uid)["StudyInstanceUID"] == str(slices[0].StudyInstanceUID)
    assert pacs.fetched == 2
    slices_served(open_store(pacs, tmp_path), uid)
    assert pacs.fetched == 2


def test_one_server_sees_that_a_series_has_grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slices = make_series(12)
    uid = str(slices[0].SeriesInstanceUID)
    pacs = Pacs(slices[:7])
    store = open_store(pacs, tmp_path)
    assert slices_served(store, uid) == 7
    pacs.series[uid] = slices
    assert slices_served(store, uid) == 7  # it was asked less than ASK_SECONDS ago
    monkeypatch.setattr(series_cache, "ASK_SECONDS", 0.0)
    assert slices_served(store, uid) == 12


def test_labels_of_a_series_stay_listed_when_it_is_fetched_again(tmp_path: Path) -> None:
    slices = make_series(6)
    uid = str(slices[0].SeriesInstanceUID)
    pacs = Pacs(slices[:4])
    store = open_store(pacs, tmp_path)
    label = tmp_path / "label.nii.gz"
    scan = read_image(Path(store.get_image_uri(uid)))
    write_label(label, np.zeros(scan.array.shape, np.uint8), scan.affine)
    store.save_label(uid, str(label), "draft", {"by": "test"})
    pacs.series[uid] = slices
    again = open_store(pacs, tmp_path)
    again.get_image_uri(uid)
    assert again.get_label_info(uid, "draft")["by"] == "test"


def test_labels_of_a_pacs_are_events_too(tmp_path: Path) -> None:
    slices = make_series(4)
    uid = str(slices[0].SeriesInstanceUID)
    store = open_store(Pacs(slices), tmp_path)
    label, scan = tmp_path / "label.nii.gz", read_image(Path(store.get_image_uri(uid)))
    write_label(label, np.zeros(scan.array.shape, np.uint8), scan.affine)
    store.save_label(uid, str(label), "draft", {"user": "ann"})
    with pytest.raises(RefusedError, match="the label is empty"):
        store.save_label(uid, str(label), "final", {"user": "eve"})
    events = Ledger(store.paths.ledger).events()
    assert [(e.kind, e.case, e.tag, e.details["by"]) for e in events] == [
        ("saved", uid, "draft", "ann"),
        ("refused", uid, "final", "eve"),
    ]


def test_a_fetch_that_was_cut_leaves_nothing_and_is_done_again(tmp_path: Path) -> None:
    slices = make_series(12)
    uid = str(slices[0].SeriesInstanceUID)
    pacs = Pacs(slices)
    pacs.answers = slices[:5]
    store = open_store(pacs, tmp_path)
    with pytest.raises(RefusedError, match="sent 5 of the 12 images"):
        store.get_image_uri(uid)
    pacs.answers = None
    assert slices_served(store, uid) == 12


def test_a_full_disk_while_fetching_leaves_nothing(tmp_path: Path) -> None:
    slices = make_series(12)
    uid = str(slices[0].SeriesInstanceUID)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    slices[5].save_as = full
    with pytest.raises(DiskFullError, match="free some space"):
        open_store(Pacs(slices), tmp_path).get_image_uri(uid)
    del slices[5].save_as
    assert not list((tmp_path / "dicom").rglob("*.dcm"))
    assert slices_served(open_store(Pacs(slices), tmp_path), uid) == 12


def test_a_cache_of_an_earlier_version_is_not_trusted(tmp_path: Path) -> None:
    slices = make_series(12)
    uid = str(slices[0].SeriesInstanceUID)
    store = open_store(Pacs(slices[:7]), tmp_path)
    store.get_image_uri(uid)
    for record in (tmp_path / "dicom").rglob(".series/*.json"):
        record.unlink()
    assert slices_served(open_store(Pacs(slices), tmp_path), uid) == 12


def test_a_fetched_series_is_served_while_the_pacs_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slices, other = make_series(5), make_series(5)
    pacs = Pacs(slices, other)
    uid = str(slices[0].SeriesInstanceUID)
    open_store(pacs, tmp_path).get_image_uri(uid)

    def down(*_: Any, **__: Any) -> None:
        raise requests.ConnectionError("refused")

    monkeypatch.setattr(pacs, "search_for_series", down)
    store = open_store(pacs, tmp_path)
    assert slices_served(store, uid) == 5
    with pytest.raises(RefusedError, match="does not give this series"):
        store.get_image_uri(str(other[0].SeriesInstanceUID))


def test_an_unknown_series_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="the PACS has no series") as refused:
        open_store(Pacs(make_series(3)), tmp_path).get_image_uri("1.2.3")
    assert refused.value.status == 404


@pytest.mark.parametrize(
    ("slices", "reason"),
    [
        (make_series(12)[:5] + make_series(12)[6:], ""),
        (make_series(12, (0, 0.8, 3.0)), "gantry tilt"),
    ],
    ids=["missing", "tilt"],
)
def test_a_series_that_is_no_even_stack_is_refused(tmp_path: Path, slices: list[Any], reason: str) -> None:
    for one in slices:
        one.SeriesInstanceUID = slices[0].SeriesInstanceUID
    uid = str(slices[0].SeriesInstanceUID)
    with pytest.raises(BadImageError, match=f"series {uid}: .*{reason or 'slices are missing'}"):
        open_store(Pacs(slices), tmp_path).get_image_uri(uid)


def test_a_localizer_is_left_out_of_the_volume_and_of_the_images_that_a_seg_refers_to(tmp_path: Path) -> None:
    slices = make_series(12)
    uid = str(slices[0].SeriesInstanceUID)
    localizer = make_series(1, orientation=CORONAL, like=slices[0])
    pacs = Pacs(localizer + slices)
    store = open_store(pacs, tmp_path)
    volume = read_image(Path(store.get_image_uri(uid)))
    for k, one in enumerate(slices):
        place = LPS_TO_RAS @ [*map(float, one.ImagePositionPatient), 1]
        np.testing.assert_allclose(volume.affine @ [0, 0, k, 1], place, atol=1e-3)
    folder = Path(store.get_image_uri(uid)).with_name(uid)
    assert {p.stem for p in folder.iterdir()} == {str(s.SOPInstanceUID) for s in slices}
    slices_served(open_store(pacs, tmp_path), uid)
    assert pacs.fetched == 1


def test_the_cache_lies_in_model_dir(tmp_path: Path) -> None:
    settings, _ = load_settings({"model_dir": str(tmp_path / "models")}, env={})
    paths = Paths(settings, "http://127.0.0.1:8042/dicom-web")
    assert paths.models == tmp_path / "models"
    assert paths.home.is_relative_to(tmp_path / "models")
    other = Paths(settings, "http://127.0.0.1:8043/dicom-web")
    assert other.home != paths.home
