"""What one, three and five clicks on a tumour, a liver or an atrium give, as shipped: the small SAM, nothing trained.

Requests go through the app as 3D Slicer's clicks do, so that the same script measures any version of it. The annotator
clicks into the middle of the largest error: on a slice (model ``sam_2d``) into its deepest pixel, in the volume
(``sam``) into the deepest pixel of the slice on which the error is largest. What is drawn:

* on slices: the largest component of a label on ``--slices`` slices of each scan, spread over those on which it has at
  least 20 pixels, or its largest slice if it has no such slice;
* with ``--volumes``: the largest component of a label in each scan;
* with ``--pause SECONDS``: the same, as an annotator sees it who waits so long between clicks and never presses Update.

The mean is over patients: first over the objects of a patient, then over patients.

    python benchmarks/bench_first_click.py --organ lits --part chosen --out work/first_click
    python benchmarks/bench_first_click.py --organ lits --part reported --volumes --parent --out work/first_click
    python benchmarks/bench_first_click.py --organ atrium --out work/atria
    python benchmarks/bench_first_click.py --organ phantom --label liver --pause 2 --out work/phantoms

What first clicks do on tumours was chosen on the patients of ``--part chosen``, eight scans; ``reported`` are the other
patients. ``--parent`` stores the true liver as the automatic mask of each scan, as a good SSL model would give it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from aslseg.compute.overlap import dice
from aslseg.files import write_json
from aslseg.types import Labels
from aslseg.volume.io import write_image
from aslseg.volume.phantom import make_phantom
from bench_sam import largest_part, next_click

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
CONF = {
    "first_round": "false",
    "device": "cpu",
    "embedding_disk_gb": "0",
    "prefetch_slices": "0",
    "min_free_gb": "0",
}
CHOSEN = (33, 40, 23, 0, 4, 7, 29, 18)  # of lits_tumour; other scans of their patients are left out
LEAST_PIXELS = 20
CLICKS = (1, 3, 5)
ATRIA = 16  # the last of the list
PHANTOMS, PHANTOM_SHAPE = 4, (128, 128, 64)


@dataclass
class Scan:
    """A scan on disk, its patient and the regions (i, j, k), bool, that are clicked on, by label."""

    case: str
    patient: str
    image: Path
    label: Path
    regions: dict[str, np.ndarray] = field(default_factory=dict)


def scans(arguments: argparse.Namespace, scratch: Path) -> Iterator[Scan]:
    """The scans of an organ that are measured on, with their regions; phantoms are written to ``scratch``."""
    if arguments.organ == "phantom":
        yield from phantoms(scratch)
        return
    folder = arguments.data / ("la" if arguments.organ == "atrium" else "lits_tumour")
    for case, patient in chosen(arguments, folder):
        one = Scan(case, patient, folder / "images" / f"{case}.nii.gz", folder / "labels" / f"{case}.nii.gz")
        label = np.asarray(nib.load(one.label).dataobj)
        names = ("atrium",) if arguments.organ == "atrium" else ("liver", "tumour")
        regions = Labels.parse(",".join(names), "tumour:liver" if "tumour" in names else "").regions(label)
        one.regions = {n: r for n, r in zip(names, regions, strict=True) if r.any()}
        yield one


def phantoms(folder: Path) -> Iterator[Scan]:
    """Phantoms with their livers and tumours."""
    for n in range(PHANTOMS):
        volume, classes = make_phantom(77, n, shape=PHANTOM_SHAPE)
        path = folder / f"phantom_{n}.nii.gz"
        write_image(path, volume)
        yield Scan(
            path.name.partition(".")[0], f"phantom {n}", path, path, {"liver": classes > 0, "tumour": classes == 2}
        )


def chosen(arguments: argparse.Namespace, folder: Path) -> list[tuple[str, str]]:
    """Case and patient of the scans that are measured on."""
    if arguments.organ == "atrium":
        return [(name, name) for name in (folder / "train.txt").read_text().split()[-ATRIA:]]
    with (folder / "patients.csv").open() as file:
        rows = [(row["case"], row["patient"]) for row in csv.DictReader(file)]
    names = {f"lits_{n:03d}" for n in CHOSEN}
    known = {patient for case, patient in rows if case in names}
    if arguments.part == "chosen":
        return [row for row in rows if row[0] in names]
    return [row for row in rows if row[1] not in known]


def objects(region: np.ndarray, count: int) -> list[tuple[int, np.ndarray]]:
    """Slice and the largest component there (i, j), bool, on ``count`` slices spread over those that show enough."""
    areas = region.sum((0, 1))
    parts = {k: largest_part(region[..., k]) for k in np.flatnonzero(areas).tolist()}
    sizes = {k: int(part.sum()) for k, part in parts.items()}
    enough = [k for k, size in sizes.items() if size >= min(LEAST_PIXELS, max(sizes.values()))]
    spread = np.linspace(0, len(enough) - 1, min(count, len(enough))).round().astype(int)
    return [(enough[n], parts[enough[n]]) for n in spread]


def next_in_volume(truth: np.ndarray, answer: np.ndarray) -> tuple[list[int], int] | None:
    """Voxel and kind (1 inside, 0 outside) of the next click in a volume (i, j, k), None without errors."""
    errors = np.array([[largest_part(e[..., k]).sum() for k in range(e.shape[2])] for e in _errors(truth, answer)])
    if not errors.any():
        return None
    k = int(errors.max(0).argmax())
    i, j, inside = next_click(truth[..., k], answer[..., k]) or (0, 0, 0)
    return [i, j, k], inside


def _errors(truth: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return truth & ~answer, answer & ~truth


class Annotator:
    """Clicks on one object after the other.

    Args:
        app: The app, in this process.
        pause: Seconds between clicks, with replies as they come; None: without pauses, each reply is the whole object.
    """

    def __init__(self, app: Any, pause: float | None) -> None:
        self.app, self.pause, self.asked = app, pause, 0
        self.seconds: list[float] = []

    def draw(self, model: str, case: str, label: str, truth: np.ndarray, k: int | None) -> list[dict[str, Any]]:
        """Score and notes after each click.

        Args:
            model: ``sam_2d`` or ``sam``.
            case: Id of the scan.
            label: What is clicked.
            truth: The object: (i, j) on slice k, or (i, j, k) where k is None.
            k: The slice.
        """
        self.asked += 1
        clicks: dict[str, list[list[int]]] = {"foreground": [], "background": []}
        answer, found = np.zeros_like(truth), []
        for _ in range(max(CLICKS)):
            if k is None:
                following = next_in_volume(truth, answer)
            else:
                one = next_click(truth, answer)
                following = None if one is None else ([*one[:2], k], one[2])
            if following is not None:
                clicks["foreground" if following[1] else "background"].append(following[0])
                mask, notes = self.ask(model, case, label, clicks, k)
                answer = mask if k is None else mask[..., k]
                found.append({"dice": dice(answer, truth), "voxels": int(answer.sum()), "notes": notes})
            else:
                found.append(found[-1])
        return found

    def ask(
        self, model: str, case: str, label: str, clicks: dict[str, list[list[int]]], k: int | None
    ) -> tuple[np.ndarray, list[str]]:
        """Mask (i, j, k), bool, and notes of one reply."""
        params = {**clicks, "label": label, "result_extension": ".nii", "result_compress": False}
        params |= {"whole": self.pause is None} if k is None else {"slice": k}
        time.sleep(self.pause or 0)
        began = time.perf_counter()
        reply = self.app.infer({**params, "model": model, "image": case, "client": f"annotator {self.asked}"})
        self.seconds.append(time.perf_counter() - began)
        path = Path(reply["file"])
        mask = np.asarray(nib.load(path).dataobj) > 0
        path.unlink()
        return mask, reply["params"].get("notes", [])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw every object of every scan; results by label, as rows."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        studies = Path(scratch) / "studies"
        measured = list(scans(arguments, Path(scratch)))
        prepare(studies, measured, arguments)
        conf = dict(CONF, threads=str(arguments.threads), model_dir=f"{scratch}/models")
        conf |= {"labels": "atrium", "modality": "mr"} if arguments.organ == "atrium" else {"labels": "liver,tumour"}
        conf |= dict(pair.split("=", 1) for pair in arguments.conf)
        annotator = Annotator(app(studies, conf), arguments.pause)
        for scan in measured:
            for label, region in scan.regions.items():
                if arguments.label in ("", label):
                    rows += list(rows_of(annotator, scan, label, region, arguments))
        seconds = annotator.seconds
    return {
        "conf": conf,
        "rows": rows,
        "seconds": {"median": float(np.median(seconds)), "longest": max(seconds), "sum": float(sum(seconds))},
        "threads": torch.get_num_threads(),
    }


def app(studies: Path, conf: dict[str, str]) -> Any:
    """The app as MONAI Label builds it, in this process."""
    folder = ROOT / "apps" / "aslseg"
    return runpy.run_path(str(folder / "main.py"))["Aslseg"](str(folder), str(studies), conf)


def rows_of(
    annotator: Annotator, scan: Scan, label: str, region: np.ndarray, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One row for each object of a label in a scan."""
    told = {"case": scan.case, "patient": scan.patient, "label": label}
    if arguments.volumes or arguments.pause is not None:
        components, _ = ndimage.label(region, np.ones((3, 3, 3)))
        truth = components == 1 + np.bincount(components.ravel())[1:].argmax()
        drawn = annotator.draw("sam", scan.case, label, truth, None)
        yield {**told, "k": None, "size": int(truth.sum()), "clicks": drawn}
        return
    for k, part in objects(region, arguments.slices):
        drawn = annotator.draw("sam_2d", scan.case, label, part, k)
        yield {**told, "k": k, "size": int(part.sum()), "clicks": drawn}


