"""Rounds that train nothing and only promote and show masks, on a studies folder whose scans are never opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aslseg.cases.studies import ORIGINAL, PSEUDO, read_studies
from aslseg.files import sha256
from aslseg.rounds.label_files.masks import MaskStore, plan_label_changes, sync_label_files
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.ledger.reports import write_report
from aslseg.settings import Paths, Settings
from aslseg.volume.io import write_label

CASES = ("a", "b", "c")
COMMON = {"agreement": {}, "threshold": {}, "models": {}}


class Folder:
    """A studies folder whose scans are never opened, and rounds that only write masks."""

    def __init__(self, root: Path) -> None:
        self.root = root / "studies"
        self.root.mkdir(exist_ok=True)
        for case in CASES:
            (self.root / f"{case}.nii.gz").write_bytes(b"scan")
        self.paths = Paths(Settings(model_dir=str(root / "models")), self.root)
        self.ledger = Ledger(self.paths.ledger)
        self.store = MaskStore(self.paths.home)

    def round(self, promoted: dict[str, int], shown: dict[str, int], carry_out: bool = True) -> int:
        """A round that promotes and shows masks full of a value."""
        number, _ = self.ledger.open_round({})
        for tag, wanted in ((PSEUDO, promoted), (ORIGINAL, shown)):
            details = {
                c: COMMON | {"sha256": self.store.add(np.full((2, 2, 2), v), np.eye(4))} for c, v in wanted.items()
            }
            self.ledger.append(plan_label_changes(self.ledger, read_studies(self.root), tag, number, details))
        if carry_out:
            sync_label_files(self.ledger, read_studies(self.root), self.paths)
        self.ledger.close_round(number, write_report(self.paths, self.ledger, {"round": number}))
        return number

    def human(self, case: str) -> None:
        write_label(self.root / "labels" / "final" / f"{case}.nii.gz", np.ones((2, 2, 2)), np.eye(4))

    def files(self) -> dict[str, str]:
        human = {p.name for p in (self.root / "labels" / "final").glob("*")}
        found = sorted(p for p in (self.root / "labels").rglob("*.nii.gz") if p.name[0] != ".")
        return {f"{p.parent.name}/{p.name}": sha256(p) for p in found if p.name not in human}
