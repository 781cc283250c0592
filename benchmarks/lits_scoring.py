"""What is scored on lits_tumour: lesions, volumes and Dice by patient, pictures, and the table of many runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import binary_erosion

from aslseg.agreement.lesions import count_lesions
from aslseg.cases.prepared_case import Prepared
from aslseg.compute.overlap import dice

DATA = Path(__file__).parents[2] / "shared" / "data" / "lits_tumour"
# labelled sets of eight patients: the suggested one, which leaves the smallest and palest lesions to be found, and two
# halves of mixed difficulty, of which each is held out while the other is learned from
ROTATIONS = (
    (33, 40, 23, 0, 4, 7, 29, 18),
    (33, 23, 7, 29, 11, 14, 35, 43),
    (40, 0, 4, 18, 5, 12, 39, 50),
)
COLUMNS = {
    "liver": "liver",
    "tumour": "tumour",
    "lesion_recall": "lesion recall",
    "false_lesions": "false lesions a scan",
    "volume_error": "volume error",
    "volume_error_ml": "volume error, ml",
    "healthy_called_ill": "healthy livers with a tumour",
}


def patients(data: Path = DATA) -> dict[str, str]:
    """Patient of each scan."""
    with (data / "patients.csv").open() as file:
        return {row["case"]: row["patient"] for row in csv.DictReader(file)}


def name_of(number: int) -> str:
    """Id of a scan."""
    return f"lits_{number:03d}"


def known_scans(rotation: int) -> list[str]:
    """Ids of a labelled set (1 to 3); fewer labels are the first of them."""
    return [name_of(n) for n in ROTATIONS[rotation - 1]]


def known_patients(rotation: int, data: Path = DATA) -> set[str]:
    """Patients of a labelled set (1 to 3), whatever part of it is learned from."""
    who = patients(data)
    return {who[name] for name in known_scans(rotation)}


def fold_patients(number: int, count: int, data: Path = DATA) -> set[str]:
    """Patients of one of ``count`` folds (1 to count); large tumours, small ones and none are dealt out evenly."""
    with (data / "patients.csv").open() as file:
        rows = list(csv.DictReader(file))
    largest: dict[str, float] = {}
    for row in rows:
        largest[row["patient"]] = max(float(row["tumour_ml"]), largest.get(row["patient"], 0))
    ordered = sorted(largest, key=lambda p: (-largest[p], p))
    return set(ordered[number - 1 :: count])


def lesion_score(found: np.ndarray, true: np.ndarray, voxel_ml: float) -> dict[str, float | int | None]:
    """Dice, lesions and volumes of tumour masks."""
    counts = count_lesions(found, true)
    return {
        "dice": dice(found, true),
        "lesions": counts.true,
        "found": counts.found,
        "false": counts.false,
        "ml": float(true.sum() * voxel_ml),
        "predicted_ml": float(found.sum() * voxel_ml),
    }


def row_of(
    case: Prepared, found: np.ndarray, truth: np.ndarray, unfiltered: np.ndarray | None = None
) -> dict[str, Any]:
    """The scores of a scan.

    Args:
        case: The scan.
        found: Class map (i, j, k): 1 liver, 2 tumour.
        truth: The true one of the same box.
        unfiltered: What ``found`` was with all components; None where none was taken away.
    """
    ml = float(np.prod(case.grid.spacing)) / 1000
    row: dict[str, Any] = {"case": case.id, "patient": case.patient}
    if unfiltered is not None:
        row["unfiltered"] = lesion_score(unfiltered == 2, truth == 2, ml)
    return row | {"liver": dice(found > 0, truth > 0), "tumour": lesion_score(found == 2, truth == 2, ml)}


def summary(rows: Sequence[dict], key: str = "tumour") -> dict[str, float | None]:
    """Means over patients (over the scans of a patient first).

    Args:
        rows: One for each scan.
        key: Which scores of the tumours: ``tumour``, or ``unfiltered``, before small components are taken away.
    """

    def mean(value_of: Callable[[dict], float | None], chosen: Iterable[dict]) -> float | None:
        values: dict[str, list[float]] = {}
        for row in chosen:
            value = value_of(row)
            if value is not None:
                values.setdefault(row["patient"], []).append(value)
        means = [float(np.mean(v)) for v in values.values()]
        return float(np.mean(means)) if means else None

    ill = [r for r in rows if r[key]["lesions"]]
    healthy = [r for r in rows if not r[key]["lesions"]]
    return {
        "liver": mean(lambda r: r["liver"], rows),
        "tumour": mean(lambda r: r[key]["dice"], ill),
        "lesion_recall": mean(lambda r: r[key]["found"] / r[key]["lesions"], ill),
        "false_lesions": mean(lambda r: r[key]["false"], rows),
        "false_lesions_healthy": mean(lambda r: r[key]["false"], healthy),
        "healthy_called_ill": mean(lambda r: float(r[key]["predicted_ml"] > 0), healthy),
        "volume_error": mean(lambda r: abs(r[key]["predicted_ml"] / r[key]["ml"] - 1), ill),
        "volume_error_ml": mean(lambda r: abs(r[key]["predicted_ml"] - r[key]["ml"]), rows),
    }


def show(rows: Sequence[dict]) -> str:
    """A line for each scan."""
    lines = []
    for r in rows:
        t = r["tumour"]
        overlap = "  -  " if t["dice"] is None else f"{t['dice']:.3f}"
        lines.append(
            f"{r['case']} liver {r['liver']:.3f} tumour {overlap} found {t['found']}/{t['lesions']} false {t['false']} "
            f"ml {t['ml']:.1f} predicted {t['predicted_ml']:.1f}"
        )
    return "\n".join(lines)


def slice_of_most(truth: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The axial slice that shows most of the true tumour, cut to the liver, of both class maps."""
    k = int((truth == 2).sum((0, 1)).argmax())
    i, j = (np.flatnonzero((truth[:, :, k] > 0).any(axis)) for axis in (1, 0))
    where = np.s_[max(i[0] - 8, 0) : i[-1] + 9, max(j[0] - 8, 0) : j[-1] + 9, k]
    return truth[where].copy(), found[where].copy()


