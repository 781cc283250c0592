"""How fast the SSL model trains and predicts here, against plain loops in the same process, turn by turn.

Training: a step of our engine against a step the way the methods' public code does it: float32, the default memory
format, batches from a DataLoader with random crop, rot90 and flip, SGD; same method, network, patch and number of
patches that the student learns from. Prediction: our windows against MONAI's sliding window at its defaults, and at our
settings.

    python benchmarks/bench_ssl.py train --methods supervised,mean_teacher,bcp --network vnet_small --patch 64,64,48
    python benchmarks/bench_ssl.py predict --network vnet_small --patch 64,64,48 --shape 160,160,128
    python benchmarks/bench_ssl.py folds --threads 2 --steps 100 --repeats 3 --warm 0

``folds``: as many trainings as threads, of --steps steps each, one after the other with all threads, and side by side
with one each, the start of their processes included.

On a shared machine trust the ratios of the medians, not the times; the load before and after stands in the result.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from aslseg.cases.prepared_case import Prepared
from aslseg.compute.augment import centre
from aslseg.compute.device import bfloat16_pays
from aslseg.compute.overlap import dice
from aslseg.compute.sliding_window import BATCHES, Blend
from aslseg.files import write_json
from aslseg.registry import NETWORKS
from aslseg.settings import Settings, load_settings
from aslseg.ssl.engine import Trainer
from aslseg.ssl.predict import SSLModel, load
from aslseg.ssl.side_by_side import Training, train_all
from aslseg.types import Volume, no_progress
from aslseg.volume.geometry import Grid
from aslseg.volume.io import read_image
from public_loop import METHODS, PublicLoop

logger = logging.getLogger("bench_ssl")


def blob(seed: int, shape: tuple[int, ...], classes: int, labelled: bool = True) -> Prepared:
    """Nested ellipsoids in noise, everywhere different, so that no window can be left out."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij")
    distance = np.sqrt(sum((a - c) ** 2 for a, c in zip(axes, rng.uniform(-0.2, 0.2, 3), strict=True)))
    label = sum((distance < 0.6 / n).astype(np.uint8) for n in range(1, classes + 1))
    noise = rng.normal(0, 0.05, shape).astype(np.float32)
    image = np.clip(0.2 + 0.5 * label / classes + noise, 0.01, 1).astype(np.float32)
    grid = Grid.of(Volume(image, np.eye(4)), None)
    return Prepared(f"blob{seed}", f"blob{seed}", image, grid, label if labelled else None)


class Timer:
    """Wall seconds, and seconds of all cores that this process had: the latter bear other processes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, work: Callable[[], Any]) -> tuple[float, float]:
        self._finish()
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        self._finish()
        return time.perf_counter() - wall, time.process_time() - cpu

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


Seconds = dict[str, list[tuple[float, float]]]


def turns(works: dict[str, Callable[[int], Any]], repeats: int, warm: int, device: torch.device) -> Seconds:
    """Seconds of each work, one after the other in every turn, the first ``warm`` turns left out."""
    timer, seconds = Timer(device), {name: [] for name in works}
    for turn in range(warm + repeats):
        for name, work in works.items():
            spent = timer(lambda work=work, turn=turn: work(turn))
            if turn >= warm:
                seconds[name].append(spent)
    return seconds


def compared(seconds: Seconds, ours: str) -> dict[str, dict[str, float]]:
    """Medians of wall and CPU seconds of each work, and how many times ours they are."""
    rows = {}
    for name, spent in seconds.items():
        rows[name] = {"turns": len(spent)}
        for n, kind in enumerate(("wall", "cpu")):
            own, base = ([s[n] for s in seconds[which]] for which in (name, ours))
            rows[name] |= {
                f"{kind}_s": statistics.median(own),
                f"{kind}_s_least": min(own),
                f"{kind}_ratio": statistics.median(own) / statistics.median(base),
                f"{kind}_ratio_of_turns": statistics.median(a / b for a, b in zip(own, base, strict=True)),
            }
    return rows


def profile(work: Callable[[], Any], rows: int = 12) -> str:
    """The operations that take most of the time by themselves."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    by = "self_cpu_time_total"
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
        by = "self_cuda_time_total"
    with torch.profiler.profile(activities=kinds) as found:
        work()
    return found.key_averages().table(sort_by=by, row_limit=rows, max_name_column_width=48)


