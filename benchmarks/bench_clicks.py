"""How long an annotator waits for an answer to a click, over HTTP, from the real server; beside it MONAI Label's SAM 2.

A phantom CT of 512 x 512 x 160 voxels and a ViT-B at 256 px with random weights, whose masks are made constant so that
the object is the box on every slice: speed does not depend on what weights say, but on one component and not on noise.

    python benchmarks/bench_clicks.py --out work/bench [--think 1] [--clicks 20] [--sam FILE] [--no-sam2]

Writes results.json to the folder and prints a table. The baseline is ``monailabel.sam2.infer.Sam2InferTask`` (tiny,
random weights, its download patched out) on a MONAI Label server of its own, asked for the same clicks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import requests
from requests_toolbelt import MultipartDecoder
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (512, 512, 160)
# Slicer's pairs, forty slices each, and no slice in two of them: what one part of the run encodes helps no other. The
# median intensity changes little within each, so that the object grows through all of its slices
BOXES = {"sam_2d": [150, 350, 150, 350, 60, 99], "sam": [150, 350, 150, 350, 118, 157]}
GROWN = [150, 350, 150, 350, 10, 49]
NEW = (2, 20, 38, 11, 29)  # slices of a box, in the order in which they are first clicked
CONF = {"labels": "liver", "first_round": False}
SAM2_APP = """
import os
import monailabel.sam2.infer as sam2
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.infer_v2 import InferType

sam2.download_file = lambda url, path, *more: None


class Baseline(MONAILabelApp):
    def __init__(self, app_dir, studies, conf):
        super().__init__(app_dir, studies, conf, name="baseline", labels=["liver"])

    def init_infers(self):
        folder = os.path.join(self.app_dir, "model")
        return {"sam_2d": sam2.Sam2InferTask(folder, type=InferType.DEEPGROW, dimension=2, labels={"liver": 1})}
"""


def write_scan(studies: Path) -> None:
    """One phantom, enlarged to the size of a clinical CT, with a scanner's noise."""
    from aslseg.types import Volume
    from aslseg.volume.io import write_image
    from aslseg.volume.phantom import make_phantom

    small = make_phantom(1, 0, shape=(128, 128, 40))[0]
    array = ndimage.zoom(small.array, 4, order=1, grid_mode=True, mode="nearest")
    array += np.random.default_rng(0).normal(0, 12, SHAPE).astype(np.float32)
    affine = small.affine @ np.diag([0.25, 0.25, 0.25, 1])
    write_image(studies / "bench.nii.gz", Volume(array, affine))


def write_sam(path: Path) -> None:
    """ViT-B at 256 px; the mask head answers yes everywhere, so that only the box shapes the mask."""
    import torch

    from aslseg.compute.weights import save_weights
    from aslseg.sam.modeling.architecture import VIT_B, build

    torch.manual_seed(0)
    architecture = replace(VIT_B, image_size=256)
    sam = build(architecture)
    with torch.no_grad():
        # the IoU that it predicts becomes one as well: growth must go through all slices of the box to be timed
        for head in (*sam.mask_decoder.output_hypernetworks_mlps, sam.mask_decoder.iou_prediction_head):
            head.layers[-1].weight.zero_()
            head.layers[-1].bias.fill_(1)
        sam.mask_decoder.output_upscaling[-2].weight.mul_(0.01)
        sam.mask_decoder.output_upscaling[-2].bias.fill_(1)
    save_weights(path, sam.state_dict(), {"kind": "sam", "architecture": architecture.to_metadata()})


def write_sam2(app: Path) -> None:
    """The baseline's app: SAM 2.1 tiny with random weights where its download would have put them."""
    import sam2
    import torch
    from hydra import compose
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    model = app / "model"
    model.mkdir(parents=True, exist_ok=True)
    (app / "main.py").write_text(SAM2_APP)
    config = Path(sam2.__file__).parent / "configs" / "sam2.1" / "sam2.1_hiera_t.yaml"
    shutil.copy(config, model)
    found = compose(config_name="configs/sam2.1/sam2.1_hiera_t.yaml")
    OmegaConf.resolve(found)
    torch.manual_seed(0)
    torch.save({"model": instantiate(found.model, _recursive_=True).state_dict()}, model / "sam2.1_hiera_tiny.pt")


