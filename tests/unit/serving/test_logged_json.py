"""The datastore's JSON is written behind: what is answered is on disk before, and costs the same with many scans."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from monailabel.datastore.local import ImageLabelModel
from test_studies_datastore import drawn, open_store, write

from aslseg.cases.studies import FINAL, ORIGINAL
from aslseg.files import write_json
from aslseg.serving import listing
from aslseg.serving.change_log import Change, ChangeLog, DataModel
from aslseg.serving.studies_datastore import StudiesDatastore
from aslseg.serving.write_behind import WriteBehind
from own_thread import for_this_thread


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "studies"
    first = write(root / "case0.nii.gz")
    for n in range(1, 4):
        os.link(first, root / f"case{n}.nii.gz")
    return root


def settled(store: StudiesDatastore) -> StudiesDatastore:
    """A store that has nothing left to write or to look at."""
    store.flush()
    while store._stale():
        store.status()
    return store


KILLED = """
import os, sys
from pathlib import Path
from unittest import mock
from test_studies_datastore import drawn, open_store, write
from aslseg.serving.write_behind import WriteBehind
folder = Path(sys.argv[1])
store = open_store(folder)
store.flush()
with mock.patch.object(WriteBehind, "request"):
    store.update_image_info("case1", {"note": "seen"})
    store.save_label("case2", str(write(folder.parent / "l.nii.gz", drawn(1))), "final", {"user": "ann"})
    store.update_label_info("case2", "final", {"grade": 3})
    os._exit(9)
