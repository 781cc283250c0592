"""What the two experiments on real scans share: rounds, scores of every stage, tables and pictures.

Truth is read here only, after a round has ended; the rounds see the studies folder alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import nibabel as nib
import numpy as np
import torch
from scipy import stats

from aslseg.agreement.evaluate import METRICS, evaluate_folders, plus_minus
from aslseg.agreement.measures import compare
from aslseg.compute.overlap import dice
from aslseg.files import write_json
from aslseg.models.cascade import Cascade
from aslseg.models.kinds import ModelKind
from aslseg.rounds.run import run_round
from aslseg.settings import Settings, load_settings
from aslseg.types import Labels
from aslseg.volume.io import case_id, extension, read_image, read_label, write_label

logger = logging.getLogger("realdata")
STAGES = ("ssl", "sam", "adapter", "canvas", "retrained")


@dataclass(frozen=True)
class Experiment:
    """A named run: where its ``studies``, ``heldout`` and ``truth`` folders lie, and its settings."""

    name: str
    title: str
    out: Path
    conf: dict[str, str]
    rounds: int

    @property
    def settings(self) -> Settings:
        """Settings from ``conf`` alone, so that the result does not depend on the shell; models stay under ``out``."""
        return load_settings({**self.conf, "model_dir": str(self.out / "models")}, env={})[0]


def run_experiment(experiment: Experiment) -> dict[str, Any]:
    """Rounds, scores, ``result.json``, ``table.md`` and pictures under ``experiment.out``."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    settings = experiment.settings
    torch.set_num_threads(settings.threads or os.cpu_count() or 1)
    started, rounds = time.monotonic(), []
    for number in range(1, experiment.rounds + 1):
        began = time.monotonic()
        summary = run_round(experiment.out / "studies", settings, report=_log)
        row = {
            "round": number,
            "seconds": summary["seconds"],
            "round_seconds": time.monotonic() - began,
            "promoted": summary["promoted"],
            "source": summary["source"],
            "validation": summary["validation"],
            "published": summary["published"],
        }
        row |= _score_round(experiment, settings, summary, number)
        rounds.append(row)
        result = {
            "experiment": experiment.title,
            "settings": experiment.conf,
            "threads": torch.get_num_threads(),
            "total_seconds": time.monotonic() - started,
            "rounds": rounds,
        }
        write_json(experiment.out / "result.json", result)
        (experiment.out / "table.md").write_text(table(result, list(settings.label_set.names)))
    pictures(experiment, settings, rounds[-1])
    return result


def _log(done: int, total: int, **shown: Any) -> None:
    if done == total or done % 200 == 0:
        logger.info("%s/%s %s", done, total, shown)


def scans(folder: Path) -> dict[str, Path]:
    """Image files of a folder by case id."""
    return {case_id(p): p for p in sorted(folder.iterdir()) if extension(p)}


def _score_round(experiment: Experiment, settings: Settings, summary: dict[str, Any], number: int) -> dict[str, Any]:
    """Masks of every stage for the held-out and the unlabelled scans, against the truth."""
    labels = settings.label_set
    files = {stage: Path(path) for stage, path in summary["models"].items()}
    retrained = Cascade.load({ModelKind.SSL: files.pop("retrained")}, settings)
    cascade = Cascade.load({ModelKind(stage): path for stage, path in files.items()}, settings)
    unlabelled = {c: p for c, p in scans(experiment.out / "studies").items() if c in summary["agreement"]}
    truth = experiment.out / "truth"
    cases = []
    for group, chosen in (("heldout", scans(experiment.out / "heldout")), ("unlabelled", unlabelled)):
        for case, path in chosen.items():
            image = read_image(path)
            masks = {kind.value: mask for kind, mask in cascade.masks(image).items()}
            masks["retrained"] = retrained.masks(image)[ModelKind.SSL]
            for stage, mask in masks.items():
                write_label(experiment.out / f"round{number}" / group / stage / f"{case}.nii.gz", mask, image.affine)
            if not (truth / f"{case}.nii.gz").exists():
                continue
            true = labels.regions(read_label(truth / f"{case}.nii.gz", image, labels))
            scores = {
                stage: [dice(p, t) for p, t in zip(labels.regions(mask), true, strict=True)]
                for stage, mask in masks.items()
            }
            agreement = compare(masks["ssl"], masks["canvas" if "canvas" in masks else "adapter"], labels).mean
            cases.append({"case": case, "group": group, "agreement": agreement, "dice": scores})
    scored = {
        stage: evaluate_folders(
            experiment.out / f"round{number}" / "heldout" / stage, truth, labels, unit="voxel", regions=True
        )["summary"]
        for stage in STAGES
        if stage in summary["models"]
    }
    return {"heldout": scored, "cases": cases, "selection": _selection(cases, summary)}