def prepare(studies: Path, measured: list[Scan], arguments: argparse.Namespace) -> None:
    """A studies folder with links to the scans, and with ``--parent`` the true liver as automatic mask."""
    automatic = studies / "labels" / "original"
    automatic.mkdir(parents=True)
    for scan in measured:
        (studies / scan.image.name).symlink_to(scan.image)
        if arguments.parent:
            liver = nib.Nifti1Image(scan.regions["liver"].astype(np.uint8), nib.load(scan.image).affine)
            nib.save(liver, automatic / scan.image.name)


def summary(rows: list[dict[str, Any]], counts: Sequence[int]) -> dict[str, dict[str, Any]]:
    """By label: number of objects and patients, the mean Dice over patients by number of clicks, and by patient."""
    found: dict[str, dict[str, Any]] = {}
    for label in dict.fromkeys(row["label"] for row in rows):
        some = [row for row in rows if row["label"] == label]
        patients: dict[str, list[float]] = {}
        for patient in dict.fromkeys(row["patient"] for row in some):
            own = [row["clicks"] for row in some if row["patient"] == patient]
            patients[patient] = [float(np.mean([one[n - 1]["dice"] for one in own])) for n in counts]
        means = np.mean(list(patients.values()), 0).tolist()
        found[label] = {"objects": len(some), "patients": len(patients), "dice": means, "by_patient": patients}
    return found


