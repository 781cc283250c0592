"""Who waits how long while the server works: two whole-volume inferences, a round, and two annotators who click.

    python benchmarks/bench_server.py --out work/server [--seconds 60] [--no-plain]

Meanwhile ``/info/`` is asked twenty times a second and the status page twice a second. Beside it the same load on plain
MONAI Label 0.8.5, with an app written here: a network of the same kind and size in its own sliding window, a training
loop with it, and a small network on one slice for a click. Phantoms of 96 x 96 x 48 voxels; every inference gets a
scan of its own. Prints a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import requests

from bench_clicks import ROOT, server

SHAPE = (96, 96, 48)
TRAINED, LABELLED = 6, 3
COPIES = 10
"""Scans a second that differ by one voxel, one for each inference: none is answered from a cache."""
CONF = {
    "ssl_iterations": 2000,  # the round outlasts the measurement
    "patch": "64,64,32",
    "spacing": "native",
    "network": "vnet_small",
    "first_round": False,
    "min_free_gb": 0,
}
PLAIN_APP = '''
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import VNet
from monai.transforms import (
    Activationsd, AsDiscreted, EnsureChannelFirstd, EnsureTyped, LoadImaged, ScaleIntensityRanged, SqueezeDimd,
)
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.tasks.infer.basic_infer import BasicInferTask
from monailabel.transform.post import Restored

PATCH = (64, 64, 32)


class Segmentation(BasicInferTask):
    def __init__(self):
        from aslseg.ssl.networks import vnet_small
        super().__init__(None, vnet_small(3, PATCH), InferType.SEGMENTATION, {"liver": 1, "tumour": 2}, 3, "whole")

    def is_valid(self):
        return True

    def pre_transforms(self, data=None):
        return [
            LoadImaged("image"), EnsureTyped("image"), EnsureChannelFirstd("image"),
            ScaleIntensityRanged("image", -160, 240, 0, 1, clip=True),
        ]

    def inferer(self, data=None):
        return SlidingWindowInferer(PATCH, 1, 0.5, mode="gaussian")

    def post_transforms(self, data=None):
        return [
            EnsureTyped("pred"), Activationsd("pred", softmax=True), AsDiscreted("pred", argmax=True),
            SqueezeDimd("pred", 0), Restored("pred", "image"),
        ]


class Click(BasicInferTask):
    """One slice through a small 2-D network, as MONAI Label's deepgrow."""

    def __init__(self):
        from monai.networks.nets import BasicUNet
        super().__init__(None, BasicUNet(2, 1, 2), InferType.DEEPGROW, {"liver": 1}, 2, "click")

    def is_valid(self):
        return True

    def pre_transforms(self, data=None):
        return [LoadImaged("image"), EnsureTyped("image"), EnsureChannelFirstd("image")]

    def inferer(self, data=None):
        return lambda inputs, network: network(inputs[..., inputs.shape[-1] // 2])

    def post_transforms(self, data=None):
        def paste(data):
            mask = torch.zeros(data["image"].shape[1:])
            mask[..., mask.shape[-1] // 2] = data["pred"].argmax(0)
            data["pred"] = data["image"][0] * 0 + mask
            return data

        return [paste]


class Round(TrainTask):
    def __init__(self):
        super().__init__("a training loop")

    def __call__(self, request, datastore):
        from aslseg.ssl.networks import vnet_small
        network = vnet_small(3, PATCH)
        optimiser = torch.optim.SGD(network.parameters(), 0.01)
        for _ in range(10_000):
            optimiser.zero_grad()
            network(torch.rand(4, 1, *PATCH)).square().mean().backward()
            optimiser.step()
        return {}


class Plain(MONAILabelApp):
    def __init__(self, app_dir, studies, conf):
        super().__init__(app_dir, studies, conf, name="plain", labels=["liver", "tumour"])

    def init_infers(self):
        return {"ssl": Segmentation(), "sam_2d": Click()}

    def init_trainers(self):
        return {"round": Round()}
'''


def write_folder(studies: Path, copies: int) -> None:
    """Phantoms to train on, and copies of one that differ by a voxel."""
    from aslseg.volume.phantom import write_studies

    write_studies(studies, TRAINED, LABELLED, 3, shape=SHAPE)
    scan = nib.load(studies / "phantom_005.nii.gz")
    array = np.asarray(scan.dataobj).copy()
    for n in range(copies):
        array.flat[n] += 1
        nib.save(nib.Nifti1Image(array, scan.affine), studies / f"copy_{n:03d}.nii")


class Load:
    """The load on one server.

    Args:
        url: Its address.
        seconds: How long.
    """

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.seconds = url, seconds
        self.took: dict[str, list[float]] = {}
        self._copies = itertools.count()
        self._end = 0.0

    def run(self, status: bool) -> dict[str, list[float]]:
        """Seconds of each request, by kind."""
        requests.post(f"{self.url}/train/round", json={}, timeout=600).raise_for_status()
        time.sleep(15)  # its process imports torch
        self._end = time.monotonic() + self.seconds
        work: list[tuple[str, float, Callable[[requests.Session, int], requests.Response]]] = [
            ("/info", 0.05, lambda session, n: session.get(f"{self.url}/info/", timeout=600)),
            *[("whole volume", 0.0, self._whole)] * 2,
            *[("click", 1.0, self._clicker(who)) for who in ("ann", "bob")],
        ]
        if status:
            work.append(("status page", 0.5, lambda session, n: session.get(f"{self.url}/aslseg/", timeout=600)))
        with ThreadPoolExecutor(len(work)) as pool:
            for future in [pool.submit(self._repeat, *one) for one in work]:
                future.result()
        state = requests.get(f"{self.url}/train/", timeout=60).json()["status"]
        if state != "RUNNING":
            raise SystemExit(f"the round did not run all the time: {state}")
        requests.delete(f"{self.url}/train/", timeout=60)
        return self.took

    def _repeat(self, kind: str, rest: float, ask: Callable[[requests.Session, int], requests.Response]) -> None:
        session, n = requests.Session(), 0
        while time.monotonic() < self._end:
            began = time.perf_counter()
            ask(session, n).raise_for_status()
            self.took.setdefault(kind, []).append(time.perf_counter() - began)
            n += 1
            time.sleep(rest)

    def _infer(self, session: requests.Session, model: str, case: str, params: dict[str, Any]) -> requests.Response:
        params = {"result_extension": ".nrrd", "result_dtype": "uint8", "device": "cpu", **params}
        return session.post(
            f"{self.url}/infer/{model}?image={case}", files={"params": (None, json.dumps(params))}, timeout=600
        )

    def _whole(self, session: requests.Session, n: int) -> requests.Response:
        return self._infer(session, "ssl", f"copy_{next(self._copies):03d}", {})

    def _clicker(self, who: str) -> Callable[[requests.Session, int], requests.Response]:
        """An annotator on one scan: three clicks on a slice, then the next slice."""
        case = {"ann": "phantom_003", "bob": "phantom_004"}[who]

        def click(session: requests.Session, n: int) -> requests.Response:
            k = 16 + n // 3 % 16
            spots = [[30 + 3 * m, 40 + m, k] for m in range(n % 3 + 1)]
            return self._infer(session, "sam_2d", case, {"label": "liver", "foreground": spots, "client_id": who})

        return click


def table(results: dict[str, Any]) -> list[str]:
    """Two columns of times as Markdown."""
    lines = [f"{name}: load before {r['load'][0]}, after {r['load'][1]}" for name, r in results.items()]
    lines += ["", f"| request | {' | '.join(results)} |", f"|---|{'---|' * len(results)}"]
    for kind in ("/info", "status page", "click", "whole volume"):
        cells = []
        for found in results.values():
            seconds = found["seconds"].get(kind)
            cells.append(_cell(seconds) if seconds else "none")
        lines.append(f"| {kind}: p50, p99, max (number) | {' | '.join(cells)} |")
    return lines


def _cell(seconds: list[float]) -> str:
    p50, p99 = np.percentile(seconds, (50, 99))
    return f"{1e3 * p50:.0f}, {1e3 * p99:.0f}, {1e3 * max(seconds):.0f} ms ({len(seconds)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--no-plain", action="store_true", help="without plain MONAI Label")
    options = parser.parse_args()
    folder = options.out.resolve()
    studies, conf = folder / "studies", {**CONF, "model_dir": folder / "models"}
    if not studies.exists():
        write_folder(studies, int(COPIES * options.seconds))
        command = [sys.executable, "-m", "aslseg", "train", "ssl", "--studies", str(studies)]
        for key, value in {**conf, "ssl_iterations": 20}.items():
            command += ["--conf", f"{key}={value}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    plain = folder / "plain"
    plain.mkdir(exist_ok=True)
    (plain / "main.py").write_text(PLAIN_APP)
    copied = folder / "plain_studies"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(studies, copied, ignore=shutil.ignore_patterns(".*", "datastore*"))
    columns = [("ASLseg", ROOT / "apps" / "aslseg", studies, conf), ("plain MONAI Label 0.8.5", plain, copied, {})]
    results: dict[str, Any] = {}
    for name, app, scans, settings in columns[: 1 if options.no_plain else 2]:
        before = os.getloadavg()
        with server(app, scans, folder, settings, {}) as url:
            seconds = Load(url, options.seconds).run(status=settings is conf)
        results[name] = {"seconds": seconds, "load": (before, os.getloadavg())}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    sys.stdout.write("\n".join(table(results)) + "\n")


if __name__ == "__main__":
    main()
