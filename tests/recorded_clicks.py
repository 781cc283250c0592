"""Click requests and the masks that they were answered with, recorded so that a rewrite can be compared voxel by voxel.

``fixtures/clicks/requests.json`` holds the requests in their order, ``fixtures/clicks/replies.npz`` one bit a voxel of
every reply; ``fixtures/make_click_replies.py`` makes both again. Requests go through the app of ``apps/aslseg``, as
MONAI Label passes them on, so that nothing inside it takes part in the recording.

Three things make the replies the same on every machine:

* bfloat16 is off: processors that compute in it give other masks (:func:`without_bfloat16`).
* No reply ends before its object is complete: the settings give growing a million seconds, and no slice is encoded
  ahead in the background.
* One thread, so that sums have one order.

What remains is the order of sums within oneDNN's kernels, which differs between instruction sets (AVX2, AVX-512) and
may move a probability across 0.5: :func:`differing` says how many voxels that concerns.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 - the library's own abbreviation
import torch

from aslseg.volume.phantom import make_phantom

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "apps" / "aslseg"
FOLDER = Path(__file__).parent / "fixtures" / "clicks"
REQUESTS, REPLIES = FOLDER / "requests.json", FOLDER / "replies.npz"
SEED = 991  # no phantom of SAM's pre-training has this seed
CONF = {
    "device": "cpu",
    "threads": "1",
    "first_round": "false",
    "first_click_seconds": "1e6",
    "click_seconds": "1e6",
    "prefetch_slices": "0",
    "embedding_disk_gb": "0",
    "min_free_gb": "0",
}
RECORDED = ("source", "label_names", "repaired", "growing")  # of what a client gets beside the mask


def scans() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Id to scan (i, j, k) int16 HU, its affine, and its class map: 1 liver, 2 tumour.

    ``plain`` is stored in RAS order and ``masked`` too; ``turned`` has its axes in another order, two of them reversed;
    ``thin`` is a single slice with oblong pixels.
    """
    found = {}
    for case, (name, shape) in enumerate(
        {"plain": (64, 64, 24), "turned": (64, 56, 20), "thin": (72, 72, 24), "masked": (64, 60, 22)}.items()
    ):
        volume, classes = make_phantom(SEED, case, shape=shape)
        array, affine = np.rint(volume.array).astype(np.int16), volume.affine
        if name == "turned":
            array, classes, affine = _turned(array, classes, affine)
        if name == "thin":
            k = int((classes > 0).sum((0, 1)).argmax())
            array, classes = array[:, ::2, k : k + 1], classes[:, ::2, k : k + 1]
            affine = affine @ np.diag([1.0, 2.0, 1.0, 1.0])
        found[name] = np.ascontiguousarray(array), affine, np.ascontiguousarray(classes)
    return found


def _turned(array: np.ndarray, classes: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same scan with its axes stored as (k, i, j), the first and the last reversed."""
    order = (2, 0, 1)
    array, classes = (a.transpose(order)[::-1, :, ::-1] for a in (array, classes))
    affine = affine[:, [*order, 3]].copy()
    for axis in (0, 2):
        affine[:, 3] += affine[:, axis] * (array.shape[axis] - 1)
        affine[:, axis] *= -1
    return array, classes, affine


def automatic_mask(classes: np.ndarray) -> np.ndarray:
    """A mask with faults to repair: the truth moved by three voxels, its lowest slices missing, and a false blob."""
    mask = np.roll(classes, (3, -2), (0, 1))
    mask[..., : int(np.flatnonzero((classes > 0).any((0, 1)))[0]) + 3] = 0
    mask[6:14, 20:30, 8:12] = 1
    return mask


def write_studies(folder: Path) -> str:
    """Write the scans, and the automatic mask of ``masked``; returns a hash of all voxels."""
    digest = hashlib.sha256()
    (folder / "labels" / "original").mkdir(parents=True)
    for name, (array, affine, classes) in scans().items():
        nib.save(nib.Nifti1Image(array, affine), folder / f"{name}.nii.gz")
        digest.update(array.tobytes())
        if name == "masked":
            mask = automatic_mask(classes)
            # after its scan: an older mask counts as that of another scan
            nib.save(nib.Nifti1Image(mask, affine), folder / "labels" / "original" / f"{name}.nii.gz")
            digest.update(mask.tobytes())
    return digest.hexdigest()


@contextmanager
def without_bfloat16() -> Iterator[None]:
    """Torch says that this processor has no bfloat16, and computes with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mock.patch.object(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", return_value=False):
            yield
    finally:
        torch.set_num_threads(threads)


def app(studies: Path, models: Path, **conf: str) -> Any:
    """The app as MONAI Label builds it, in this process; no reply depends on how busy the machine is."""
    from aslseg.serving import clicks

    clicks.RUN_SECONDS = 1e6
    return _main().Aslseg(str(APP), str(studies), CONF | {"model_dir": str(models)} | conf)


def _main() -> ModuleType:
    spec = importlib.util.spec_from_file_location("aslseg_app_main", APP / "main.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask(served: Any, request: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """Mask (i, j, k) uint8 and what else a client is told.

    Args:
        served: From :func:`app`.
        request: ``model``, ``image``, ``client`` and ``params``, as in the recorded file.
    """
    client = {"client": request["client"], "client_id": request["client"]}
    reply = served.infer({**request["params"], "model": request["model"], "image": request["image"], **client})
    path = Path(reply["file"])
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).transpose(2, 1, 0)
    path.unlink()
    told = json.loads(json.dumps(reply["params"]))
    return mask, {k: told[k] for k in RECORDED if k in told}


def packed(mask: np.ndarray) -> np.ndarray:
    """One bit a voxel."""
    return np.packbits(mask.astype(bool))


def unpacked(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The mask again, bool."""
    return np.unpackbits(bits, count=int(np.prod(shape))).astype(bool).reshape(shape)


def differing(mask: np.ndarray, recorded: np.ndarray) -> tuple[int, int]:
    """How many voxels differ, and how many may: 0.05 % of the object, or one, on account of the instruction set."""
    return int((mask.astype(bool) != recorded).sum()), max(1, int(5e-4 * recorded.sum()))
