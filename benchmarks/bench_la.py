"""The left-atrium benchmark of the SSL papers (docs/science.md §4, §5): train with few labels, score on held-out scans.

Protocol: the first N names of the list are labelled, the rest unlabelled; patches of 112 x 112 x 80; at test a sliding
window with stride 18/18/4, mean of the softmax outputs, the last iterate, no post-processing. Dice, Jaccard, HD95
(pooled) and ASD (prediction to truth) in voxels; a second column keeps the largest component. ``--scale half`` is the
CPU version: scans averaged 2 x 2 x 2, patches of 64 x 64 x 32 (half of the protocol's, on multiples of 16 as V-Net
needs), stride 9/9/2, 8 filters, scored at half resolution.

The optimiser is this project's, not the papers': SGD with Nesterov's momentum (theirs is plain) and gradients of a norm
of at most 10 (theirs are not limited). So are the augmentation and the choice of patches (docs/science.md §4, §5).

    python benchmarks/bench_la.py --scale half --labelled 8 --method bcp --held-out 16 --out work/bench/bcp8
    python benchmarks/bench_la.py --scale half --method bcp_mt --init work/bench/sup8/model.pt --out work/bench/more8
    python benchmarks/bench_la.py --evaluate work/bench/bcp8/model.pt --images DIR --labels DIR

Training writes model.pt, result.json and log.txt into --out; --evaluate writes a result.json there, if --out is given.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import nn

from aslseg.agreement.measures import score
from aslseg.cases.prepared_case import Prepared
from aslseg.compute.augment import centre
from aslseg.compute.device import bfloat16_pays
from aslseg.compute.weights import load_weights, save_weights
from aslseg.errors import AslsegError, BadWeightsError, NotEnoughCasesError
from aslseg.files import atomic_file, sha256, write_json
from aslseg.registry import NETWORKS
from aslseg.settings import Settings, load_settings
from aslseg.ssl import engine
from aslseg.ssl.methods.bcp import largest_components
from aslseg.types import Labels, Volume
from aslseg.volume.geometry import Grid
from aslseg.volume.intensity import normalise
from aslseg.volume.io import case_id, extension, read_image
from realdata_la import half, half_affine

logger = logging.getLogger("bench_la")

SCALES: dict[str, dict[str, Any]] = {
    "full": {"network": "vnet", "patch": (112, 112, 80), "stride": (18, 18, 4), "iterations": 6000},
    "half": {"network": "vnet_small", "patch": (64, 64, 32), "stride": (9, 9, 2), "iterations": 1000},
}
METRICS = ("dice", "jaccard", "hd95", "asd")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "la"


def read_case(image: Path, label: Path | None, scale: str, settings: Settings) -> Prepared:
    """A scan on the benchmark's grid (i, j, k), intensities in 0..1; ``label`` None for unlabelled scans."""
    volume = read_image(image)
    mask = read_image(label) if label else None
    if mask is not None and mask.array.shape != volume.array.shape:
        raise NotEnoughCasesError(
            f"{label}: shape {mask.array.shape} but the scan has {volume.array.shape}; give the labels of these scans"
        )
    truth = None if mask is None else (mask.array > 0).astype(np.uint8)
    if scale == "half":
        volume = Volume(half(volume.array).astype(np.float32), half_affine(volume.affine))
        truth = None if truth is None else (half(truth) >= 0.5).astype(np.uint8)
    name = case_id(image)
    return Prepared(name, name, normalise(volume.array, settings), Grid.of(volume, None), truth)


def files(folder: Path) -> dict[str, Path]:
    """Scans or labels of a folder by case id."""
    if not folder.is_dir():
        raise NotEnoughCasesError(f"{folder}: no such folder; give --images and --labels")
    return {case_id(p): p for p in sorted(folder.iterdir()) if p.is_file() and extension(p)}


def choose(names: Sequence[str], labelled: int, held_out: int) -> tuple[list[str], list[str], list[str]]:
    """Labelled, unlabelled and held-out names: the first ``labelled``, those between, the last ``held_out``."""
    rest = len(names) - held_out
    if not 0 < labelled <= rest:
        raise NotEnoughCasesError(f"{labelled} labelled and {held_out} held out of {len(names)} listed; ask for fewer")
    return list(names[:labelled]), list(names[labelled:rest]), list(names[rest:])