def draw(rows: Sequence[dict], slices: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Outlines of the best, the middle and the worst scan with a tumour: liver grey, true tumour blue, found orange.

    Args:
        rows: Of the scans.
        slices: True and found class map of a slice (:func:`slice_of_most`) of each scan with a tumour.
        path: ``*.png``; no intensities of a patient are in it.
    """
    ill = sorted((r for r in rows if r["case"] in slices), key=lambda r: -r["tumour"]["dice"])
    panels = []
    for row in (ill[0], ill[(len(ill) - 1) // 2], ill[-1]) if ill else ():
        truth, found = slices[row["case"]]
        panel = np.full((480, 480, 3), 255, np.uint8)
        shown = ((truth > 0, (150, 150, 150)), (truth == 2, (30, 90, 220)), (found == 2, (240, 120, 0)))
        for mask, colour in shown:
            # the patient's right on the left, front at the top
            big = np.kron(mask.T[::-1, ::-1], np.ones((3, 3), bool))[:480, :480]
            panel[: big.shape[0], : big.shape[1]][big & ~binary_erosion(big, iterations=2)] = colour
        panels.append(panel)
    if panels:
        Image.fromarray(np.concatenate(panels, 1)).quantize(8).save(path, optimize=True)


def table(results: Sequence[dict[str, Any]], data: Path = DATA) -> str:
    """Markdown: a row for each arm, mean and standard deviation over its runs.

    A run is a rotation with a seed. The folds of full supervision are put together, and the patients that each rotation
    holds out are scored as if they were a run of it.
    """
    lines = [
        f"| arm | runs | steps | {' | '.join(COLUMNS.values())} |",
        f"|---|---|---|{'---|' * len(COLUMNS)}",
    ]
    for arm in dict.fromkeys(r["arm"] for r in results):
        runs = [r for r in results if r["arm"] == arm]
        steps = "/".join(map(str, sorted({r["steps"] for r in runs})))
        for key, name in (("tumour", arm), ("unfiltered", f"{arm}, all components")):
            if not all(key in row for r in runs for row in r["rows"]):
                continue
            summaries = [summary(rows, key) for rows in _runs(runs, data)]
            cells = [_spread([s[column] for s in summaries]) for column in COLUMNS]
            lines.append(f"| {name} | {len(summaries)} | {steps} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _runs(results: Sequence[dict[str, Any]], data: Path) -> list[list[dict]]:
    """The rows of each run of an arm."""
    runs = [r["rows"] for r in results if r["fold"] is None]
    for seed in dict.fromkeys(r["seed"] for r in results if r["fold"] is not None):
        rows = [row for r in results if r["fold"] is not None and r["seed"] == seed for row in r["rows"]]
        for rotation in range(1, len(ROTATIONS) + 1):
            known = known_patients(rotation, data)
            runs.append([row for row in rows if row["patient"] not in known])
    return runs


def _spread(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    mean = f"{np.mean(known):.3f}"
    return f"{mean} ± {np.std(known, ddof=1):.3f}" if len(known) > 1 else mean


def read_results(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Contents of result.json files, or of lists of them, in the order given."""
    found: list[dict[str, Any]] = []
    for path in paths:
        content = json.loads(path.read_text())
        found += content if isinstance(content, list) else [content]
    return found
