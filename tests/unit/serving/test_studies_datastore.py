"""The datastore: nothing outside the folder, nothing lost, whatever happens to its JSON file."""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
from filelock import FileLock

from aslseg import files
from aslseg.cases.studies import FINAL, ORIGINAL, PSEUDO
from aslseg.errors import BadImageError, BadLabelError, DiskFullError, FileWriteError, NoResourcesError
from aslseg.files import sha256, write_json
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.routes.uploads import PREFIX, remove_stale_uploads, upload_folder
from aslseg.serving.studies_datastore import StudiesDatastore
from aslseg.settings import Paths, load_settings

SETTINGS, _ = load_settings({"min_free_gb": "0"}, env={})
AFFINE = np.diag([-0.8, -0.8, 2.5, 1.0])
SHAPE = (6, 5, 4)


def write(path: Path, array: np.ndarray | None = None, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.int16) if array is None else array, affine), path)
    return path


def open_store(folder: Path) -> StudiesDatastore:
    return StudiesDatastore(str(folder), SETTINGS, Paths(SETTINGS, folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "studies"
    for n in range(3):
        write(root / f"case{n}.nii.gz")
    return root


@pytest.fixture
def store(folder: Path) -> StudiesDatastore:
    opened = open_store(folder)
    opened.flush()  # the JSON is written by a thread; from here on only what a test changes
    return opened


def drawn(value: int, at: tuple[int, int, int] = (1, 2, 3)) -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array[at] = value
    return array


def test_lists_scans_and_passes_over_junk(folder: Path) -> None:
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.nii.gz").write_bytes(b"")
    (folder / "broken.nii.gz").write_bytes(b"junk")
    (folder / "sub").mkdir()
    write(folder / "sub" / "inner.nii.gz")
    assert sorted(open_store(folder).list_images()) == ["broken", "case0", "case1", "case2"]


def test_sees_files_that_come_and_go(store: StudiesDatastore, folder: Path) -> None:
    write(folder / "later.nii.gz")
    assert "later" in store.list_images()
    write(folder / "labels" / FINAL / "later.nii.gz", drawn(1))
    assert store.status()["completed"] == 1
    (folder / "later.nii.gz").unlink()
    assert "later" not in store.list_images()


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "..",
        ".",
        "/abs",
        "a/b",
        "a\\b",
        "C:\\x",
        "\\\\host\\x",
        "nul\0",
        "new\nline",
        "x" * 300,
        "",
        ".dot",
        "🙂",
        "a\u202eb",
        "trailing ",
        "%2e%2e%2fx",
    ],
)
def test_unsafe_names_are_refused(store: StudiesDatastore, folder: Path, name: str, tmp_path: Path) -> None:
    source = write(tmp_path / "up.nii.gz", drawn(1))

    def outside() -> list[Path]:
        return sorted(p for p in tmp_path.rglob("*") if p.is_file() and store.kept.home not in p.parents)

    before = outside()
    with pytest.raises(RefusedError, match="kept as parked/case0-"):
        store.save_label("case0", str(source), name, {})
    if name:
        with pytest.raises(RefusedError):
            store.add_image(name, str(source), {})
        with pytest.raises(RefusedError, match="kept as parked/unknown-"):
            store.save_label(name, str(source), FINAL, {})
        with pytest.raises(RefusedError):
            store.remove_image(name)
    assert outside() == before


def test_a_link_of_somebody_else_that_leads_outside_is_not_followed(
    store: StudiesDatastore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / "labels" / "linked").symlink_to(outside)
    monkeypatch.setattr("aslseg.serving.links.administrators", lambda root: {4711})
    upload = write(tmp_path / "l.nii.gz", drawn(1))
    with pytest.raises(RefusedError, match=r"link.*parked"):
        store.save_label("case0", str(upload), "linked", {})
    assert not list(outside.iterdir())
    assert [p.read_bytes() for p in (folder / ".aslseg" / "parked").glob("*.gz")] == [upload.read_bytes()]
    (folder / "secret.nii.gz").symlink_to(write(outside / "secret.nii.gz"))
    assert "secret" not in store.list_images()
    assert "secret" not in open_store(folder).list_images()