def table(found: dict[str, dict[str, Any]], counts: Sequence[int]) -> str:
    """The means as Markdown, and a line a patient."""
    head = " | ".join(f"{n} click{'s' * (n > 1)}" for n in counts)
    lines = [f"| object | {head} | objects (patients) |", "|---" * (len(counts) + 2) + "|"]
    for label, one in found.items():
        cells = " | ".join(f"{value:.3f}" for value in one["dice"])
        lines.append(f"| {label} | {cells} | {one['objects']} ({one['patients']}) |")
    for label, one in found.items():
        parts = [f"{patient} " + "/".join(f"{v:.2f}" for v in values) for patient, values in one["by_patient"].items()]
        lines.append(f"{label}: {', '.join(parts)}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organ", choices=("lits", "atrium", "phantom"), default="lits")
    parser.add_argument("--part", choices=("chosen", "reported"), default="chosen")
    parser.add_argument("--label", default="", help="only this label")
    parser.add_argument("--slices", type=int, default=6, help="of each scan and label")
    parser.add_argument("--volumes", action="store_true", help="whole objects instead of slices")
    parser.add_argument("--pause", type=float, help="seconds between clicks; replies as they come")
    parser.add_argument("--parent", action="store_true", help="the true liver is stored as automatic mask")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--conf", action="append", default=[], metavar="KEY=VALUE", help="settings over the defaults")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    result = measure(arguments)
    counts = CLICKS if arguments.pause is None else (1, 2, 3, 4)
    result["summary"] = summary(result["rows"], counts)
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts = [arguments.organ, arguments.part, "volumes" if arguments.volumes else "slices"]
    parts += ["paused"] * (arguments.pause is not None)
    name = "_".join(parts + ["parent"] * arguments.parent)
    write_json(arguments.out / f"{name}.json", result)
    sys.stdout.write(f"{json.dumps(result['seconds'])}\n{table(result['summary'], counts)}")


if __name__ == "__main__":
    main()
