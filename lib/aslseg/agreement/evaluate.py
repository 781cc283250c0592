"""Scores of a folder of predicted label files against a folder of true ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from aslseg.agreement.lesions import LesionCounts, count_lesions
from aslseg.agreement.measures import DISTANCES, score
from aslseg.compute.bounding_box import bounding_box
from aslseg.errors import AslsegError, NotEnoughCasesError
from aslseg.types import Labels, ProgressCallback, no_progress
from aslseg.volume.io import case_id, extension, read_header, read_label

logger = logging.getLogger(__name__)

TITLES = {
    **{"dice": "Dice", "jaccard": "Jaccard", "sensitivity": "sensitivity", "specificity": "specificity"},
    **{"hd": "HD", "hd95": "HD95", "hd95_max": "HD95 max", "asd": "ASD", "assd": "ASSD"},
}
METRICS = tuple(TITLES)


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
        JSON-able: ``cases`` (id to label to what :func:`aslseg.agreement.measures.score` gives, and ``lesions``),
        ``summary`` (label to metric to mean, std and n, how often truth and prediction were empty, and the lesions of
        all cases), ``missing`` (truth without prediction, not part of any mean), ``extra`` (prediction without
        truth), ``problems`` (id to the reason why the pair was not scored), ``unit``, ``regions``, ``labels``. ``std``
        is the sample standard deviation (n - 1), None below two cases.

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
    """The summary of :func:`evaluate_folders` as tables, mean ± sample standard deviation, and what was left out.

    Lesions are counted over all scans; see :mod:`aslseg.agreement.lesions`.
    """
    unit = "mm" if result["unit"] == "mm" else "voxels"
    kind = "region" if result["regions"] else "label"
    titles = [TITLES[m] + (f" ({unit})" if m in DISTANCES else "") for m in METRICS]
    lines = [f"| {kind} | cases | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    lesions = [f"| {kind} | true | found | recall | predicted | F1 | false a scan |", "|---" * 7 + "|"]
    for name in result["labels"]:
        summary = result["summary"][name]
        values = [plus_minus(summary[m], 2 if m in DISTANCES else 3) for m in METRICS]
        lines.append(f"| {name} | {summary['dice']['n']} | {' | '.join(values)} |")
        found = summary["lesions"]
        rates = [_number(found[k]) for k in ("recall", "f1", "false_per_scan")]
        cells = [name, found["true"], found["found"], rates[0], found["predicted"], *rates[1:]]
        lesions.append(f"| {' | '.join(map(str, cells))} |")
    notes = _notes(result)
    heading = "Lesions (components in the 26-neighbourhood; one shared voxel counts as found):"
    tables = [*lines, "", heading, "", *lesions]
    return "\n".join(tables + ([""] + [f"- {note}" for note in notes] if notes else [])) + "\n"


def _notes(result: dict[str, Any]) -> list[str]:
    """What was empty, missing or not scored."""
    notes = []
    for name in result["labels"]:
        empty = {k: v for k, v in result["summary"][name].items() if k.startswith("empty") and v}
        if empty:
            notes.append(f"{name}: " + ", ".join(f"{k.replace('_', ' ')} {v}×" for k, v in empty.items()))
    for key in ("missing", "extra"):
        if result[key]:
            notes.append(f"{key} predictions: {', '.join(result[key])}")
    return notes + [f"not scored: {case}: {reason}" for case, reason in result["problems"].items()]


def _files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise NotEnoughCasesError(f"{folder}: no such folder; give a folder of label files")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and extension(path) and found.setdefault(case_id(path), path) != path:
            logger.warning("passed over %s: %s has the same name", path, found[case_id(path)].name)
    return found


def _score_pair(pred: Path, truth: Path, labels: Labels, unit: str, regions: bool) -> dict[str, Any]:
    grid = read_header(truth)
    maps = [read_label(path, grid, labels) for path in (pred, truth)]
    box = _joint_box(*maps)
    inside = [m[box] for m in maps]
    masks = [labels.regions(m) if regions else [m == n + 1 for n in range(len(labels))] for m in inside]
    spacing = grid.spacing if unit == "mm" else None
    scores = {}
    for n, name in enumerate(labels.names):
        pair = masks[0][n], masks[1][n]
        scores[name] = score(*pair, spacing, maps[1].size) | {"lesions": asdict(count_lesions(*pair))}
    return scores


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
    counted = [s["lesions"] for s in scores]
    total = LesionCounts(**{f.name: sum(c[f.name] for c in counted) for f in fields(LesionCounts)})
    summary["lesions"] = {
        **asdict(total),
        "recall": total.recall,
        "f1": total.f1,
        "false_per_scan": total.false / len(counted) if counted else None,
    }
    return summary


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def plus_minus(value: dict[str, Any], digits: int) -> str:
    """Mean ± sample standard deviation of an entry of the summary, or a dash without values."""
    if value["mean"] is None:
        return "–"
    spread = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"