@pytest.mark.parametrize("what", ["labels", "labels/final"])
def test_a_link_of_the_administrator_to_another_disk_is_followed(tmp_path: Path, what: str) -> None:
    folder, disk = tmp_path / "studies", tmp_path / "disk"
    write(disk / "scan.nii.gz")
    (disk / "here").mkdir()
    (folder / what).parent.mkdir(parents=True)
    (folder / what).symlink_to(disk / "here")
    (folder / "scan.nii.gz").symlink_to(disk / "scan.nii.gz")
    store = open_store(folder)
    store.save_label("scan", str(write(tmp_path / "l.nii.gz", drawn(1))), FINAL, {})
    assert store.get_labeled_images() == ["scan"]
    assert next((disk / "here").rglob("scan.nii.gz")).is_file()
    store.remove_label("scan", FINAL)
    assert not list((disk / "here").rglob("scan.nii.gz"))


def test_labels_are_decoded_by_name_in_list_order(store: StudiesDatastore, tmp_path: Path, folder: Path) -> None:
    array = drawn(1) + drawn(2, (0, 0, 0))
    info = {"label_info": [{"name": "Tumour", "idx": 2}, {"name": "liver", "idx": 3}], "client_id": "ann"}
    store.save_label("case0", str(write(tmp_path / "l.nii.gz", array)), FINAL, info)
    saved = nib.load(store.get_label_uri("case0", FINAL))
    values = np.asarray(saved.dataobj)
    assert (values[1, 2, 3], values[0, 0, 0], int(values.astype(bool).sum())) == (2, 1, 2)
    assert np.allclose(saved.affine, AFFINE)
    kept = store.get_label_info("case0", FINAL)
    assert kept["client_id"] == "ann"
    assert kept["label_info"] == [{"name": "liver", "idx": 1}, {"name": "tumour", "idx": 2}]


def test_background_segment_shifts_nothing(store: StudiesDatastore, tmp_path: Path) -> None:
    info = {"label_info": [{"name": "background", "idx": 1}, {"name": "liver", "idx": 2}]}
    store.save_label("case0", str(write(tmp_path / "l.nii.gz", drawn(1))), FINAL, info)
    assert np.asarray(nib.load(store.get_label_uri("case0", FINAL)).dataobj).max() == 1


@pytest.mark.parametrize(
    ("array", "affine", "info", "match"),
    [
        (drawn(1), AFFINE, {"label_info": [{"name": "livver", "idx": 1}]}, "livver.*liver"),
        (drawn(7), AFFINE, {}, "values"),
        (np.zeros((6, 5, 3), np.uint8), AFFINE, {}, "shape"),
        (drawn(1), np.diag([0.8, 0.8, 2.5, 1.0]), {}, "affine"),
    ],
)
def test_label_that_does_not_fit_is_parked(
    store: StudiesDatastore,
    folder: Path,
    tmp_path: Path,
    array: np.ndarray,
    affine: np.ndarray,
    info: dict,
    match: str,
) -> None:
    source = write(tmp_path / "upload.nii.gz", array, affine)
    with pytest.raises(BadLabelError, match=f"(?s){match}.*parked"):
        store.save_label("case0", str(source), FINAL, info)
    parked = list((folder / ".aslseg" / "parked").glob("*.nii.gz"))
    assert [p.read_bytes() for p in parked] == [source.read_bytes()]
    assert store.status()["completed"] == 0


def test_empty_unknown_segment_is_no_obstacle(store: StudiesDatastore, tmp_path: Path) -> None:
    info = {"label_info": [{"name": "liver"}, {"name": "Segment_2"}]}
    store.save_label("case0", str(write(tmp_path / "l.nii.gz", drawn(1))), FINAL, info)
    assert store.status()["completed"] == 1


def layered(path: Path, layers: int) -> Path:
    array = np.zeros((layers, *SHAPE), np.uint8)
    array[0, 1, 2, 3] = 1
    step = " ".join(f"({','.join(str(v) for v in AFFINE[:3, n] * (-1, -1, 1))})" for n in range(3))
    head = f"NRRD0004\ntype: uint8\ndimension: 4\nspace: left-posterior-superior\nsizes: {layers} 6 5 4\n"
    head += f"space directions: none {step}\nkinds: list domain domain domain\nencoding: gzip\n"
    head += "space origin: (0,0,0)\nSegment0_Name:=liver\nSegment0_LabelValue:=1\nSegment0_Layer:=0\n\n"
    path.write_bytes(head.encode() + gzip.compress(array.tobytes(order="F")))
    return path


