"""What the small SAM draws on real scans after a box, 1, 3 and 5 clicks: random, as it ships, fine-tuned on 4 scans.

An object is the largest 2-D component of a region (atrium, liver with its tumours, tumour) on an axial slice, of at
least 100 pixels; 8 slices a scan, spread evenly over those that hold one. Everything is asked as the app's click model
``sam`` asks it (:class:`aslseg.sam.clicks.session.ClickSession`, without automatic mask) on the scan's own voxels. The
box is the object's tight box, as a client sends it: no margin is added. The clicks come without a box: the first
one lies deepest in the object, each further one deepest in the largest connected error of the last answer, inside the
object a foreground click, outside it a background click. Fine-tuning sees the cases as a round prepares them.

    python benchmarks/bench_sam.py --organ atrium --threads 1 --out work/bench/sam_atrium
    python benchmarks/bench_sam.py --organ lits --sam FILE --mode decoder --steps 300 --out work/bench/sam_lits

``atrium`` fine-tunes on the first 4 scans of la/train.txt and measures on the last 16. ``lits`` fine-tunes on scans 0
and 1 (one patient), 4 and 5, and measures on 6 to 10 (one other patient) and the CT series of ct_dicom, which has a
liver only.

Writes results.json (with every slice), table.md, finetuned.safetensors and pictures.png into --out. The pictures show
voxels of the scans, whose licences do not let them be shared: never commit them.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from scipy import ndimage

from aslseg.adaptation.faults import Faults
from aslseg.cases.prepare import PreparedStore, working_spacing
from aslseg.cases.studies import Case
from aslseg.compute.overlap import dice
from aslseg.errors import AslsegError, NotEnoughCasesError
from aslseg.files import sha256, write_json
from aslseg.prompts.from_client import ClientPrompt
from aslseg.prompts.from_mask import EIGHT_NEIGHBOURS
from aslseg.sam.clicks.session import ClickSession
from aslseg.sam.modeling import build
from aslseg.sam.modeling.architecture import build as random_sam
from aslseg.sam.modeling.build import SAMModel
from aslseg.sam.predictor.slice_predictor import SlicePredictor
from aslseg.sam.training import finetune
from aslseg.serving.open_scans import OpenScan, ScanCache
from aslseg.settings import Settings, load_settings
from aslseg.volume.io import read_image, read_label
from bench_la import choose, files

logger = logging.getLogger("bench_sam")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CONF = {
    "atrium": {"labels": "atrium", "modality": "mr", "spacing": "native"},
    "lits": {"labels": "liver,tumour", "modality": "ct"},
}
TRAINED, HELD_OUT_ATRIA = 4, 16
# scans of lits/: those of one patient are held out, those without a label left out
TRAINED_LIVERS, HELD_OUT_LIVERS = (0, 1, 4, 5), (6, 7, 8, 9, 10)
LEAST_PIXELS = 100
COLUMNS = ("box", "1", "3", "5")  # numbers are clicks
PICTURES = 6  # slices in pictures.png


@dataclass
class Asked:
    """An object on a slice and what SAM answered.

    Attributes:
        scan, patient, structure: Whose it is.
        k: Slice of the picture (RAS-closest axes).
        pixels: The slice (i, j) in 0..1.
        truth: The object (i, j), bool.
        answers: (i, j) bool for the box and for each number of clicks.
        clicks: (i, j, 1 inside or 0 outside), in order.
    """

    scan: str
    patient: str
    structure: str
    k: int
    pixels: np.ndarray
    truth: np.ndarray
    answers: dict[str, np.ndarray] = field(default_factory=dict)
    clicks: list[tuple[int, int, int]] = field(default_factory=list)

    def scores(self) -> dict[str, Any]:
        """One line of results.json: Dice for each column, and what was asked."""
        told = {"scan": self.scan, "patient": self.patient, "structure": self.structure, "k": self.k}
        return (
            told
            | {"pixels": int(self.truth.sum()), "clicks": self.clicks}
            | {c: dice(self.answers[c], self.truth) for c in COLUMNS}
        )


def cases(organ: str, data: Path, names: Path | None, folder: Path) -> tuple[list[Case], list[Case]]:
    """The scans to fine-tune on and those to measure on.

    Args:
        organ: A key of :data:`CONF`.
        data: Holds la, or lits and ct_dicom.
        names: Names of the atria, one a line; None: la/train.txt.
        folder: Where the CT series is put as a NIfTI file.

    Raises:
        NotEnoughCasesError: Scans or labels are not there.
    """
    root = data / ("la" if organ == "atrium" else organ)
    if not root.is_dir():
        raise NotEnoughCasesError(f"{root}: no such folder; give --data, the folder that holds it")
    images, labels = files(root / "images"), files(root / "labels")
    if organ == "atrium":
        listed = (names or root / "train.txt").read_text().split()
        train, _, held = choose(listed, TRAINED, HELD_OUT_ATRIA)
        patients = {n: n for n in listed}
    else:
        train, held = ([f"lits_{n:02d}" for n in numbers] for numbers in (TRAINED_LIVERS, HELD_OUT_LIVERS))
        same = {"lits_01": "lits_00"} | dict.fromkeys(held, held[0])
        patients = {n: same.get(n, n) for n in (*train, *held)}
    absent = [n for n in (*train, *held) if n not in images or n not in labels]
    if absent:
        raise NotEnoughCasesError(f"{root}: no scan or no label of {', '.join(absent[:3])}; give another --data")
    chosen = [Case(n, images[n], patients[n], "train", labels[n]) for n in (*train, *held)]
    series = data / "ct_dicom"
    if organ == "lits" and series.is_dir():
        import SimpleITK as sitk  # noqa: N813 - the library's own abbreviation

        volume = folder / "ct_dicom.nii.gz"
        names_of_slices = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(series / "series"))
        sitk.WriteImage(sitk.ReadImage(names_of_slices), str(volume))
        chosen.append(Case("ct_dicom", volume, "ct_dicom", "train", series / "liver.nii.gz"))
    return chosen[: len(train)], chosen[len(train) :]


def objects(scan: Case, opened: OpenScan, settings: Settings, slices: int) -> list[Asked]:
    """The objects of a scan to be drawn, ``slices`` for each region that has so many."""
    labels, found = settings.label_set, []
    label = opened.orientation.view(read_label(Path(str(scan.label)), read_image(scan.image), labels))
    for structure, region in zip(labels.names, labels.regions(label), strict=True):
        largest = {k: largest_part(region[..., k]) for k in np.flatnonzero(region.sum((0, 1)) >= LEAST_PIXELS).tolist()}
        paths = [k for k, part in largest.items() if part.sum() >= LEAST_PIXELS]
        spread = np.linspace(0, len(paths) - 1, min(slices, len(paths))).round().astype(int)
        found += [
            Asked(scan.id, scan.patient, structure, k, opened.source.slice(k), largest[k])
            for k in (paths[n] for n in spread)
        ]
    return found


def largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest 8-connected component of a mask (i, j), bool; nothing of nothing."""
    components, count = ndimage.label(mask, EIGHT_NEIGHBOURS)
    return components == 1 + np.bincount(components.ravel())[1:].argmax() if count else np.zeros(mask.shape, bool)


