"""A studies disk that is away for a moment, as its users and the disk see it: its place is missing or empty."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from aslseg.cases.studies import FINAL
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.listing import TICK_SECONDS
from aslseg.serving.studies_datastore import StudiesDatastore
from aslseg.settings import Paths, load_settings

SETTINGS, _ = load_settings({"min_free_gb": "0"}, env={})
SHAPE = (6, 5, 4)


def write(path: Path, array: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return path


@pytest.fixture
def label(tmp_path: Path) -> Path:
    array = np.zeros(SHAPE, np.uint8)
    array[1, 2, 3] = 1
    return write(tmp_path / "label.nii.gz", array)


@pytest.fixture
def store(tmp_path: Path, label: Path) -> StudiesDatastore:
    """A store with something that only its JSON knows about a scan and about a label."""
    root = tmp_path / "studies"
    root.mkdir()
    for n in range(2):
        write(root / f"case{n}.nii.gz", np.zeros(SHAPE, np.int16))
    opened = StudiesDatastore(str(root), SETTINGS, Paths(SETTINGS, root))
    opened.save_label("case0", str(label), FINAL, {})
    opened.update_image_info("case0", {"note": "mine"})
    opened.update_label_info("case0", FINAL, {"review": "approved"})
    opened.flush()
    return opened


def requests(store: StudiesDatastore, label: Path) -> list[Callable[[], Any]]:
    return [
        store.status,
        store.json_text,
        store.list_images,
        lambda: store.get_image_uri("case0"),
        lambda: store.save_label("case1", str(label), FINAL, {}),
        lambda: store.add_image("case2", str(label), {}),
        lambda: store.update_image_info("case0", {"note": "another"}),
        lambda: store.remove_label("case0", FINAL),
        store.require_unlocked,
        store.refresh,
    ]


@pytest.mark.parametrize("place", ["missing", "empty", "without labels"])
def test_nothing_is_forgotten_or_written_while_the_disk_is_away(
    store: StudiesDatastore, label: Path, place: str
) -> None:
    gone = store.root if place != "without labels" else store.root / "labels"
    away = store.root.with_name("away")
    os.rename(gone, away)
    if place == "empty":
        gone.mkdir()
    for request in requests(store, label):
        with pytest.raises(RefusedError, match="studies folder") as refused:
            request()
        assert refused.value.status == 503
        time.sleep(TICK_SECONDS / 4)  # folders that have not changed for a tick count as listed
    with pytest.raises(RefusedError):
        store._write_now()
    if place == "empty":
        assert list(gone.iterdir()) == []
        gone.rmdir()
    os.rename(away, gone)
    assert store.status()["total"] == 2
    assert store.get_image_info("case0")["note"] == "mine"
    assert store.get_label_info("case0", FINAL)["review"] == "approved"
    store.flush()
    text = (store.root / "datastore_v2.json").read_text()
    assert "mine" in text
    assert "approved" in text
    store.save_label("case1", str(label), FINAL, {})


def test_a_disk_that_goes_while_it_is_listed(store: StudiesDatastore, monkeypatch: pytest.MonkeyPatch) -> None:
    away, listing = store.root.with_name("away"), store._listing
    assert listing is not None
    changed = listing.changed

    def late() -> set[str]:
        os.rename(store.root, away)
        store.root.mkdir()
        (store.root / "labels").mkdir()
        return changed()

    with monkeypatch.context() as patched:
        patched.setattr(listing, "changed", late)
        with pytest.raises(RefusedError):
            store.update_image_info("case1", {"note": "lost"})
    (store.root / "labels").rmdir()
    for left in store.root.iterdir():
        left.unlink()
    store.root.rmdir()
    os.rename(away, store.root)
    assert store.get_image_info("case0")["note"] == "mine"
    assert store.get_label_info("case0", FINAL)["review"] == "approved"


def test_the_same_folder_may_come_back_under_another_number(store: StudiesDatastore) -> None:
    device, inode = store._folder._identity or (0, 0)
    store._folder._identity = (device + 1, inode)
    assert store.status()["total"] == 2