"""


def test_what_was_answered_survives_a_kill_before_the_json_is_written(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=Path(__file__).parent, timeout=300)
    assert done.returncode == 9
    assert "seen" not in (folder / "datastore_v2.json").read_text()
    again = open_store(folder)
    assert again.get_image_info("case1")["note"] == "seen"
    info = again.get_label_info("case2", FINAL)
    assert (info["user"], info["grade"]) == ("ann", 3)
    again.flush()
    assert json.loads((folder / "datastore_v2.json").read_text())["objects"]["case1"]["image"]["info"]["note"] == "seen"


def test_a_request_lists_no_folder_and_writes_no_json(folder: Path, tmp_path: Path) -> None:
    """Whatever the number of scans: the work of a request does not grow with it."""
    store, upload = settled(open_store(folder)), write(tmp_path / "l.nii.gz", drawn(1))
    calls: Counter[str] = Counter()

    def counted(name: str, function):
        def call(*args, **kwargs):
            calls[name] += threading.current_thread() is threading.main_thread()
            return function(*args, **kwargs)

        return call

    with (
        mock.patch.object(os, "listdir", counted("listdir", os.listdir)),
        mock.patch.object(store, "json_text", counted("json_text", store.json_text)),
        mock.patch.object(store, "_placed", counted("placed", store._placed)),
    ):
        store.status()
        store.get_unlabeled_images()
        store.update_image_info("case1", {"note": "seen"})
        assert not calls["listdir"] + calls["json_text"] + calls["placed"]
        store.save_label("case1", str(upload), FINAL, {})
        assert store.get_labeled_images() == ["case1"]
        assert not calls["json_text"]
        assert calls["placed"] < 4, "only what has changed"


def test_the_list_of_all_entries_is_ready_after_a_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(folder).flush()
    store = settled(open_store(folder))
    made: list[ImageLabelModel] = []
    dump = ImageLabelModel.model_dump
    noting = for_this_thread(lambda entry: made.append(entry) or dump(entry), dump)
    monkeypatch.setattr(ImageLabelModel, "model_dump", noting)
    store.prepare_text()
    assert len(made) == 4
    text = store.json_text()
    assert len(made) == 4, "nothing is made while somebody waits"
    assert json.loads(text)["objects"].keys() == {f"case{n}" for n in range(4)}
    with mock.patch.object(WriteBehind, "request"):
        store.update_image_info("case1", {"note": "new"})
    assert '"note": "new"' in store.json_text()
    assert len(made) == 5


def test_texts_of_deleted_scans_are_not_kept(folder: Path) -> None:
    store = settled(open_store(folder))
    store.prepare_text()
    assert "case1" in store._texts
    store.remove_image("case1")
    store.flush()
    assert store._texts.keys() == {"case0", "case2", "case3"}


def test_two_processes_apply_each_others_changes_without_reading_the_json(folder: Path) -> None:
    one, two = settled(open_store(folder)), settled(open_store(folder))
    with mock.patch("aslseg.serving.shared_json.parse", side_effect=AssertionError("the JSON was read")):
        one.update_image_info("case1", {"from": "one"})
        one.flush()
        two.update_image_info("case1", {"also": "two"})
        two.flush()
        for store in (one, two):
            info = store.get_image_info("case1")
            assert (info["from"], info["also"]) == ("one", "two")


def test_json_of_another_program_is_read_and_keeps_our_later_changes(folder: Path) -> None:
    store = settled(open_store(folder))
    with mock.patch.object(WriteBehind, "request"):
        store.update_image_info("case1", {"ours": 1})
        path = folder / "datastore_v2.json"
        content = json.loads(path.read_text())
        content["objects"]["case2"]["image"]["info"]["theirs"] = 2
        path.write_text(json.dumps(content))
        assert store.get_image_info("case2")["theirs"] == 2
        assert store.get_image_info("case1")["ours"] == 1


def test_a_process_that_slept_while_others_wrote_much(folder: Path) -> None:
    sleeper, busy = settled(open_store(folder)), settled(open_store(folder))
    with mock.patch("aslseg.serving.change_log.KEPT", 3):
        for n in range(12):
            busy.update_image_info(f"case{n % 4}", {f"n{n}": n})
        busy.flush()
    found = {k for n in range(4) for k in sleeper.get_image_info(f"case{n}")}
    assert {f"n{n}" for n in range(12)} <= found


def test_a_damaged_log_is_kept_and_begun_anew(folder: Path) -> None:
    store = open_store(folder)
    store.update_image_info("case1", {"note": "seen"})
    store.flush()
    store._log.close()
    path = folder / ".aslseg" / "datastore.sqlite"
    path.write_bytes(b"no database" * 100)
    again = open_store(folder)
    assert again.get_image_info("case1")["note"] == "seen"
    again.update_image_info("case1", {"more": 1})
    assert list(path.parent.glob("datastore.sqlite.damaged-*"))


def test_nothing_is_written_behind_once_the_log_is_closed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(folder)
    with mock.patch("aslseg.serving.write_behind.FIRST_SECONDS", 0.05):
        store.update_image_info("case1", {"note": "seen"})
        store._log.close()
        end = time.monotonic() + 20
        while store._behind._running and time.monotonic() < end:
            time.sleep(0.02)
    assert not store._behind._running
    assert "not written" not in caplog.text


def test_the_log_says_when_changes_are_no_longer_kept(tmp_path: Path) -> None:
    log = ChangeLog(tmp_path / "log.sqlite")
    for n in range(5):
        log.append([Change("a", "", DataModel(info={"n": n}))])
    with mock.patch("aslseg.serving.change_log.KEPT", 2):
        log.set_written(None, 5)
    assert [c.entry.info["n"] for c in log.after(3) or [] if c.entry] == [3, 4]
    assert log.after(5) == []
    assert log.after(1) is None
    assert len(log.kept()) == 2


def test_sidecars_that_change_are_read_and_no_others(folder: Path) -> None:
    for n in range(3):
        write(folder / "labels" / ORIGINAL / f"case{n}.nii.gz", drawn(1))
        write_json(folder / ".aslseg" / "original" / f"case{n}.json", {"params": {"round": 1}})
    store = settled(open_store(folder))
    with mock.patch.object(store, "_read_sidecar", wraps=store._read_sidecar) as read:
        write_json(folder / ".aslseg" / "original" / "case1.json", {"params": {"round": 2}})
        assert store.get_label_info("case1", ORIGINAL)["params"]["round"] == 2
        assert [c.args for c in read.call_args_list] == [("case1",)]


def test_files_that_come_go_and_change_their_kind(folder: Path) -> None:
    scans = listing.ScanListing(folder)
    assert scans.changed() == {f"case{n}" for n in range(4)}
    (folder / "case1.nrrd").write_bytes(b"only its name counts here")
    assert scans.changed() == set(), "the first name counts"
    (folder / "case1.nii.gz").unlink()
    assert scans.changed() == {"case1"}
    assert scans.scan("case1") == "case1.nrrd"
    write(folder / "new_seg.nii.gz")
    assert scans.changed() == {"new_seg"}
    assert scans.scan("new_seg") == "new_seg.nii.gz", "without a scan of that name it is one"
    write(folder / "new.nii.gz")
    assert scans.changed() == {"new", "new_seg"}
    assert scans.scan("new_seg") is None
    (folder / "new.nii.gz").unlink()
    assert scans.changed() == {"new", "new_seg"}
    assert scans.scan("new_seg") == "new_seg.nii.gz"


def test_a_link_to_a_disk_that_is_mounted_later(folder: Path, tmp_path: Path) -> None:
    (folder / "far.nii.gz").symlink_to(tmp_path / "disk" / "far.nii.gz")
    scans = listing.ScanListing(folder)
    scans.changed()
    assert scans.scan("far") is None
    write(tmp_path / "disk" / "far.nii.gz")
    assert "far" in scans.changed()


def test_a_name_that_json_cannot_hold(folder: Path) -> None:
    os.link(os.fsencode(folder / "case0.nii.gz"), os.fsencode(folder) + b"/M\xfcller.nii.gz")
    store = open_store(folder)
    store.flush()
    assert store.list_images() == [f"case{n}" for n in range(4)]


def test_requests_share_a_writing_and_a_failed_one_is_repeated(caplog: pytest.LogCaptureFixture) -> None:
    written, fail = threading.Semaphore(0), [True]

    def write_it() -> None:
        if fail.pop() if fail else False:
            raise OSError("no space left")
        written.release()

    with mock.patch("aslseg.serving.write_behind.RETRY_SECONDS", 0.01):
        behind = WriteBehind(write_it, lambda: True)
        for _ in range(100):
            behind.request()
        assert written.acquire(timeout=60)
    assert "no space left" in caplog.text
    behind.flush()
    behind.request()
    behind.flush()
    assert written.acquire(timeout=60)


def test_who_has_a_label_is_counted_again_after_another_program_wrote_the_json(folder: Path) -> None:
    store = open_store(folder)
    store.save_label("case1", str(write(folder.parent / "l.nii.gz", drawn(1))), FINAL, {})
    assert settled(store).status()["completed"] == 1
    config = folder / "datastore_v2.json"
    content = json.loads(config.read_text())
    content["objects"]["case1"]["labels"] = {}
    (folder / "labels" / FINAL / "case1.nii.gz").unlink()
    write_json(config, content)
    assert store.status()["completed"] == 0
    assert store.get_unlabeled_images() == ["case0", "case1", "case2", "case3"]