def settings_of(arguments: argparse.Namespace, **more: str) -> Settings:
    labels = ",".join(f"c{n}" for n in range(1, arguments.classes + 1))
    conf = {"labels": labels, "nested": "", "network": arguments.network, "patch": arguments.patch}
    conf |= {"device": arguments.device, **dict(pair.split("=", 1) for pair in arguments.conf), **more}
    return load_settings(conf, env={})[0]


def sizes(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def bench_training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Step times by method."""
    labelled, unlabelled = sizes(arguments.batch)
    patch = sizes(arguments.patch)
    shape = tuple(n + 16 for n in patch)
    cases = (
        [blob(n, shape, arguments.classes) for n in range(4)],
        [blob(n, shape, arguments.classes, labelled=False) for n in range(4, 8)],
    )
    rows: dict[str, Any] = {}
    for method in arguments.methods.split(","):
        more = {"batch_labelled": str(labelled), "batch_unlabelled": str(unlabelled)}
        settings = settings_of(arguments, ssl_method=method, **more)
        # from the middle of a long training, where copy-paste has left its first phase
        trainer = Trainer(*cases, settings, 10_000)
        plain = PublicLoop(method, cases, settings, trainer.patch, arguments.workers)
        works = {"plain": plain, "ours": lambda turn, trainer=trainer: trainer.step(5_000 + turn)}
        rows[method] = compared(turns(works, arguments.repeats, arguments.warm, trainer.device), "ours")
        rows[method]["ours"] |= {"bfloat16": trainer.bf16, "compiled": settings.compile}
        rows[method]["plain"]["patches_drawn"] = plain.drawn
        logger.info(f"{method}: {line(rows[method]['plain'])}; ours {line(rows[method]['ours'])}")
        if arguments.profile:
            for name, work in works.items():
                logger.info(f"\n{method}, {name}\n{profile(lambda work=work: work(0))}")
    return rows


def bench_folds(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of several trainings, one after the other and side by side."""
    labelled, unlabelled = sizes(arguments.batch)
    more = {"batch_labelled": str(labelled), "batch_unlabelled": str(unlabelled), "threads": str(arguments.threads)}
    settings, shape = settings_of(arguments, **more), tuple(n + 16 for n in sizes(arguments.patch))
    cases = [blob(n, shape, arguments.classes) for n in range(4)]
    free = [blob(n, shape, arguments.classes, labelled=False) for n in range(4, 8)]

    def works(at_once: int) -> Callable[[int], None]:
        def work(turn: int) -> None:
            with tempfile.TemporaryDirectory() as folder:
                outs = [Path(folder) / str(n) / "ssl.safetensors" for n in range(arguments.threads)]
                for out in outs:
                    out.parent.mkdir()
                train_all(
                    [Training(cases, free, settings, out, arguments.steps, None) for out in outs], at_once, no_progress
                )

        return work

    both = {"one after the other": works(1), "side by side": works(arguments.threads)}
    rows = compared(turns(both, arguments.repeats, arguments.warm, torch.device("cpu")), "side by side")
    logger.info(f"{settings.ssl_method}: {line(rows['one after the other'])}; {line(rows['side by side'])}")
    return rows


def bench_prediction(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times and masks of a volume, by what predicts it."""
    settings = settings_of(arguments, overlap="0.25", batch_unlabelled="0", ssl_method="supervised")
    model, network, image = _subject(arguments, settings)
    device, patch = model.device, tuple(model.metadata["patch"])
    network = network.to(device).eval()
    batch = BATCHES["cpu" if device.type == "cpu" else "cuda"][0]
    x = torch.from_numpy(centre(np.array(image)))[None, None]
    classes = len(model.metadata["labels"]) + 1

    def monai(**options: Any) -> Callable[[int], None]:
        # blended where it is predicted, as ours
        run = SlidingWindowInferer(
            patch, sw_device=device, device=device, padding_mode="constant", cval=-2.0, **options
        )

        def work(turn: int) -> None:
            with torch.no_grad():
                found[work] = run(x, lambda w: network(w)[:, :classes].softmax(1))[0].cpu().numpy().argmax(0)

        return work

    def ours(blend: Blend) -> Callable[[int], None]:
        def work(turn: int) -> None:
            found[work] = model.run(image, blend=blend).values.argmax(0)

        return work

    found: dict[Any, np.ndarray] = {}
    works = {
        "ours": ours("gaussian"),
        "ours_constant": ours("constant"),
        "monai_defaults": monai(),
        f"monai_defaults_batch_{batch}": monai(sw_batch_size=batch),
        f"monai_gaussian_batch_{batch}": monai(sw_batch_size=batch, mode="gaussian"),
    }
    rows: dict[str, Any] = compared(turns(works, arguments.repeats, arguments.warm, device), "ours")
    for name, work in works.items():
        # masks are compared with ours of the same blending
        like = found[works["ours" if name == "ours" or "gaussian" in name else "ours_constant"]]
        same = [dice(like == value, found[work] == value) for value in range(1, classes)]
        rows[name]["dice_with_ours"] = same
        logger.info(f"{name}: {line(rows[name])}, Dice with ours {[round(d, 6) for d in same]}")
        if arguments.profile:
            logger.info(profile(lambda work=work: work(0)))
    return rows | {"volume": list(image.shape), "patch": list(patch), "overlap": settings.overlap}


def line(row: dict[str, float]) -> str:
    """A row of :func:`compared` in words."""
    return (
        f"{row['wall_s']:.3f} s ({row['cpu_s']:.3f} s CPU), {row['wall_ratio']:.2f} x ours ({row['cpu_ratio']:.2f} x)"
    )


def _subject(arguments: argparse.Namespace, settings: Settings) -> tuple[SSLModel, nn.Module, np.ndarray]:
    """A model, its network as trained, and a volume: given ones, or a few steps on blobs and a larger blob."""
    if arguments.model:
        from aslseg.cases.prepare import prepare
        from aslseg.compute.weights import load_weights

        state, metadata = load_weights(arguments.model, "ssl")
        names = {"labels": ",".join(metadata["labels"]), "modality": metadata["modality"], "overlap": "0.25"}
        settings = load_settings({**names, "device": arguments.device}, env={})[0]
        model = load(arguments.model, settings)
        network = NETWORKS.get(metadata["network"])(metadata["outputs"], metadata["patch"])
        network.load_state_dict(state)
        return model, network, prepare(read_image(arguments.image), settings, model.spacing)[0]
    shape = sizes(arguments.shape)
    trainer = Trainer([blob(n, shape, arguments.classes) for n in range(2)], [], settings, arguments.steps)
    for step in range(arguments.steps):
        trainer.step(step)
    network = copy.deepcopy(trainer.method.predictor).to("cpu", memory_format=torch.contiguous_format).float()
    metadata = {"labels": list(settings.label_set.names), "patch": list(trainer.patch), "spacing": None}
    return SSLModel(network, metadata, settings), network, blob(9, shape, arguments.classes).image


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    values = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}
    flags = values.get("flags", "").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
    sha = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return {
        "cpu": values.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "flags": [f for f in wanted if f in flags],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bfloat16_pays_on_cpu": bfloat16_pays(torch.device("cpu")),
        "git": sha.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "predict", "folds"))
    parser.add_argument("--network", default="vnet_small", choices=list(NETWORKS))
    parser.add_argument("--patch", default="64,64,48", help="voxels; multiples of 16")
    parser.add_argument("--classes", type=int, default=2, help="foreground classes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--repeats", type=int, default=7, help="turns that count")
    parser.add_argument("--warm", type=int, default=2, help="turns before them")
    parser.add_argument("--profile", action="store_true", help="print the operations that take most of the time")
    parser.add_argument("--conf", action="append", default=[], metavar="KEY=VALUE", help="settings over the defaults")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--methods", default=",".join(METHODS), help="train: of supervised, mean_teacher, bcp")
    parser.add_argument("--batch", default="2,2", help="train: labelled, unlabelled patches")
    parser.add_argument("--workers", type=int, default=0, help="train: loader processes of the plain loop")
    parser.add_argument("--shape", default="160,160,128", help="predict: voxels of the volume")
    parser.add_argument("--steps", type=int, default=40, help="predict: training steps before; folds: of each")
    parser.add_argument("--model", type=Path, help="predict: a published SSL model instead, with --image")
    parser.add_argument("--image", type=Path, help="predict: a scan")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    unknown = set(arguments.methods.split(",")) - set(METHODS)
    if unknown:
        parser.error(f"--methods: no plain loop for {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    if bool(arguments.model) != bool(arguments.image):
        parser.error("--model and --image belong together")
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"machine": machine(), "arguments": {k: str(v) for k, v in vars(arguments).items()}}
    result["load_before"] = os.getloadavg()
    parts = {"train": bench_training, "predict": bench_prediction, "folds": bench_folds}
    result["result"] = parts[arguments.what](arguments)
    result["load_after"] = os.getloadavg()
    logger.info("%s", json.dumps(result, indent=1))
    if arguments.out:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