@contextmanager
def server(app: Path, studies: Path, folder: Path, conf: dict[str, Any], env: dict[str, str]) -> Iterator[str]:
    """``monailabel start_server`` in a process of its own; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app), "--studies", str(studies)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    for key, value in conf.items():
        command += ["--conf", key, str(value)]
    tmp = folder / "tmp"
    tmp.mkdir(parents=True, exist_ok=True)
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    own = {"OMP_NUM_THREADS": threads, "TMPDIR": str(tmp)}
    if "OMP_WAIT_POLICY" not in os.environ:  # as scripts/start.sh
        own |= {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "5000"}
    own["MONAI_LABEL_DATASTORE_CACHE_PATH"] = str(tmp / "cache")
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **own, **env}, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 600
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server does not start, see {folder / 'server.log'}")
            try:
                if requests.get(f"{url}/info/", timeout=60).ok:
                    break
            except requests.RequestException:
                time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def ask(url: str, model: str, params: dict[str, Any], ohif: bool = False) -> dict[str, Any]:
    """One request as Slicer, or OHIF, sends it: seconds, bytes on the wire, and the server's own latencies."""
    summary = {"result_extension": ".nrrd", "result_dtype": "uint8", "device": "cpu", **params}
    if ohif:
        summary |= {"result_compress": False, "restore_label_idx": False}
    start = time.perf_counter()
    reply = requests.post(
        f"{url}/infer/{model}?image=bench{'&output=image' if ohif else ''}",
        files={"params": (None, json.dumps(summary))},
        headers={"Accept-Encoding": "gzip, deflate" if ohif else "identity"},
        stream=True,
        timeout=1800,
    )
    body = reply.raw.read(decode_content=False)
    seconds = time.perf_counter() - start
    reply.raise_for_status()
    found: dict[str, Any] = {"seconds": seconds, "bytes": len(body)}
    if not ohif:
        parts = MultipartDecoder(body, reply.headers["content-type"]).parts
        found |= {k: v for k, v in json.loads(parts[0].content).items() if k in ("latencies", "growing", "source")}
    return found


def points(k: int, count: int) -> dict[str, Any]:
    """The first ``count`` clicks of the scripted annotator on slice k, three of four inside."""
    rng = np.random.default_rng(k)
    spots = [[int(i), int(j), k] for i, j in rng.integers(180, 320, (count, 2))]
    return {
        "label": "liver",
        "foreground": [p for n, p in enumerate(spots) if n % 4 != 3],
        "background": [p for n, p in enumerate(spots) if n % 4 == 3],
    }