def test_the_names_of_a_client_buy_no_more_than_an_upload_may_cost(folder: Path, tmp_path: Path) -> None:
    upload = layered(tmp_path / "l.seg.nrrd", 10)
    repeated = {"label_info": [{"name": "liver"}] * 20}
    named = {"label_info": [{"name": f"s{n}"} for n in range(20)]}
    store = open_store(folder)
    with pytest.raises(BadLabelError, match="voxels, more than the voxels of its scan"):
        store.save_label("case0", str(upload), FINAL, repeated)
    store.save_label("case0", str(upload), FINAL, named)
    limited, _ = load_settings({"min_free_gb": "0", "max_upload_voxels": "1000"}, env={})
    store = StudiesDatastore(str(folder), limited, Paths(limited, folder))
    with pytest.raises(BadLabelError, match="voxels, more than max_upload_voxels"):
        store.save_label("case0", str(upload), FINAL, named)
    with pytest.raises(BadLabelError, match="256 segments; expected at most 255"):
        store.save_label("case0", str(upload), FINAL, {"label_info": [{"name": f"s{n}"} for n in range(256)]})


def test_earlier_human_labels_stay_as_versions(store: StudiesDatastore, folder: Path, tmp_path: Path) -> None:
    for n in range(3):
        source = write(tmp_path / "l.nii.gz", drawn(1, (n, 0, 0)))
        store.save_label("case0", str(source), FINAL, {"client_id": f"user{n}"})
    store.remove_label("case0", FINAL, by="eve")
    versions = sorted((folder / ".aslseg" / "versions" / "case0").glob("*.nii.gz"))
    versions += (folder / ".aslseg" / "trash" / "case0").glob("*.nii.gz")
    assert [int(np.asarray(nib.load(v).dataobj)[n, 0, 0]) for n, v in enumerate(versions)] == [1, 1, 1]
    infos = [json.loads(v.with_name(v.name.replace(".nii.gz", ".json")).read_text()) for v in versions]
    assert [i["client_id"] for i in (*infos[:2], infos[2]["info"])] == ["user0", "user1", "user2"]
    assert infos[2]["by"] == "eve"
    assert store.status()["completed"] == 0
    assert "case0" in store.get_unlabeled_images()


