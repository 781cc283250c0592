"""Published models: files named by their hash, and one manifest, replaced atomically, that says which are served."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aslseg.files import atomic_file, sha256, write_json
from aslseg.models.gate_rules import (
    FEWEST_LABELS,
    Cause,
    least_gain,
    least_since_first,
    shown_better,
    shown_not_below,
    shown_worse,
)
from aslseg.models.kinds import PUBLISHED_KINDS, ModelKind
from aslseg.resources import app_dir
from aslseg.settings import Paths, Settings

logger = logging.getLogger(__name__)

NOT_LISTED = ("trained_on", "labelled", "labels", "settings")
"""What ``aslseg info`` leaves out of a model."""


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        kind: What it is.
        path: Its file.
        sha256: Hash of the file.
        date: UTC, ISO 8601.
        validation_dice: Mean over labels on the human validation cases when it was published; None without any.
        validation_cases: Number of these cases.
        round: Round that trained it; None for a single training.
        trained_on: Ids of the cases it was trained on.
        labelled: Those of them that had a human label; None if it was published by a version that did not note them.
        labels: Hash of each of these labels; None if that was not noted.
        settings: Hash of the settings of its training; None if that was not noted.
    """

    kind: ModelKind
    path: Path
    sha256: str
    date: str
    validation_dice: float | None
    validation_cases: int
    round: int | None
    trained_on: tuple[str, ...] = ()
    labelled: tuple[str, ...] | None = None
    labels: Mapping[str, str] | None = None
    settings: str | None = None


def manifest(paths: Paths) -> dict[str, dict[str, Any]]:
    """Kind to its entry in the manifest; empty if nothing is published or the manifest cannot be read."""
    return _read_manifest(paths.models / "manifest.json")