def session(url: str, model: str, box: list[int], options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Opening the scan, first clicks on new slices, further clicks on one slice."""
    slices = [box[4] + n for n in NEW]

    def paced(params: dict[str, Any]) -> dict[str, Any]:
        time.sleep(options.think)
        return ask(url, model, {**more, **params})

    opening = ask(url, model, {**more, **points(box[5], 1)})
    first = [paced(points(k, 1)) for k in slices]
    further = [paced(points(slices[-1], n)) for n in range(2, options.clicks + 2)]
    return {"opening": opening, "first": first, "further": further}


def without_box(url: str, model: str, k: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Further clicks on an encoded slice by an annotator who draws no box: the answer's own one is asked for."""
    asked = []
    for n in range(1, options.clicks + 2):
        time.sleep(options.think)
        asked.append(ask(url, model, {**points(k, n), "client_id": "boxless"}))
    return asked[1:]


def propagation(url: str) -> dict[str, Any]:
    """Forty slices, first with the encoder, then once embedded; a new annotator each time, so nothing is remembered."""
    whole = {"label": "liver", "roi": GROWN, "whole": True}
    cold = ask(url, "sam", {**whole, "foreground": [[250, 250, 30]], "client_id": "cold"})
    warm = [ask(url, "sam", {**whole, "foreground": [[250, 251 + n, 30]], "client_id": f"warm{n}"}) for n in range(3)]
    slices = GROWN[5] - GROWN[4] + 1
    best = min(w["latencies"]["infer"] for w in warm)
    return {"slices": slices, "cold": cold, "warm": warm, "slices_per_second": slices / best}


def summary(results: dict[str, Any]) -> list[str]:
    """A table of what annotators wait for."""
    lines = [f"load before {results['load'][0]}, after {results['load'][1]}; {results['machine']}", ""]
    lines += ["| | first click on a new slice, median | further click, median | p95 | bytes |", "|---|---|---|---|---|"]
    for name in ("sam_2d", "sam", "Sam2InferTask"):
        if name not in results:
            continue
        one = results[name]
        first = np.median([r["seconds"] for r in one["first"]]) * 1e3
        further = np.array([r["seconds"] for r in one["further"]]) * 1e3
        size = np.median([r["bytes"] for r in one["further"]])
        cells = f"{first:.0f} ms | {np.median(further):.0f} ms | {np.percentile(further, 95):.0f} ms | {size:.0f}"
        lines.append(f"| {name} | {cells} |")
    grown = results["propagation"]
    lines += ["", f"3-D propagation, embedded: {grown['slices_per_second']:.1f} slices/s ({grown['slices']} slices)"]
    lines.append(f"with the encoder: {grown['slices'] / grown['cold']['latencies']['infer']:.2f} slices/s")
    lines.append(f"OHIF reply: {results['ohif']['bytes']} bytes in {results['ohif']['seconds'] * 1e3:.0f} ms")
    for name in BOXES:
        boxless = np.array([r["seconds"] for r in results[name]["without_box"]]) * 1e3
        summary = f"{np.median(boxless):.0f} ms, p95 {np.percentile(boxless, 95):.0f} ms"
        lines.append(f"{name}, further click without a box: {summary}")
        taken = [r["latencies"] for r in results[name]["further"]]
        parts = {k: round(float(np.median([t.get(k, 0) for t in taken])) * 1e3) for k in taken[0]}
        lines.append(f"{name}, further click, the server's own breakdown in ms (medians): {parts}")
    if "Sam2InferTask" in results:
        theirs = np.median([r["seconds"] for r in results["Sam2InferTask"]["further"]])
        ours = np.median([r["seconds"] for r in results["sam_2d"]["further"]])
        lines.append(f"further click, Sam2InferTask over sam_2d: {theirs / ours:.1f} times")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--think", type=float, default=1.0, help="seconds between clicks")
    parser.add_argument("--clicks", type=int, default=20, help="further clicks on one slice")
    parser.add_argument("--sam", type=Path, help="a SAM file instead of the ViT-B with random weights")
    parser.add_argument("--no-sam2", action="store_true", help="without the baseline")
    options = parser.parse_args()
    folder = options.out.resolve()
    studies, weights = folder / "studies", options.sam.resolve() if options.sam else folder / "vit_b_256.safetensors"
    for old in (studies, folder / "home"):  # embeddings of an earlier run would make first clicks look quick
        shutil.rmtree(old, ignore_errors=True)
    studies.mkdir(parents=True)
    write_scan(studies)
    if options.sam is None:
        write_sam(weights)
    load = [os.getloadavg()]
    results: dict[str, Any] = {"machine": f"{os.cpu_count()} CPUs, {platform.processor() or platform.machine()}"}
    conf = {**CONF, "sam_checkpoint": weights, "model_dir": folder / "models"}
    app = folder / "app"
    app.mkdir(exist_ok=True)
    shutil.copy(ROOT / "apps" / "aslseg" / "main.py", app)
    with server(app, studies, folder, conf, {"ASLSEG_HOME": str(folder / "home")}) as url:
        for model, box in BOXES.items():
            results[model] = session(url, model, box, options, roi=box)
        results["propagation"] = propagation(url)
        for model, box in BOXES.items():
            results[model]["without_box"] = without_box(url, model, box[4] + NEW[-1], options)
        results["ohif"] = ask(url, "sam", {"foreground": [[250, 250, 30]], "roi": GROWN}, ohif=True)
    if not options.no_sam2:
        write_sam2(folder / "sam2")
        names = {"MONAI_SAM_MODEL_PT": "x/sam2.1_hiera_tiny.pt", "MONAI_SAM_MODEL_CFG": "x/sam2.1_hiera_t.yaml"}
        with server(folder / "sam2", studies, folder, {}, names) as url:
            results["Sam2InferTask"] = session(url, "sam_2d", BOXES["sam_2d"], options)
    load.append(os.getloadavg())
    results["load"] = load
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    sys.stdout.write("\n".join(summary(results)) + "\n")


if __name__ == "__main__":
    main()