def _selection(cases: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    """Is agreement worth following? True Dice of the promoted masks against all, and correlations."""
    free = [c for c in cases if c["group"] == "unlabelled"]
    stage = summary["source"] if summary["source"] in ("ssl", "adapter", "canvas") else "adapter"

    def mean(chosen: Iterable[dict[str, Any]]) -> float | None:
        values = [d for c in chosen for d in c["dice"][stage] if d is not None]
        return float(np.mean(values)) if values else None

    def correlation(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        pairs = [(c["agreement"], mean([c])) for c in chosen]
        x, y = np.array([p for p in pairs if None not in p], float).reshape(-1, 2).T
        if len(x) < 3 or x.std() == 0 or y.std() == 0:
            return {"n": len(x), "pearson": None, "spearman": None}
        return {
            "n": len(x),
            "pearson": float(stats.pearsonr(x, y)[0]),
            "spearman": float(stats.spearmanr(x, y)[0]),
        }

    promoted = [c for c in free if c["case"] in summary["promoted"]]
    return {
        "stage": stage,
        "promoted": len(summary["promoted"]),
        "promoted_with_truth": len(promoted),
        "unlabelled": len(summary["agreement"]),
        "dice_promoted": mean(promoted),
        "dice_all": mean(free),
        "correlation_unlabelled": correlation(free),
        "correlation_all": correlation(cases),
    }


def table(result: dict[str, Any], names: list[str]) -> str:
    """The experiment as Markdown."""
    lines = [f"### {result['experiment']}", ""]
    lines += [
        "| round | stage | label | Dice | Jaccard | HD95 (voxel) | ASD (voxel) | cases |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rounds"]:
        for stage, summary in row["heldout"].items():
            for name in names:
                s = summary[name]
                cells = " | ".join(plus_minus(s[m], 3 if m in ("dice", "jaccard") else 2) for m in METRICS)
                lines.append(f"| {row['round']} | {stage} | {name} | {cells} | {s['dice']['n']} |")
    lines += [
        "",
        "| round | promoted | Dice of promoted | Dice of all | r(agreement, Dice) | r with held-out |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for row in result["rounds"]:
        s = row["selection"]
        r = [s[k] for k in ("correlation_unlabelled", "correlation_all")]
        lines.append(
            f"| {row['round']} | {s['promoted']} of {s['unlabelled']} | {_number(s['dice_promoted'])} "
            f"(n={s['promoted_with_truth']}) | {_number(s['dice_all'])} | "
            + " | ".join(f"{_number(c['pearson'])} (n={c['n']})" for c in r)
            + " |"
        )
    lines += ["", "| round | " + " | ".join(result["rounds"][0]["seconds"]) + " | round |"]
    lines += ["|---" * (len(result["rounds"][0]["seconds"]) + 2) + "|"]
    for row in result["rounds"]:
        seconds = " | ".join(f"{s:.0f} s" for s in row["seconds"].values())
        lines.append(f"| {row['round']} | {seconds} | {row['round_seconds']:.0f} s |")
    lines += ["", f"{result['total_seconds'] / 60:.0f} minutes in all, {result['threads']} thread(s)."]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def arguments_of(doc: str | None, data_set: str) -> argparse.Namespace:
    """The command line of an experiment: ``data``, ``out``, ``rounds``, and ``conf`` as ``KEY=VALUE``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / data_set)
    parser.add_argument("--out", type=Path, default=Path("work") / data_set)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--conf", action="append", default=[], metavar="KEY=VALUE", help="settings over the defaults")
    return parser.parse_args()


def pictures(experiment: Experiment, settings: Settings, row: dict[str, Any]) -> None:
    """Good, middling and bad held-out case of the last round: truth and the stages' outlines on one slice each.

    ``*_cases.png`` shows them on the scan, for looking at. ``*_outlines.png`` holds no voxel of it: the scans' research
    licences do not let them be shared.
    """
    cases = [c for c in row["cases"] if c["group"] == "heldout"]
    cases.sort(key=lambda c: -np.mean([d for d in c["dice"]["retrained"] if d is not None]))
    chosen = [cases[0], cases[len(cases) // 2], cases[-1]]
    for name, with_scan in (("cases", True), ("outlines", False)):
        _draw(
            experiment,
            settings.label_set,
            row["round"],
            chosen,
            experiment.out / f"{experiment.name}_{name}.png",
            with_scan,
        )


def _draw(
    experiment: Experiment, labels: Labels, number: int, chosen: list[dict[str, Any]], path: Path, with_scan: bool
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = ("truth", *[s for s in STAGES if s in chosen[0]["dice"]])
    figure, axes = plt.subplots(len(chosen), len(columns), figsize=(2.6 * len(columns), 8), facecolor="black")
    for line, case in zip(axes, chosen, strict=True):
        name = f"{case['case']}.nii.gz"
        image = read_image(experiment.out / "heldout" / name)
        folders = {s: experiment.out / f"round{number}" / "heldout" / s for s in columns[1:]}
        masks = {
            s: read_label(f / name, image, labels) for s, f in {"truth": experiment.out / "truth", **folders}.items()
        }
        inner = (masks["truth"] == len(labels)).sum((0, 1))
        k = int(np.argmax(inner if inner.any() else (masks["truth"] > 0).sum((0, 1))))
        low, high = np.percentile(image.array[:, :, k], [1, 99])
        background = image.array[:, :, k].T if with_scan else np.full(image.array.shape[1::-1], low)
        for axis, column in zip(line, columns, strict=True):
            axis.imshow(background, cmap="gray", vmin=low, vmax=high, origin="lower")
            for n, colour in zip(range(len(labels)), ("lime", "red", "cyan", "yellow"), strict=False):
                region = labels.regions(masks[column][:, :, k])[n]
                true = labels.regions(masks["truth"][:, :, k])[n]
                if not with_scan and true.any():
                    axis.contourf(true.T, [0.5, 1.5], colors=[colour], alpha=0.35)
                if region.any() and not region.all():
                    axis.contour(region.T, [0.5], colors=colour, linewidths=1)
            score = "" if column == "truth" else "  ".join(_number(d) for d in case["dice"][column])
            axis.set_title(f"{column}  {score}", fontsize=9, color="white")
            if nib.aff2axcodes(image.affine)[0] == "R":
                axis.invert_xaxis()
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80, facecolor="black")
    plt.close(figure)
    logger.info("picture: %s", path)