def next_click(truth: np.ndarray, answer: np.ndarray) -> tuple[int, int, int] | None:
    """Where the annotator clicks: (i, j, 1 inside or 0 outside), deepest in the largest error; None without errors.

    Args:
        truth: The object (i, j), bool.
        answer: What was drawn, (i, j) bool.
    """
    missed, wrong = largest_part(truth & ~answer), largest_part(answer & ~truth)
    error = missed if missed.sum() >= wrong.sum() else wrong
    if not error.any():
        return None
    depth = ndimage.distance_transform_edt(np.pad(error, 1))[1:-1, 1:-1]
    i, j = np.unravel_index(int(depth.argmax()), error.shape)
    return int(i), int(j), int(truth[i, j])


def ask(clicks: ClickSession, one: Asked) -> None:
    """Draw an object with its box and with up to five clicks; answers and clicks are put into ``one``."""
    k, nothing = one.k, np.zeros((0, 3), np.int64)
    one.answers["box"] = _drawn(clicks, ClientPrompt(nothing, nothing, (*extent(one.truth), (k, k)), k))
    prompt, answer = ClientPrompt(nothing, nothing, slice=k), np.zeros_like(one.truth)
    for number in range(1, 1 + max(int(c) for c in COLUMNS if c != "box")):
        click = next_click(one.truth, answer)
        if click is not None:
            one.clicks.append(click)
            name = "foreground" if click[2] else "background"
            voxels = np.concatenate([getattr(prompt, name), [[*click[:2], k]]])
            prompt = replace(prompt, **{name: voxels})
            answer = _drawn(clicks, prompt)
        one.answers[str(number)] = answer


