"""Label files follow the ledger, whatever happens in between; no networks here."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aslseg.cases.studies import ORIGINAL, PSEUDO, read_studies
from aslseg.errors import LedgerError
from aslseg.rounds.label_files.masks import (
    KEEP_ROUNDS,
    MaskStore,
    sync_label_files,
    verify_label_files,
)
from aslseg.rounds.label_files.rollback import roll_back
from mask_rounds import CASES, Folder

masks = st.dictionaries(st.sampled_from(CASES), st.integers(0, 2))
operations = st.one_of(
    st.tuples(st.just("round"), masks, masks, st.booleans()),
    st.tuples(st.just("human"), st.sampled_from(CASES)),
    st.tuples(st.just("rollback"), st.integers(0, 5)),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(operations, max_size=7))
def test_files_are_what_the_ledger_says_after_any_history(history: list[tuple]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Folder(Path(temporary))
        before: dict[int, dict[str, str]] = {}
        for operation in history:
            if operation[0] == "round":
                sync_label_files(folder.ledger, read_studies(folder.root), folder.paths)
                state = folder.files()
                before[folder.round(*operation[1:])] = state
            elif operation[0] == "human":
                folder.human(operation[1])
            elif operation[1] in before:
                undone = {r.number for r in folder.ledger.rounds() if r.state == "rolled back"}
                roll_back(folder.paths, operation[1])
                if operation[1] not in undone:
                    human = {p.name for p in (folder.root / "labels" / "final").glob("*")}
                    wanted = {k: v for k, v in before[operation[1]].items() if k.split("/")[1] not in human}
                    assert folder.files() == wanted
        sync_label_files(folder.ledger, read_studies(folder.root), folder.paths)
        assert verify_label_files(folder.paths) == []
        assert sync_label_files(folder.ledger, read_studies(folder.root), folder.paths) == []


def test_rollback_removes_what_a_killed_round_left_behind_the_ledger(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    first = folder.round({"a": 0}, {})
    folder.round({"a": 1}, {}, carry_out=False)
    roll_back(folder.paths, first)
    assert folder.files() == {}


def test_check_names_what_was_changed_or_lost(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.round({"a": 1}, {"a": 1, "b": 2})
    assert verify_label_files(folder.paths) == []
    (folder.root / "labels" / ORIGINAL / "b.nii.gz").unlink()
    (folder.root / "labels" / PSEUDO / "a.nii.gz").write_bytes(b"other")
    first, second = verify_label_files(folder.paths)
    assert "aslseg_pseudo/a.nii.gz: not what round 1 wrote" in first
    assert "original/b.nii.gz: missing" in second
    sync_label_files(folder.ledger, read_studies(folder.root), folder.paths)
    assert verify_label_files(folder.paths) == []


def test_somebody_elses_file_is_never_deleted(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.round({"a": 1}, {})
    path = folder.root / "labels" / PSEUDO / "a.nii.gz"
    path.write_bytes(b"drawn by hand into the wrong folder")
    folder.round({}, {})
    assert path.read_bytes() == b"drawn by hand into the wrong folder"


def test_the_same_mask_has_the_same_bytes(tmp_path: Path) -> None:
    store = MaskStore(tmp_path)
    assert store.add(np.ones((2, 3, 4)), np.eye(4)) == store.add(np.ones((2, 3, 4)), np.eye(4))
    assert len(list(store.folder.iterdir())) == 1


def test_masks_of_old_rounds_are_let_go(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for value in range(KEEP_ROUNDS + 3):
        folder.round({"a": value}, {"a": value})
        folder.store.prune(folder.ledger)
    assert len(list(folder.store.folder.iterdir())) == KEEP_ROUNDS + 1
    with pytest.raises(LedgerError, match="no longer kept"):
        roll_back(folder.paths, 3)
    roll_back(folder.paths, 4)
    assert verify_label_files(folder.paths) == []
    # before the first round there was nothing, which needs no mask
    roll_back(folder.paths, 1)
    assert folder.files() == {}