def test_label_files_that_a_saved_one_replaces_stay_as_versions(
    store: StudiesDatastore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tag in (FINAL, "second_reader"):
        others = [write(folder / "labels" / tag / f"case0{e}", drawn(1)) for e in (".nii", ".nii.gz")]
        others.append(folder / "labels" / tag / "case0.seg.nrrd")
        others[-1].write_bytes(b"drawn elsewhere")
        before = {path.read_bytes() for path in (others if tag == FINAL else (others[0], others[2]))}
        synced: list[Path] = []
        with monkeypatch.context() as watched:
            watched.setattr("aslseg.serving.studies_datastore.sync_to_disk", synced.append)
            store.save_label("case0", str(write(tmp_path / "l.nii.gz", drawn(2))), tag, {})
        assert os.listdir(folder / "labels" / tag) == ["case0.nii.gz"]
        assert synced == [folder / "labels" / tag], "the names are gone from the disk, too"
        kept = [p for p in (folder / ".aslseg" / "versions" / "case0").iterdir() if p.suffix != ".json"]
        assert before <= {path.read_bytes() for path in kept}


def test_a_deleted_file_changes_its_folder_on_the_disk(
    store: StudiesDatastore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("aslseg.serving.kept_files.sync_to_disk", synced.append)
    store.remove_image("case0")
    assert synced == [folder / ".aslseg" / "trash" / "case0", folder]


def test_an_uploaded_scan_replaces_no_file_that_is_not_listed(
    store: StudiesDatastore, folder: Path, tmp_path: Path
) -> None:
    hidden = write(folder / "case0_seg.nii.gz", drawn(1))
    (folder / "linked.nii.gz").symlink_to(tmp_path / "unmounted.nii.gz")
    before, upload = hidden.read_bytes(), write(tmp_path / "up.nii.gz")
    for case in ("case0_seg", "linked"):
        for source in (upload, write(tmp_path / "up.nii")):
            with pytest.raises(RefusedError, match="not listed") as refusal:
                store.add_image(case, str(source), {})
            assert refusal.value.status == 409
    assert hidden.read_bytes() == before
    assert (folder / "linked.nii.gz").is_symlink()
    assert not (tmp_path / "unmounted.nii.gz").exists()
    assert not list(folder.glob("*.nii"))


def test_pseudo_labels_are_for_rounds_only(store: StudiesDatastore, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="rounds only"):
        store.save_label("case0", str(write(tmp_path / "l.nii.gz", drawn(1))), PSEUDO, {})


def test_same_scan_again_is_fine_another_is_refused(store: StudiesDatastore, folder: Path, tmp_path: Path) -> None:
    assert store.add_image("case0", str(folder / "case0.nii.gz"), {}) == "case0"
    other = write(tmp_path / "other.nii.gz", np.ones(SHAPE, np.int16))
    with pytest.raises(RefusedError, match="another scan"):
        store.add_image("case0", str(other), {})
    (tmp_path / "junk.nii.gz").write_bytes(b"junk")
    with pytest.raises(BadImageError):
        store.add_image("junk", str(tmp_path / "junk.nii.gz"), {})


@pytest.mark.parametrize("part", [0, 1, 2, 3, 4, 5, 6, 7])
def test_truncated_json_is_recovered(folder: Path, tmp_path: Path, part: int) -> None:
    store = open_store(folder)
    store.save_label("case1", str(write(tmp_path / "l.nii.gz", drawn(1))), FINAL, {"client_id": "ann"})
    store.update_image_info("case2", {"note": "seen"})
    store.flush()
    path = folder / "datastore_v2.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * part // 8])
    again = open_store(folder)
    assert sorted(again.list_images()) == ["case0", "case1", "case2"]
    assert again.get_labeled_images() == ["case1"]
    assert again.get_label_info("case1", FINAL)["client_id"] == "ann"
    assert again.get_image_info("case2")["note"] == "seen", "the log has what the backup lacks"
    assert json.loads(path.read_text())["objects"]["case1"]
    assert list(folder.glob("datastore_v2.json.damaged-*"))


def test_deleted_json_is_recovered(folder: Path, tmp_path: Path) -> None:
    store = open_store(folder)
    store.save_label("case1", str(write(tmp_path / "l.nii.gz", drawn(1))), FINAL, {})
    store.flush()
    for path in folder.glob("datastore_v2.json*"):
        path.unlink()
    assert open_store(folder).get_labeled_images() == ["case1"]


def test_masks_of_a_round_are_adopted_with_their_names(store: StudiesDatastore, folder: Path) -> None:
    home = folder / ".aslseg"
    info = {"model": "aslseg", "params": {"label_names": {"liver": 1, "tumour": 2}, "round": 3}}
    write_json(home / "original" / "case0.json", info)
    write(folder / "labels" / ORIGINAL / "case0.nii.gz", drawn(1))
    write(folder / "labels" / PSEUDO / "case0.nii.gz", drawn(1))
    write(folder / "labels" / ORIGINAL / "case1.nii.gz", drawn(1))
    assert store.status()["label_tags"] == {ORIGINAL: 2, PSEUDO: 1}
    assert store.get_label_info("case0", ORIGINAL)["params"]["round"] == 3
    assert list(store.get_label_info("case1", ORIGINAL)["params"]["label_names"]) == ["liver", "tumour"]
    write_json(home / "original" / "case0.json", {**info, "params": {"round": 4}})
    assert store.get_label_info("case0", ORIGINAL)["params"]["round"] == 4


SAVER = """
import sys
from test_studies_datastore import open_store
from pathlib import Path
store = open_store(Path(sys.argv[1]))
for n in range(30):
    store.update_image_info(f"case{n % 3}", {f"{sys.argv[2]}{n}": n})
"""


def test_two_processes_lose_nothing(folder: Path) -> None:
    command = [sys.executable, "-c", SAVER, str(folder)]
    running = [subprocess.Popen([*command, name], cwd=Path(__file__).parent) for name in ("a", "b")]
    assert [p.wait(600) for p in running] == [0, 0]
    store = open_store(folder)
    found = {k for n in range(3) for k in store.get_image_info(f"case{n}")}
    assert {f"{p}{n}" for p in "ab" for n in range(30)} <= found


def test_threads_lose_nothing(store: StudiesDatastore, folder: Path) -> None:
    def work(name: str) -> None:
        for n in range(25):
            store.update_image_info(f"case{n % 3}", {f"{name}{n}": n})
            store.status()

    threads = [threading.Thread(target=work, args=(f"t{t}-",)) for t in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    found = {k for n in range(3) for k in open_store(folder).get_image_info(f"case{n}")}
    assert {f"t{t}-{n}" for t in range(4) for n in range(25)} <= found


def test_what_is_deleted_goes_to_the_trash_with_an_event(store: StudiesDatastore, folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "l.nii.gz", drawn(1))
    store.save_label("case0", str(source), FINAL, {"client_id": "ann"})
    label, scan = (folder / "labels" / FINAL / "case0.nii.gz").read_bytes(), (folder / "case0.nii.gz").read_bytes()
    store.remove_image("case0", by="eve")
    assert not (folder / "case0.nii.gz").exists()
    assert "case0" not in store.list_images()
    events = Ledger(store.paths.ledger).events(kinds=("deleted",))
    assert [(e.case, e.tag, e.details["by"]) for e in events] == [("case0", FINAL, "eve"), ("case0", "image", "eve")]
    kept = [(store.paths.home / e.details["trash"]).read_bytes() for e in events]
    assert kept == [label, scan]
    assert [sha256(store.paths.home / e.details["trash"]) for e in events] == [e.details["sha256"] for e in events]


def test_what_is_deleted_is_gone_while_another_writer_is_at_work(store: StudiesDatastore, folder: Path) -> None:
    store.remove_image("case0", by="eve")
    with FileLock(str(folder / ".lock")):
        assert "case0" not in store.list_images()


def test_refused_uploads_are_events_with_the_authenticated_name(
    store: StudiesDatastore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, upload = Ledger(store.paths.ledger), write(tmp_path / "l.nii.gz", drawn(7))
    with pytest.raises(BadLabelError):
        store.save_label("case0", str(upload), FINAL, {"user": "ann"})
    with pytest.raises(RefusedError, match="another scan"):
        store.add_image("case1", str(write(tmp_path / "s.nii.gz", drawn(1))), {"user": "eve"})
    with pytest.raises(RefusedError):
        store.save_label("../case0", str(upload), FINAL, {"user": "eve"})
    first, second, third = ledger.events(kinds=("refused",))
    assert (first.case, first.tag, first.details["by"]) == ("case0", FINAL, "ann")
    assert first.details["sha256"] == sha256(upload)
    (parked,) = (folder / ".aslseg" / "parked").glob("case0-*.nii.gz")
    assert f"parked/{parked.name}" in first.details["why"]
    assert (second.case, second.tag, second.details["by"]) == ("case1", "image", "eve")
    assert (third.case, third.tag, third.details["by"]) == ("unknown", FINAL, "eve"), "kept under that name"
    assert ledger.verify() is None
    # a ledger that cannot be written hides no refusal
    monkeypatch.setattr(Ledger, "append", full)
    with pytest.raises(BadLabelError, match="parked"):
        store.save_label("case0", str(upload), FINAL, {"user": "ann"})


@pytest.mark.parametrize("tag", [FINAL, ORIGINAL, "second_reader"])
@pytest.mark.parametrize("content", [b"not a nifti", b""])
def test_every_tag_is_checked_as_final_is(
    store: StudiesDatastore, folder: Path, tmp_path: Path, tag: str, content: bytes
) -> None:
    path = tmp_path / "l.nii.gz"
    path.write_bytes(content)
    with pytest.raises(BadLabelError, match="parked"):
        store.save_label("case0", str(path), tag, {})
    assert tag not in store.get_labels_by_image_id("case0")
    assert not (folder / "labels" / tag / "case0.nii.gz").exists()


@pytest.mark.parametrize("tag", ["Final", "FINAL", "Original", "ASLSEG_pseudo", "Second_Reader"])
def test_tags_that_differ_in_case_only_are_refused(store: StudiesDatastore, tmp_path: Path, tag: str) -> None:
    source = write(tmp_path / "l.nii.gz", drawn(1))
    store.save_label("case0", str(source), "second_reader", {})
    with pytest.raises(RefusedError, match=r"save under .*parked"):
        store.save_label("case0", str(source), tag, {})


def test_raw_voxels_of_ohif(store: StudiesDatastore, folder: Path, tmp_path: Path) -> None:
    raw = tmp_path / "label.bin"
    raw.write_bytes(drawn(1).tobytes(order="F"))
    store.save_label("case0", str(raw), FINAL, {"label_info": [{"name": "tumour"}]})
    assert (np.asarray(nib.load(store.get_label_uri("case0", FINAL)).dataobj) == drawn(2)).all()


@pytest.mark.parametrize("content", [b"x" * 100, drawn(7).tobytes()])
def test_raw_voxels_that_do_not_fit_are_kept(
    store: StudiesDatastore, folder: Path, tmp_path: Path, content: bytes
) -> None:
    raw = tmp_path / "label.bin"
    raw.write_bytes(content)
    with pytest.raises(BadLabelError, match="parked"):
        store.save_label("case0", str(raw), FINAL, {})
    assert [p.read_bytes() for p in (folder / ".aslseg" / "parked").glob("*.bin")] == [content]


def test_a_drawing_is_kept_whatever_is_in_its_way(
    store: StudiesDatastore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "l.nii.gz", drawn(1))
    (folder / "broken.nii.gz").write_bytes(b"junk")
    with pytest.raises(BadImageError, match="parked"):
        store.save_label("broken", str(source), FINAL, {"client_id": "ann"})
    with pytest.raises(RefusedError, match=r"no scan 'gone'.*parked"):
        store.save_label("gone", str(source), FINAL, {})
    monkeypatch.setattr("aslseg.serving.studies_datastore.require_free_disk", full)
    with pytest.raises(DiskFullError, match="parked"):
        store.save_label("case0", str(source), FINAL, {})
    parked = sorted((folder / ".aslseg" / "parked").glob("*.nii.gz"))
    assert [p.read_bytes() for p in parked] == [source.read_bytes()] * 3
    about = json.loads(parked[0].with_name(f"{parked[0].name}.json").read_text())
    assert (about["case"], about["params"]) == ("broken", {"client_id": "ann"})
    assert "junk" not in about["reason"]


def test_saving_reads_no_voxel_of_the_scan_and_writes_the_label_once(
    store: StudiesDatastore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = write(folder / "cut.nii")
    os.truncate(scan, 352)  # its header
    synced: list[Path] = []
    sync = files.sync_to_disk
    monkeypatch.setattr(files, "sync_to_disk", lambda path: synced.append(path) or sync(path))
    store.save_label("cut", str(write(tmp_path / "l.nii.gz", drawn(1))), FINAL, {})
    final = folder / "labels" / FINAL
    assert (np.asarray(nib.load(final / "cut.nii.gz").dataobj) == drawn(1)).all()
    assert [path == final or path.parent == final for path in synced].count(True) == 2, "the file and its name"
    assert not [path for path in synced if "parked" in path.parts], "it is in the studies now"
    assert store.paths.ledger.with_name("ledger.sqlite-wal").exists(), "SQLite does not clear up after each event"


def test_a_refused_upload_is_on_the_disk_before_that_is_answered(
    store: StudiesDatastore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("aslseg.serving.kept_files.sync_to_disk", synced.append)
    monkeypatch.setattr(files, "sync_to_disk", synced.append)
    with pytest.raises(BadLabelError, match="parked"):
        store.save_label("case0", str(write(tmp_path / "l.nii.gz", drawn(7))), FINAL, {})
    (kept,) = (folder / ".aslseg" / "parked").glob("*.nii.gz")
    assert synced.index(kept) < synced.index(kept.parent), "the file, then its name"


@pytest.mark.parametrize(
    ("problem", "kind", "match"),
    [
        (OSError(errno.ENOSPC, "No space left"), DiskFullError, "full.*parked"),
        (OSError(errno.EIO, "Input/output error"), FileWriteError, r"Input/output error.*parked"),
        (MemoryError(), NoResourcesError, "memory.*parked"),
        (KeyError("a fault of ours"), KeyError, "a fault of ours"),
    ],
)
def test_any_error_leaves_the_upload_on_the_disk_with_its_reason(
    store: StudiesDatastore,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    problem: Exception,
    kind: type[Exception],
    match: str,
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("aslseg.serving.kept_files.sync_to_disk", synced.append)
    monkeypatch.setattr("aslseg.serving.studies_datastore.write_label_into", mock.Mock(side_effect=problem))
    monkeypatch.setattr("aslseg.serving.studies_datastore.atomic_file", plain_file)
    source = write(tmp_path / "l.nii.gz", drawn(1))
    with pytest.raises(kind, match=match):
        store.save_label("case0", str(source), FINAL, {"user": "ann"})
    (kept,) = (folder / ".aslseg" / "parked").glob("*.nii.gz")
    assert kept.read_bytes() == source.read_bytes()
    assert synced[:2] == [kept, kept.parent]
    reason = json.loads(kept.with_name(f"{kept.name}.json").read_text())["reason"]
    assert "was stopped" not in reason
    assert reason
    if kind is not KeyError:
        (event,) = Ledger(store.paths.ledger).events(kinds=("refused",))
        assert f"parked/{kept.name}" in event.details["why"]


@pytest.mark.parametrize(
    ("problem", "kind", "match"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFullError, "full"),
        (OSError(errno.EIO, "Input/output error"), FileWriteError, "Input/output error"),
        (MemoryError(), NoResourcesError, "memory"),
    ],
)
def test_a_scan_that_the_machine_cannot_take_says_why_and_changes_nothing(
    store: StudiesDatastore,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    problem: Exception,
    kind: type[Exception],
    match: str,
) -> None:
    before, source = store.list_images(), write(tmp_path / "new.nii.gz")
    monkeypatch.setattr("aslseg.serving.studies_datastore.copy_file", mock.Mock(side_effect=problem))
    with pytest.raises(kind, match=match):
        store.add_image("new", str(source), {"user": "ann"})
    assert store.list_images() == before
    (event,) = Ledger(store.paths.ledger).events(kinds=("refused",))
    assert match in event.details["why"]
    monkeypatch.undo()
    assert store.add_image("new", str(source), {}) == "new"


@contextmanager
def plain_file(path: Path) -> Iterator[Path]:
    """A file that is written without :func:`aslseg.files.write_errors`."""
    yield path.with_name(f".tmp-{path.name}")


def test_temporary_files_of_a_killed_server_go_at_the_next_start(folder: Path) -> None:
    open_store(folder)
    home = folder / ".aslseg"
    places = [home / name for name in ("parked", "versions/case0", "trash/case0")]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        for name in (".tmp-old.nii.gz", ".tmp-new.nii.gz", "kept.nii.gz"):
            (place / name).touch()
        for name in (".tmp-old.nii.gz", "kept.nii.gz"):
            os.utime(place / name, (0, 0))
    open_store(folder)
    assert [sorted(os.listdir(place)) for place in places] == [[".tmp-new.nii.gz", "kept.nii.gz"]] * 3


def test_folders_of_uploads_of_a_killed_server_go_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with upload_folder() as now:
        for name in (f"{PREFIX}old", f"{PREFIX}new", "others"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "label.nii.gz").touch()
        (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "others")
        for name in (f"{PREFIX}old", "others", f"{PREFIX}link"):
            os.utime(tmp_path / name, (0, 0), follow_symlinks=False)
        with monkeypatch.context() as other:
            other.setattr("os.getuid", lambda: 4711)
            remove_stale_uploads()
        assert (tmp_path / f"{PREFIX}old").is_dir(), "of another account"
        remove_stale_uploads()
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {f"{PREFIX}new", f"{PREFIX}link", "others", Path(now).name}
        assert (tmp_path / "others" / "label.nii.gz").exists()


def full(folder: Path | Ledger, *_: object) -> None:
    raise DiskFullError(f"{folder}: too little free disk")


def test_a_held_lock_is_named_and_stops_no_reader(store: StudiesDatastore, folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(folder / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        write(folder / "later.nii.gz")
        assert store.status()["total"] == 3, "the known ones"
        with mock.patch("aslseg.serving.shared_json.LOCK_SECONDS", 0.05):
            with pytest.raises(RefusedError, match=rf"locked .*process {holder.pid} \(python.*parked") as refused:
                store.save_label("case0", str(write(tmp_path / "l.nii.gz", drawn(1))), FINAL, {})
            assert refused.value.status == 503
        holder.communicate(b"\n")
    assert store.status()["total"] == 4
    store.save_label("case0", str(write(tmp_path / "l.nii.gz", drawn(1))), FINAL, {})


HOLDER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_what_json_cannot_hold_is_refused_and_nothing_is_lost(
    store: StudiesDatastore, folder: Path, tmp_path: Path
) -> None:
    store.save_label("case0", str(write(tmp_path / "l.nii.gz", drawn(1))), FINAL, {"client_id": "ann"})
    store.flush()
    before = (folder / "datastore_v2.json").read_bytes()
    with pytest.raises(RefusedError, match="cannot store"):
        store.update_image_info("case1", {"note": "\ud800"})
    store.flush()
    assert (folder / "datastore_v2.json").read_bytes() == before
    assert "note" not in store.get_image_info("case1")
    assert open_store(folder).get_label_info("case0", FINAL)["client_id"] == "ann"


def test_several_generations_of_backup(store: StudiesDatastore, folder: Path) -> None:
    path = folder / "datastore_v2.json"
    for n in range(8):
        store.update_image_info("case0", {"n": n})
        store.flush()
        for backup in folder.glob("datastore_v2.json.bak*"):
            os.utime(backup, (1, 1))  # hours pass
    found = [
        json.loads((folder / f"datastore_v2.json.bak{g}").read_text())["objects"]["case0"]["image"]["info"]["n"]
        for g in ("", 1, 2, 3, 4)
    ]
    assert found == [6, 5, 4, 3, 2]
    for damaged in ("", ".bak", ".bak1"):
        path.with_name(f"{path.name}{damaged}").write_text('{"name": ')
    again = open_store(folder)
    assert again.get_image_info("case0")["n"] == 7, "the log has what the backup lacks"
    assert "recovered from its backup datastore_v2.json.bak2" in again.recovered


def test_provenance_is_rebuilt_from_label_files_and_ledger(
    store: StudiesDatastore, folder: Path, tmp_path: Path
) -> None:
    store.save_label("case1", str(write(tmp_path / "l.nii.gz", drawn(1))), FINAL, {"user": "ann"})
    info = store.get_label_info("case1", FINAL)
    store.flush()
    for path in folder.glob("datastore_v2.json*"):
        path.unlink()
    again = open_store(folder)
    assert again.get_label_info("case1", FINAL) == info
    assert "rebuilt from the label files and the ledger" in again.recovered


@pytest.mark.parametrize("point", ["before the file", "before the JSON"])
def test_a_kill_between_label_and_info(folder: Path, tmp_path: Path, point: str) -> None:
    store = open_store(folder)
    store.save_label("case0", str(write(tmp_path / "l.nii.gz", drawn(1))), FINAL, {"user": "ann"})
    killed = {
        "before the file": "aslseg.serving.saved_labels.SavedLabels.record_saved",
        "before the JSON": "aslseg.serving.studies_datastore.StudiesDatastore._remove_other_files",
    }[point]
    store.flush()
    kept = (folder / "datastore_v2.json").read_bytes()
    upload = write(tmp_path / "l.nii.gz", drawn(2))
    with mock.patch(killed, side_effect=SystemExit), pytest.raises(SystemExit):
        store.save_label("case0", str(upload), FINAL, {"user": "eve"})
    (folder / "datastore_v2.json").write_bytes(kept)
    (folder / ".tmp-abc.nii.gz").write_bytes(b"half a file")
    os.utime(folder / ".tmp-abc.nii.gz", (1, 1))
    again = open_store(folder)
    again.flush()
    mask, info = again.get_label_uri("case0", FINAL), again.get_label_info("case0", FINAL)
    expected = (1, "ann") if point == "before the file" else (2, "eve")
    assert (int(np.asarray(nib.load(mask).dataobj).max()), info["user"]) == expected
    assert info["sha256"] == sha256(Path(mask))
    assert not list(folder.glob(".tmp-*"))
    parked = next((folder / ".aslseg" / "parked").glob("*.nii.gz"))
    assert parked.read_bytes() == upload.read_bytes(), "the drawing is there even if it did not get into the studies"


def test_a_label_that_was_copied_over_is_noticed_at_the_next_start(folder: Path, tmp_path: Path) -> None:
    open_store(folder).save_label("case0", str(write(tmp_path / "l.nii.gz", drawn(1))), FINAL, {"user": "ann"})
    path = write(folder / "labels" / FINAL / "case0.nii.gz", drawn(2))
    os.utime(path, (2e9, 2e9))
    info = open_store(folder).get_label_info("case0", FINAL)
    assert "not saved through the server" in info["note"]
    assert info["sha256"] == sha256(path)
    assert "user" not in info


def test_a_segmentation_among_the_scans_is_never_handed_out(folder: Path) -> None:
    for name in ("case0_seg.nii.gz", "other.seg.nrrd"):
        (folder / name).write_bytes((folder / "case0.nii.gz").read_bytes())
    assert sorted(open_store(folder).list_images()) == ["case0", "case1", "case2"]


@pytest.mark.parametrize(
    ("noted", "person", "expected"),
    [
        ({"agreement": {"ts": 100, "client_id": "user-xyz"}}, None, 100),
        ({"agreement": {"ts": 100, "client_id": "ann"}, "random": {"ts": 200, "client_id": "bob"}}, "ann", 100),
        ({"agreement": {"ts": 100, "client_id": "pc7"}, "random": {"ts": 200, "client_id": "pc8"}}, "ann", 200),
        ({}, None, None),
        ("nonsense", None, None),
        ({"a": "nonsense", "b": {"ts": "late"}, "c": {"ts": float("nan")}}, None, None),
    ],
)
def test_when_a_scan_was_handed_out_is_kept_with_the_saved_label(
    store: StudiesDatastore, folder: Path, tmp_path: Path, noted: object, person: str | None, expected: float | None
) -> None:
    if "nonsense" not in str(noted):
        store.update_image_info("case0", {"strategy": noted})
        store = open_store(folder)  # a server that was started again since
    else:
        store._datastore.objects["case0"].image.info["strategy"] = noted
    info = {"user": person} if person else {}
    store.save_label("case0", str(write(tmp_path / "drawn.nii.gz", drawn(1))), FINAL, info)
    (event,) = store.saved.ledger.events(kinds=("saved",))
    assert event.details.get("handed_out") == expected