def extent(mask: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last row i, first and last column j, of a mask (i, j) that holds something."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (int(rows[0]), int(rows[-1])), (int(columns[0]), int(columns[-1]))


def _drawn(clicks: ClickSession, prompt: ClientPrompt) -> np.ndarray:
    found = clicks.on_slice(prompt)
    return found[1] if found else np.zeros(clicks.predictor.shape, bool)


def measure(model: SAMModel, scans: Sequence[Case], settings: Settings, slices: int) -> list[Asked]:
    """Ask a SAM for the objects of all scans; every slice is encoded once."""
    pictures, asked = ScanCache(settings), []
    for scan in scans:
        opened = pictures.open(scan.image)
        clicks = ClickSession(SlicePredictor(model, opened.source, settings))
        for one in objects(scan, opened, settings, slices):
            ask(clicks, one)
            asked.append(one)
    if not asked:
        raise NotEnoughCasesError(f"no slice of {len(scans)} scans holds an object of {LEAST_PIXELS} pixels")
    return asked


def models(arguments: argparse.Namespace, train: Sequence[Case], cache: Path) -> Iterator[tuple[str, SAMModel, dict]]:
    """Name, SAM and what fine-tuning says about itself, for each row of the table.

    Args:
        arguments: ``settings``, ``out``.
        train: Scans to fine-tune on.
        cache: Where they are prepared.
    """
    settings: Settings = arguments.settings
    init = build.base_path(settings)
    base = build.load(init, settings)
    torch.manual_seed(settings.seed)
    yield "random", SAMModel(random_sam(base.architecture), base.architecture, device=base.device), {}
    yield "small SAM, not fine-tuned" if not settings.sam_checkpoint else f"{init.name}, not fine-tuned", base, {}
    store = PreparedStore(cache, settings, working_spacing((read_image(c.image) for c in train), settings))
    prepared = [store.load(c) for c in train]
    out = arguments.out / "finetuned.safetensors"
    trained = finetune.train(
        prepared,
        settings,
        out,
        init=init,
        errors=Faults(settings.label_set),
        report=_log,
    )
    name = f"fine-tuned on {len(train)} scans ({settings.sam_train}, {settings.sam_iterations} steps)"
    yield name, build.load(out, settings), trained


def summarise(asked: Sequence[Asked]) -> dict[str, dict[str, Any]]:
    """By structure: numbers of slices, scans and patients; by column mean and SD over slices, mean over scans."""
    found: dict[str, dict[str, Any]] = {}
    for structure in dict.fromkeys(a.structure for a in asked):
        some = [a.scores() for a in asked if a.structure == structure]
        scans = list(dict.fromkeys(s["scan"] for s in some))
        row: dict[str, Any] = {"slices": len(some), "scans": len(scans), "patients": len({s["patient"] for s in some})}
        for column in COLUMNS:
            values = [s[column] for s in some]
            means = [np.mean([s[column] for s in some if s["scan"] == scan]) for scan in scans]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            row[column] = {"mean": float(np.mean(values)), "std": spread, "mean_of_scans": float(np.mean(means))}
        found[structure] = row
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown: Dice, mean ± SD over slices, and the mean over scans in brackets."""
    lines = ["| object | SAM | box | 1 click | 3 clicks | 5 clicks | slices | scans (patients) |", "|---" * 8 + "|"]
    for structure in rows[0]["summary"]:
        for row in rows:
            s = row["summary"][structure]
            cells = " | ".join(
                f"{c['mean']:.3f} ± {c['std'] or 0:.3f} ({c['mean_of_scans']:.3f})" for c in (s[n] for n in COLUMNS)
            )
            lines.append(f"| {structure} | {row['model']} | {cells} | {s['slices']} | {s['scans']} ({s['patients']}) |")
    return "\n".join(lines) + "\n"


def draw(asked: Sequence[Asked], path: Path) -> None:
    """A few slices, evenly chosen, a row each: truth red, answer green, box and clicks yellow, clicks outside blue."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chosen = [asked[n] for n in np.linspace(0, len(asked) - 1, min(PICTURES, len(asked))).round().astype(int)]
    size = (3 * len(COLUMNS), 3 * len(chosen))
    figure, axes = plt.subplots(len(chosen), len(COLUMNS), figsize=size, squeeze=False)
    for one, line in zip(chosen, axes, strict=True):
        for column, axis in zip(COLUMNS, line, strict=True):
            axis.imshow(one.pixels.T, cmap="gray", vmin=0, vmax=1, origin="lower")
            for mask, colour in ((one.truth, "red"), (one.answers[column], "lime")):
                if mask.any() and not mask.all():
                    axis.contour(mask.T, [0.5], colors=colour, linewidths=1)
            if column == "box":
                (i0, i1), (j0, j1) = extent(one.truth)
                edge = ((i0 - 0.5, j0 - 0.5), i1 - i0 + 1, j1 - j0 + 1)
                axis.add_patch(plt.Rectangle(*edge, fill=False, color="yellow", linewidth=0.7))
            else:
                for i, j, inside in one.clicks[: int(column)]:
                    axis.plot(i, j, "+", color="yellow" if inside else "deepskyblue", markersize=7)
            axis.set_title(f"{one.scan[:8]} {one.structure} k={one.k} {column}: {one.scores()[column]:.3f}", fontsize=7)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    plt.close(figure)


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all rows and write everything into ``--out``."""
    settings: Settings = arguments.settings
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        train, held = cases(arguments.organ, arguments.data, arguments.list, Path(scratch))
        for name, model, trained in models(arguments, train, Path(scratch)):
            began = time.monotonic()
            asked = measure(model, held, settings, arguments.slices)
            logger.info("%s: %d objects in %.0f s", name, len(asked), time.monotonic() - began)
            rows.append(
                {
                    "model": name,
                    "training": trained,
                    "summary": summarise(asked),
                    "slices": [a.scores() for a in asked],
                }
            )
        draw(asked, arguments.out / "pictures.png")
    result = {
        "organ": arguments.organ,
        "sam_sha256": sha256(build.base_path(settings)),
        "conf": arguments.settings_given,
        "fine_tuned_on": [c.id for c in train],
        "measured_on": {c.id: c.patient for c in held},
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    write_json(arguments.out / "results.json", result)
    (arguments.out / "table.md").write_text(table(rows))
    return result


def _log(done: int, total: int, **shown: Any) -> None:
    if done % 50 == 0 or done == total:
        logger.info("step %d/%d %s", done, total, " ".join(f"{k} {v:.4f}" for k, v in shown.items()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organ", choices=list(CONF), required=True)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with la, lits and ct_dicom")
    parser.add_argument("--list", type=Path, help="atria in order, one name a line, instead of la/train.txt")
    parser.add_argument("--sam", type=Path, help="SAM to measure and to start from; default: the small SAM that ships")
    parser.add_argument("--mode", help="sam_train; the setting's default if not given")
    parser.add_argument("--steps", type=int, help="sam_iterations; the setting's default if not given")
    parser.add_argument("--slices", type=int, default=8, help="of each scan and structure")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--conf", action="append", default=[], metavar="KEY=VALUE", help="settings over the defaults")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def main() -> int:
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    given = {"sam_checkpoint": arguments.sam, "sam_train": arguments.mode, "sam_iterations": arguments.steps}
    try:
        arguments.settings_given = (
            CONF[arguments.organ]
            | {"seed": str(arguments.seed)}
            | {k: str(v) for k, v in given.items() if v is not None}
            | dict(pair.split("=", 1) for pair in arguments.conf)
        )
        arguments.settings = load_settings(arguments.settings_given, env={})[0]
        arguments.out.mkdir(parents=True, exist_ok=True)
        result = bench(arguments)
    except (AslsegError, OSError) as error:
        logger.error("%s", error)
        return 1
    sys.stdout.write(table(result["rows"]) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
