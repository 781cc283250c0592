"""Scores of a folder of predicted label files against a folder of true ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from aslseg.agreement.measures import score
from aslseg.compute.bounding_box import bounding_box
from aslseg.errors import AslsegError, BadLabelError, NotEnoughCasesError
from aslseg.types import Labels, ProgressCallback, Volume, no_progress
from aslseg.volume.io import case_id, extension, read_image
from aslseg.volume.placement import AFFINE_TOLERANCE_MM

logger = logging.getLogger(__name__)

METRICS = ("dice", "jaccard", "hd95", "asd")


def evaluate_folders(
    pred: Path,
    truth: Path,
    labels: Labels,
    unit: Literal["mm", "voxel"] = "mm",
    regions: bool = False,
    report: ProgressCallback = no_progress,
) -> dict[str, Any]:
    """Score every prediction whose file name, without extension, is that of a true label.

    Args:
        pred: Folder of predicted label files.
        truth: Folder of true label files.
        labels: Names of the values 1..N.
        unit: Unit of the distances.
        regions: Score each label with everything nested in it (liver with its tumours).
        report: Called with (done, total) after each case.

    Returns:
        JSON-able: ``cases`` (id to label to dice, jaccard, hd95, asd, flags), ``summary`` (label to metric to mean,
        std and n, and how often truth and prediction were empty), ``missing`` (truth without prediction, not part of
        any mean), ``extra`` (prediction without truth), ``problems`` (id to the reason why the pair was not scored),
        ``unit``, ``regions``, ``labels``. ``std`` is the sample standard deviation (n - 1), None below two cases.

    Raises:
        NotEnoughCasesError: A folder is missing, or no prediction has a truth.
    """
    predicted, true = _files(pred), _files(truth)
    common = sorted(set(predicted) & set(true))
    if not common:
        raise NotEnoughCasesError(
            f"no file in {pred} ({len(predicted)} label files) is named like one in {truth} ({len(true)}); "
            "a prediction carries the name of its truth"
        )
    cases: dict[str, dict[str, Any]] = {}
    problems: dict[str, str] = {}
    for done, case in enumerate(common, 1):
        try:
            cases[case] = _score_pair(predicted[case], true[case], labels, unit, regions)
        except AslsegError as error:
            logger.warning("not scored: case %s: %s", case, error)
            problems[case] = str(error)
        report(done, len(common))
    return {
        "unit": unit,
        "regions": regions,
        "labels": list(labels.names),
        "cases": cases,
        "summary": {name: _summary([case[name] for case in cases.values()]) for name in labels.names},
        "missing": sorted(set(true) - set(predicted)),
        "extra": sorted(set(predicted) - set(true)),
        "problems": problems,
    }


def to_markdown(result: dict[str, Any]) -> str:
    """The summary of :func:`evaluate_folders` as a table, mean ± sample standard deviation, and the cases left out."""
    unit = "mm" if result["unit"] == "mm" else "voxels"
    lines = [
        f"| {'region' if result['regions'] else 'label'} | cases | Dice | Jaccard | HD95 ({unit}) | ASD ({unit}) |",
        "|---|---|---|---|---|---|",
    ]
    for name in result["labels"]:
        summary = result["summary"][name]
        values = [_plus_minus(summary[m], 3 if m in ("dice", "jaccard") else 2) for m in METRICS]
        lines.append(f"| {name} | {summary['dice']['n']} | {' | '.join(values)} |")
    notes = []
    for name in result["labels"]:
        empty = {k: v for k, v in result["summary"][name].items() if k.startswith("empty") and v}
        if empty:
            notes.append(f"{name}: " + ", ".join(f"{k.replace('_', ' ')} {v}×" for k, v in empty.items()))
    for key in ("missing", "extra"):
        if result[key]:
            notes.append(f"{key} predictions: {', '.join(result[key])}")
    notes += [f"not scored: {case}: {reason}" for case, reason in result["problems"].items()]
    return "\n".join(lines + ([""] + [f"- {note}" for note in notes] if notes else [])) + "\n"


def _files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise NotEnoughCasesError(f"{folder}: no such folder; give a folder of label files")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and extension(path) and found.setdefault(case_id(path), path) != path:
            logger.warning("passed over %s: %s has the same name", path, found[case_id(path)].name)
    return found


def _score_pair(pred: Path, truth: Path, labels: Labels, unit: str, regions: bool) -> dict[str, Any]:
    a, b = read_image(pred), read_image(truth)
    _require_same_grid(a, b, pred)
    for volume, path in ((a, pred), (b, truth)):
        wrong = [float(v) for v in np.unique(volume.array) if v not in range(len(labels) + 1)]
        if wrong:
            raise BadLabelError(
                f"{path}: values {wrong[:5]} are not among 0..{len(labels)} ({', '.join(labels.names)}); "
                "set `labels` to what the files hold"
            )
    box = _joint_box(a.array, b.array)
    inside = [v.array[box].astype(np.uint8) for v in (a, b)]
    masks = [labels.regions(m) if regions else [m == n + 1 for n in range(len(labels))] for m in inside]
    spacing = b.spacing if unit == "mm" else None
    return {name: score(masks[0][n], masks[1][n], spacing) for n, name in enumerate(labels.names)}


def _require_same_grid(pred: Volume, truth: Volume, path: Path) -> None:
    if pred.array.shape != truth.array.shape:
        raise BadLabelError(
            f"{path.name}: prediction of shape {pred.array.shape}, truth of shape {truth.array.shape}; "
            "resample the prediction to the truth's grid"
        )
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * [*truth.array.shape, 1]
    off = float(np.abs(corners @ (pred.affine - truth.affine).T).max())
    if off > max(AFFINE_TOLERANCE_MM, 0.1 * min(truth.spacing)):
        raise BadLabelError(
            f"{path.name}: the prediction's affine places it up to {off:.1f} mm away from the truth; "
            "write it with the geometry of the scan"
        )


def _joint_box(a: np.ndarray, b: np.ndarray) -> tuple[slice, ...]:
    """Bounding box of the foreground of both, so that distances are computed near the organ only."""
    return bounding_box((a > 0) | (b > 0)) or (slice(0, 1),) * a.ndim


def _summary(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for metric in METRICS:
        values = [s[metric] for s in scores if s[metric] is not None]
        summary[metric] = {
            "mean": float(np.mean(values)) if values else None,
            "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "n": len(values),
        }
    for flag in ("empty prediction", "empty truth", "empty in both"):
        summary[flag.replace(" ", "_")] = sum(flag in s["flags"] for s in scores)
    return summary


def _plus_minus(value: dict[str, Any], digits: int) -> str:
    if value["mean"] is None:
        return "–"
    spread = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"