@torch.inference_mode()
def predict(
    network: nn.Module, image: np.ndarray, patch: Sequence[int], stride: Sequence[int], classes: int
) -> np.ndarray:
    """Class map (i, j, k) of an image (i, j, k) in 0..1 by the papers' sliding window: plain mean of the softmax."""
    device = next(network.parameters()).device
    shape = image.shape
    pad = [max(p - n, 0) for p, n in zip(patch, shape, strict=True)]
    padded = np.pad(image, [(p // 2, p - p // 2) for p in pad])
    x = centre(torch.from_numpy(padded).float())[None, None].to(device)
    total = torch.zeros(classes, *padded.shape, device=device)
    count = torch.zeros(padded.shape, device=device)
    starts = [
        sorted({min(s * n, size - p) for n in range(math.ceil((size - p) / s) + 1)})
        for size, p, s in zip(padded.shape, patch, stride, strict=True)
    ]
    windows = [
        tuple(slice(a, a + p) for a, p in zip(corner, patch, strict=True))
        for corner in ((i, j, k) for i in starts[0] for j in starts[1] for k in starts[2])
    ]
    group = 4 if device.type == "cpu" else 8  # one alone misses oneDNN on CPUs and takes three times as long
    for first in range(0, len(windows), group):
        chosen = windows[first : first + group]
        batch = torch.cat([x[(slice(None), slice(None), *w)] for w in chosen])
        batch = batch.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_pays(device)):
            logits = network(batch)
        for window, p in zip(chosen, logits[:, :classes].float().softmax(1), strict=True):
            total[(slice(None), *window)] += p
            count[window] += 1
    found = (total / count).argmax(0).byte().cpu().numpy()
    return found[tuple(slice(p // 2, p // 2 + n) for p, n in zip(pad, shape, strict=True))]


def evaluate(network: nn.Module, cases: Sequence[Prepared], metadata: dict[str, Any]) -> dict[str, Any]:
    """Scores per case and in the mean, as predicted and with the largest component kept."""
    network = network.eval().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    labels = Labels.parse(",".join(metadata["labels"]))
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        mask = predict(network, case.image, metadata["patch"], metadata["stride"], len(metadata["labels"]) + 1)
        kept = largest_components(torch.from_numpy(mask)[None], labels)[0].numpy()
        found[case.id] = {
            column: {m: s[m] for m in METRICS}
            for column, s in (
                ("plain", score(mask > 0, case.label > 0, None)),
                ("largest_component", score(kept > 0, case.label > 0, None)),
            )
        }
        logger.info("%s Dice %.4f", case.id, found[case.id]["plain"]["dice"])
    return {"cases": found, "summary": summarise(found)}


def summarise(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean, sample standard deviation and number of scores; an empty prediction has Dice 0 and no distance."""
    summary: dict[str, Any] = {}
    for column in ("plain", "largest_component"):
        summary[column] = {}
        for metric in METRICS:
            values = [case[column][metric] for case in found.values() if case[column][metric] is not None]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            mean = float(np.mean(values)) if values else None
            summary[column][metric] = {"mean": mean, "std": spread, "n": len(values)}
    return summary


def save_model(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, Any], half_precision: bool) -> None:
    """``model.pt``: weights and JSON metadata, readable with ``torch.load(weights_only=True)``."""
    tensors = {k: v.half() if half_precision and v.is_floating_point() else v for k, v in state.items()}
    with atomic_file(path) as temporary:
        torch.save({"state": tensors, "metadata": json.dumps(metadata)}, temporary)


def load_model(path: Path, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """A network from ``model.pt`` or from a published ``*.safetensors`` of this benchmark."""
    try:
        if path.suffix == ".safetensors":
            state, metadata = load_weights(path, "ssl")
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
            state, metadata = content["state"], json.loads(content["metadata"])
        metadata = {**SCALES[metadata["scale"]], **metadata}
        network = NETWORKS.get(metadata["network"])(metadata["outputs"], metadata["patch"])
        network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    except AslsegError:
        raise
    except Exception as error:
        raise BadWeightsError(
            f"{path} is no model of this benchmark ({type(error).__name__}); give a model.pt that bench_la.py wrote"
        ) from error
    return network.to(device), metadata


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate, write everything into ``--out``."""
    scale = SCALES[arguments.scale]
    conf = {
        "labels": "atrium",
        "modality": "mr",
        "spacing": "native",
        "network": scale["network"],
        "patch": ",".join(map(str, scale["patch"])),
        **({"ssl_method": arguments.method} if arguments.method else {}),
        "seed": str(arguments.seed),
        **dict(pair.split("=", 1) for pair in arguments.conf),
    }
    settings = load_settings(conf, env={})[0]
    images, labels = files(arguments.images), files(arguments.labels)
    names = [n for n in arguments.list.read_text().split() if n]
    absent = [n for n in names if n not in images]
    if absent:
        raise NotEnoughCasesError(
            f"{len(absent)} of the {len(names)} listed scans are not in {arguments.images}: {absent[:3]}"
        )
    known, free, held = choose(names, arguments.labelled, arguments.held_out)
    labelled = [read_case(images[n], labels[n], arguments.scale, settings) for n in known]
    unlabelled = [read_case(images[n], None, arguments.scale, settings) for n in free]
    iterations = arguments.iterations or scale["iterations"]
    out: Path = arguments.out
    weights = out / "model.safetensors"
    began = time.monotonic()
    init = arguments.init and start(arguments.init, out / "init.safetensors")
    trained = engine.train(
        labelled, unlabelled, settings, weights, iterations=iterations, spacing=None, init=init, report=_log
    )
    minutes = (time.monotonic() - began) / 60
    state, metadata = load_weights(weights, "ssl")
    metadata |= {"scale": arguments.scale, "stride": list(scale["stride"])}
    save_model(out / "model.pt", state, metadata, arguments.half_precision)
    for done in (weights, *([init] if init else [])):
        done.unlink()
    network, metadata = load_model(out / "model.pt", engine.choose_device(settings))
    result = {
        "protocol": __doc__.split("\n\n")[1],
        "scale": arguments.scale,
        "method": settings.ssl_method,
        "labelled": known,
        "unlabelled": len(free),
        "conf": conf,
        "iterations": iterations,
        "init": sha256(arguments.init) if arguments.init else None,
        "train_minutes": minutes,
        "seconds_per_step": trained["seconds"] / max(trained["steps"], 1),
        "threads": torch.get_num_threads(),
        "device": str(engine.choose_device(settings)),
    }
    if held:
        result |= evaluate(
            network, [read_case(images[n], labels[n], arguments.scale, settings) for n in held], metadata
        )
    return result


def start(model: Path, weights: Path) -> Path:
    """The model to start from as the engine reads it, at ``weights``."""
    network, metadata = load_model(model, torch.device("cpu"))
    save_weights(weights, network.state_dict(), metadata)
    return weights


def evaluate_folder(arguments: argparse.Namespace) -> dict[str, Any]:
    """Score a model on every scan of ``--images`` that has a label in ``--labels`` (and is in ``--list``, if given)."""
    settings = load_settings({"labels": "atrium", "modality": "mr"}, env={})[0]
    network, metadata = load_model(arguments.evaluate, engine.choose_device(settings))
    images, labels = files(arguments.images), files(arguments.labels)
    chosen = sorted(set(images) & set(labels))
    if arguments.list:
        listed = arguments.list.read_text().split()
        chosen = [n for n in (listed[-arguments.held_out :] if arguments.held_out else listed) if n in chosen]
    if not chosen:
        raise NotEnoughCasesError(f"no scan of {arguments.images} has a label of its name in {arguments.labels}")
    cases = (read_case(images[n], labels[n], metadata["scale"], settings) for n in chosen)
    return {"model": str(arguments.evaluate), "scale": metadata["scale"], **evaluate(network, list(cases), metadata)}


def _log(done: int, total: int, **shown: Any) -> None:
    if done % 50 == 0 or done == total:
        logger.info("step %d/%d %s", done, total, " ".join(f"{k} {v:.4f}" for k, v in shown.items()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=DATA / "images")
    parser.add_argument("--labels", type=Path, default=DATA / "labels")
    parser.add_argument("--list", type=Path, help="names, one a line; training: train.txt beside --images")
    parser.add_argument("--evaluate", type=Path, metavar="MODEL", help="score this model instead of training")
    parser.add_argument("--scale", choices=list(SCALES), default="full")
    parser.add_argument("--method", help="ssl_method; the setting's default if not given")
    parser.add_argument("--labelled", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=0, help="the last so many of the list are only scored on")
    parser.add_argument("--iterations", type=int, help="default: 6000 (full), 1000 (half)")
    parser.add_argument("--init", type=Path, metavar="MODEL", help="start from this model instead of random weights")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--conf", action="append", default=[], metavar="KEY=VALUE", help="settings over the defaults")
    parser.add_argument("--half-precision", action="store_true", help="store model.pt in fp16")
    parser.add_argument("--out", type=Path)
    return parser


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    if not arguments.evaluate:
        arguments.list = arguments.list or arguments.images.parent / "train.txt"
        if arguments.out is None:
            parser.error("--out DIR is needed for training")
    form = "%(asctime)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form)
    logger.setLevel(logging.INFO)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(arguments.out / "log.txt")
        file.setFormatter(logging.Formatter(form))
        logger.addHandler(file)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        result = evaluate_folder(arguments) if arguments.evaluate else train(arguments)
    except (AslsegError, OSError) as error:
        logger.error("%s", error)
        return 1
    for column, summary in result.get("summary", {}).items():
        shown = "  ".join(
            f"{m} {v['mean']:.4f} ± {v['std'] or 0:.4f}" for m, v in summary.items() if v["mean"] is not None
        )
        logger.info("%s: %s", column, shown)
    if arguments.out:
        write_json(arguments.out / "result.json", result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