def _read_manifest(file: Path) -> dict[str, dict[str, Any]]:
    try:
        return dict(json.loads(file.read_text())["models"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read (%s); nothing counts as published", file, error)
        return {}


def put_manifest(paths: Paths, models: dict[str, dict[str, Any]]) -> None:
    """Replace the manifest; from then on these models are served, wherever the studies folder is moved."""
    paths.remember_models()
    write_json(paths.models / "manifest.json", {"models": models})


def find_published(
    paths: Paths, kind: ModelKind, check: bool = False, entries: Mapping[str, dict[str, Any]] | None = None
) -> Published | None:
    """The published model of a kind, or None.

    Args:
        paths: Where the models are published.
        kind: One of :data:`aslseg.models.kinds.PUBLISHED_KINDS`.
        check: Recompute the file's hash instead of comparing its size alone.
        entries: A manifest of an earlier time; None reads the present one.
    """
    entry = (manifest(paths) if entries is None else entries).get(kind)
    if entry is None:
        return None
    path = paths.models / str(entry["file"])
    if not path.is_file() or path.stat().st_size != entry["bytes"] or (check and sha256(path) != entry["sha256"]):
        logger.warning("%s is missing or damaged; run `aslseg round` to train it again", path)
        return None
    labels = entry.get("labels")
    labelled = entry.get("labelled") if labels is None else labels
    return Published(
        kind,
        path,
        entry["sha256"],
        entry["date"],
        entry["validation_dice"],
        entry["validation_cases"],
        entry["round"],
        tuple(entry.get("trained_on", ())),
        None if labelled is None else tuple(labelled),
        labels,
        entry.get("settings"),
    )


@dataclass(frozen=True)
class Candidate:
    """A model that may be published, and how it compares with the published one.

    Attributes:
        kind, path: The model.
        dice, published_dice: Mean Dice of both on the same validation cases; None without cases that neither has
            learned from.
        cases: Number of these cases.
        trained_on: Ids of the cases it was trained on.
        labels: Those of them that have a human label, with the label's hash.
        settings: Hash of the settings of its training.
        cause: What has changed since the published model.
        differences: Dice of this model minus Dice of the published one by case, on human labels that neither has
            learned: on validation cases, and as cross-fitting estimates it on others.
        first: The same beside the model that was published first with the human labels and settings of the published
            one; empty where that is the published one.
        tries: How many candidates with these labels and settings were compared since then, this one included.
    """

    kind: ModelKind
    path: Path
    dice: float | None
    published_dice: float | None
    cases: int
    trained_on: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    settings: str = ""
    cause: Cause = Cause.SETTINGS
    differences: Mapping[str, float] = field(default_factory=dict)
    first: Mapping[str, float] = field(default_factory=dict)
    tries: int = 1


def gate(candidate: Candidate, current: Published | None, tolerance: float, first: bool = True) -> tuple[bool, str]:
    """Whether a candidate is published, and the reason in words.

    What is asked depends on what has changed (:mod:`aslseg.models.gate_rules`). Where no label is left that the
    published model has not learned, a candidate is published only if it learned from new human labels and no fewer.

    Args:
        candidate: The new model.
        current: The published one of its kind that it can be compared with.
        tolerance: By how much the mean validation Dice may be lower where only settings have changed.
        first: Without ``current``, whether none was published; False: the published one does not load.
    """
    c = candidate
    if current is None:
        why = "the first one" if first else "as the one before it does not load"
        return True, f"{c.kind}: published, {why}" + (f" (Dice {c.dice:.4f})" if c.dice is not None else "")
    if current.sha256 == sha256(c.path):
        return True, f"{c.kind}: unchanged"
    if c.cause == Cause.SETTINGS and c.dice is not None and c.published_dice is not None:
        return _with_other_settings(c, tolerance)
    if c.cause == Cause.SETTINGS or not c.differences:
        return _without_judge(c, current)
    return _with_other_masks(c) if c.cause == Cause.MASKS else _with_other_labels(c)


def _with_other_settings(candidate: Candidate, tolerance: float) -> tuple[bool, str]:
    """The gate where people changed settings: no lower mean on the validation cases."""
    c, before = candidate, candidate.published_dice
    numbers = f"Dice {c.dice:.4f}, published {before:.4f} on {c.cases} validation cases"
    if c.dice is not None and before is not None and c.dice >= before - tolerance:
        return True, f"{c.kind}: published ({numbers})"
    return False, f"{c.kind}: not published ({numbers}, gate_tolerance {tolerance})"


def _with_other_masks(candidate: Candidate) -> tuple[bool, str]:
    """The gate where people changed nothing: better, or not at all."""
    kind, found = candidate.kind, list(candidate.differences.values())
    if len(found) < FEWEST_LABELS:
        return False, (
            f"{kind}: not published; no human label is new, and {len(found)} to compare on is too few to show that "
            f"this model is better ({FEWEST_LABELS} are needed). Label a scan of another patient"
        )
    numbers = f"{_mean(found)}; {least_gain(len(found)):.4f} is asked"
    if not shown_better(found):
        return (
            False,
            f"{kind}: not published; no human label is new, and this model is not shown to be better ({numbers})",
        )
    since = list(candidate.first.values()) or found
    if not shown_not_below(since, candidate.tries):
        return False, (
            f"{kind}: not published; no human label is new, and this model may be worse than the first one with these "
            f"labels ({_mean(since)}; {least_since_first(since, candidate.tries):.4f} is asked of candidate "
            f"{candidate.tries})"
        )
    return True, f"{kind}: published; no human label is new, and this model is better ({numbers})"


def _with_other_labels(candidate: Candidate) -> tuple[bool, str]:
    """The gate where people changed human labels: published unless shown worse."""
    kind, found = candidate.kind, list(candidate.differences.values())
    if shown_worse(found):
        return (
            False,
            f"{kind}: not published; human labels are new, but this model is shown to be worse ({_mean(found)})",
        )
    return True, f"{kind}: published; human labels are new, and this model is not shown to be worse ({_mean(found)})"


def _mean(differences: list[float]) -> str:
    mean, count = sum(differences) / len(differences), len(differences)
    return f"mean difference of Dice {mean:+.4f} on {count} human label{'s' if count > 1 else ''}"


def _without_judge(candidate: Candidate, current: Published) -> tuple[bool, str]:
    """The gate where nobody can say which model is better."""
    known = current.trained_on if current.labelled is None else current.labelled
    new = len(set(candidate.labels) - set(known))
    # of models of the first version only the cases are known, promoted ones among them
    fewer = current.labelled is not None and len(candidate.labels) < len(known)
    if new and not fewer:
        return True, (
            f"{candidate.kind}: published unchecked; no validation case is left that the published model has not "
            f"learned from, but this one learned from {new} new human label{'s' if new > 1 else ''} and no fewer. "
            "Label a scan of another patient"
        )
    return False, (
        f"{candidate.kind}: not published; without validation cases that it has not learned from, a published model is "
        "replaced only when there are more human labels. Label a scan of another patient"
    )


def stage_files(paths: Paths, chosen: list[Candidate], number: int | None) -> dict[str, dict[str, Any]]:
    """Copy the candidates' files to names made of their hashes; the manifest stays as it is.

    Returns:
        The manifest that serves them, for :func:`put_manifest`.
    """
    models = manifest(paths)
    for candidate in chosen:
        digest = sha256(candidate.path)
        target = paths.models / f"{candidate.kind}-{digest[:12]}.safetensors"
        if not target.exists() or sha256(target) != digest:
            with atomic_file(target) as temporary:
                shutil.copyfile(candidate.path, temporary)
        if models.get(candidate.kind, {}).get("sha256") == digest:
            continue
        models[candidate.kind] = {
            "file": target.name,
            "bytes": target.stat().st_size,
            "sha256": digest,
            "date": datetime.now(UTC).isoformat("T", "seconds"),
            "validation_dice": candidate.dice,
            "validation_cases": candidate.cases,
            "round": number,
            "trained_on": list(candidate.trained_on),
            "labels": dict(candidate.labels),
            "settings": candidate.settings,
        }
    return models


def prune(paths: Paths, keep: int, needed: Collection[str] = ()) -> None:
    """Delete model files that nothing needs.

    Args:
        paths: Where the models are published.
        keep: So many of each kind stay, the newest.
        needed: Names of files that stay beside these, as do those that are served.
    """
    kept = {m["file"] for m in manifest(paths).values()} | set(needed)
    for kind in PUBLISHED_KINDS:
        files = sorted(paths.models.glob(f"{kind}-*.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True)
        for path in files[keep:]:
            if path.name not in kept:
                path.unlink(missing_ok=True)


def left_behind(paths: Paths, served: dict[str, dict[str, Any]]) -> str | None:
    """What to do where nothing is published, but another models' folder serves what this ledger published last.

    So it is where a studies folder was moved that an earlier version used, or where it was copied.

    Args:
        paths: The studies folder.
        served: The manifest that the ledger recorded last.
    """
    if not served or manifest(paths):
        return None
    for file in sorted(paths.models.parent.glob("*/manifest.json")):
        if _read_manifest(file) == served:
            return (
                f"no models are published for this studies folder, but {file.parent} holds those that its ledger "
                f"published last: it was moved or copied. If it was moved, rename that folder to {paths.models.name}"
            )
    return None


def list_published(settings: Settings, studies: Path | None = None) -> list[dict[str, Any]]:
    """All published models, or those of one studies folder, as plain values for ``aslseg info``."""
    if studies or settings.model_dir:
        folders = [Paths(settings, studies or settings.model_dir).models]
    else:
        folders = sorted(p.parent for p in (app_dir() / "model").glob("*/manifest.json"))
    found = []
    for folder in folders:
        paths = Paths(settings, folder)
        paths.models = folder
        for kind in PUBLISHED_KINDS:
            model = find_published(paths, kind)
            if model:
                shown = {k: v for k, v in asdict(model).items() if k not in NOT_LISTED}
                found.append(shown | {"path": str(model.path), "cases": len(model.trained_on)})
    return found
