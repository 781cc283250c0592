"""What ``aslseg doctor`` finds out about a studies folder, its ledger and models, or about a PACS."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from aslseg.cases.studies import FINAL, Studies, read_studies
from aslseg.commands.doctor import Finding
from aslseg.errors import AslsegError, BadImageError, BadLabelError, BadSettingsError
from aslseg.rounds.scheduling.lock import owner
from aslseg.settings import Paths, Settings
from aslseg.types import Volume
from aslseg.volume.io import read_header, read_image, read_label

PACS_SECONDS = 10.0
LOCK_SECONDS = 1.0


def scans(root: Path, settings: Settings, read_all: bool) -> Iterator[Finding]:
    """Files that are passed over, patients.csv, scans that cannot be read, labels that do not fit their scans.

    Args:
        root: Studies folder.
        settings: Labels and limits.
        read_all: Read all voxels; else only headers.
    """
    try:
        studies = read_studies(root)
    except BadSettingsError as error:
        yield Finding("error", "patients.csv", str(error), "Rounds refuse to run until the table is corrected.")
        return
    except AslsegError as error:
        yield Finding("error", "studies", str(error), "README.md shows how a studies folder looks.")
        return
    for problem in studies.problems:
        yield Finding("warning", "studies", problem, "It is passed over until then.")
    for case in studies.images:
        yield from _scan(studies, case, settings, read_all)


def _scan(studies: Studies, case: str, settings: Settings, read_all: bool) -> Iterator[Finding]:
    path, label = studies.images[case], studies.final.get(case)
    try:
        image: Volume = read_image(path, settings.max_voxels) if read_all else read_header(path)
    except BadImageError as error:
        yield Finding("error", "scan", str(error), "Export or copy it again; until then it is left out.")
        return
    for note in image.notes:
        yield Finding("warning", "scan", f"{path.name}: {note}", "docs/troubleshooting.md says what that means.")
    if label is None:
        return
    try:
        read_label(label, image, settings.label_set, settings.max_voxels, say=lambda _: None)
    except BadLabelError as error:
        text = f"labels/{FINAL}: {error}"
        yield Finding("error", "label", text, "Draw or export it again on this scan; until then the case is left out.")


def kept_files(root: Path, paths: Paths) -> Iterator[Finding]:
    """Files that wait for somebody to look at them."""
    parked = sorted(p for p in (paths.home / "parked").glob("*") if p.suffix != ".json")
    if parked:
        text = f"{len(parked)} uploaded labels were refused and lie in {paths.home / 'parked'}, as {parked[0].name}"
        yield Finding("warning", "parked", text, "The JSON file beside each says why; save it again, or delete both.")
    for damaged in [*root.glob("*.damaged-*"), *paths.home.glob("*.damaged-*")]:
        text = f"{damaged.name} was damaged and has been replaced"
        yield Finding("warning", "datastore", text, "Check the disk; delete the file if nothing is missing.")


def state(root: Path, paths: Paths) -> Iterator[Finding]:
    """The ledger, with the files and infos that it knows, and who holds the locks."""
    from aslseg.rounds.label_files.masks import verify_label_files
    from aslseg.serving.lock_holder import describe_holder

    try:
        for problem in verify_label_files(paths):
            yield Finding("error", "ledger", problem, "`aslseg ledger verify --repair` mends what can be mended.")
    except AslsegError as error:
        yield Finding("error", "ledger", str(error), "Restore .aslseg from a backup (docs/operations.md).")
    who = owner(paths.home)
    process = f"process {who.get('pid')} on {who.get('host')} since {who.get('since')}" if who else "nobody"
    if _locked(paths.home / "round.lock", 0):
        text = f"a round is running ({process})"
        yield Finding("warning", "round", text, "Nothing is wrong if you or the server started it; else stop it.")
    elif who:
        text = f"a round was killed ({process})"
        yield Finding("warning", "round", text, "The next round continues it: `aslseg round --studies DIR`.")
    if _locked(root / ".lock", LOCK_SECONDS):
        text = f"the datastore is locked by {describe_holder(root / '.lock')}"
        yield Finding("error", "lock", text, "Labels cannot be saved meanwhile; let that process end, or stop it.")


def _locked(lock: Path, seconds: float) -> bool:
    """Whether somebody holds a lock for longer."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=seconds):
            return False
    except Timeout:
        return True


def models(paths: Paths, settings: Settings) -> Iterator[Finding]:
    """Published models that are damaged or do not load with these settings."""
    from aslseg.models.kinds import PUBLISHED_KINDS
    from aslseg.models.published import find_published, manifest

    remedy = "Run `aslseg round` to train it again, or `aslseg ledger rollback` to serve the one before."
    for kind in PUBLISHED_KINDS:
        entry = find_published(paths, kind, check=True)
        if entry is None:
            if kind in manifest(paths):
                yield Finding("error", "model", f"the published {kind} is missing or damaged", remedy)
            continue
        reason = why_not_loaded(kind, entry.path, settings)
        if reason:
            yield Finding("error", "model", f"the published {kind} does not load: {reason}", remedy)


def why_not_loaded(kind: str, path: Path, settings: Settings) -> str:
    """Why a model file does not load with these settings; empty where it does."""
    from aslseg.models.kinds import ModelKind
    from aslseg.models.loaded import load_model

    try:
        load_model(ModelKind(kind), path, settings)
    except AslsegError as error:
        return str(error)
    return ""


def pacs(address: str) -> Iterator[Finding]:
    """Whether a DICOMweb address answers."""
    import requests

    user, password = (os.environ.get(f"MONAI_LABEL_DICOMWEB_{n}") for n in ("USERNAME", "PASSWORD"))
    try:
        reply = requests.get(
            f"{address.rstrip('/')}/studies",
            {"limit": "1"},
            headers={"Accept": "application/dicom+json"},
            auth=(user, password) if user and password else None,
            timeout=PACS_SECONDS,
        )
    except requests.RequestException as error:
        text = f"{address} does not answer ({type(error).__name__})"
        yield Finding("error", "pacs", text, "Is it online, and the address right? docs/dicom.md has an example.")
        return
    if reply.status_code in (401, 403):
        text = f"{address} refuses the login ({reply.status_code})"
        remedy = "Set MONAI_LABEL_DICOMWEB_USERNAME and MONAI_LABEL_DICOMWEB_PASSWORD."
        yield Finding("error", "pacs", text, remedy)
    elif not reply.ok:
        text = f"{address}/studies answers {reply.status_code}"
        yield Finding("error", "pacs", text, "Give the DICOMweb root, for Orthanc http://HOST:8042/dicom-web.")
