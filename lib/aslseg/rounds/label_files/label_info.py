"""Labels of people whose file is another one than MONAI Label's ``datastore_v2.json`` says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aslseg.cases.studies import ORIGINAL, PSEUDO
from aslseg.files import sha256
from aslseg.rounds.ledger.ledger import Ledger


def label_info_problems(root: Path, ledger: Ledger) -> list[str]:
    """Files that somebody copied over a label that was saved through the server.

    A label that the ledger knows as saved is right: the server, or its next start, brings the JSON up to date.

    Args:
        root: The studies folder.
        ledger: Of this folder.
    """
    saved = {(e.case, e.tag): e.details["sha256"] for e in ledger.events(kinds=("saved",))}
    return [
        f"{path}: another file than its info in datastore_v2.json says; somebody copied it"
        for case, tag, path, info in human_label_infos(root)
        if info.get("sha256") and sha256(path) not in (info["sha256"], saved.get((case, tag)))
    ]


def human_label_infos(root: Path) -> Iterator[tuple[str, str, Path, dict[str, Any]]]:
    """Case, tag, file and info of the labels that people saved, as far as the JSON can be read."""
    try:
        objects = dict(json.loads((root / "datastore_v2.json").read_text())["objects"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # the next start of the server recovers it, and says so
    for case, entry in sorted(objects.items()):
        labels = entry.get("labels", {}) if isinstance(entry, dict) else {}
        for tag, label in sorted(labels.items()):
            path = root / "labels" / tag / f"{case}{label.get('ext', '')}"
            if tag not in (ORIGINAL, PSEUDO) and path.is_file():
                yield case, tag, path, dict(label.get("info", {}))
