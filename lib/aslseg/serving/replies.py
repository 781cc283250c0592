"""What Slicer and OHIF are sent: a mask on the scan's own grid, and the parameters beside it.

The mask's bytes are made in :mod:`aslseg.serving.mask_encoding`; which mask it is, in
:mod:`aslseg.serving.infer_tasks` and :mod:`aslseg.serving.clicks`.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask

from aslseg.serving.http_errors import RefusedError
from aslseg.serving.inference_request import InferenceRequest
from aslseg.serving.mask_encoding import nrrd
from aslseg.serving.params import InferenceParams
from aslseg.serving.stored_masks import stored_mask
from aslseg.settings import Paths, Settings
from aslseg.types import Labels
from aslseg.volume.io import read_header, write_label


def answer(tasks: Mapping[str, InferTask], request: InferenceRequest, store: Datastore) -> dict[str, Any]:
    """Run the task of a request, and save the mask in the datastore if asked.

    Args:
        tasks: By model name.
        request: The request.
        store: Where masks are saved.

    Returns:
        What MONAI Label's ``send_response`` expects: ``label``, ``tag``, ``file``, ``params``.

    Raises:
        AslsegError: With the message for the client.
    """
    task = tasks.get(request.model)
    if task is None:
        raise RefusedError(f"no model {request.model[:80]!r}; there are {', '.join(tasks)}", 404)
    file, result = task(request)
    saved, tag = file, request.params.label_tag
    if request.params.save_label and request.case:
        names = sorted(result["label_names"], key=result["label_names"].get)
        info = {"model": request.model, "params": result, "label_info": [{"name": name} for name in names]}
        saved = store.save_label(request.case, file, tag, info)
    return {"label": saved, "tag": tag, "file": file, "params": result}


def reply(
    class_map: np.ndarray,
    affine: np.ndarray,
    params: InferenceParams,
    labels: Mapping[str, int],
    seconds: Mapping[str, float],
    **more: Any,
) -> tuple[str, dict[str, Any]]:
    """Write a mask for a client; Slicer and OHIF are sent nothing but the two values that this returns.

    Args:
        class_map: (i, j, k) uint8 on the scan's own grid.
        affine: The scan's affine (RAS mm).
        params: Of the request: ``result_extension``, ``result_compress``.
        labels: Name to value in the mask.
        seconds: Of each step so far, with ``start``, the time.perf_counter() at which the request came.
        more: What else the client is sent: ``source``, ``notes``, ``models``, ``reason`` ...

    Returns:
        The file of the mask, and the parameters beside it: ``label_names``, ``latencies`` (seconds) and ``more``.
    """
    written = time.perf_counter()
    path = write_mask(class_map, affine, params.result_extension, params.result_compress)
    end = time.perf_counter()
    took = {k: v for k, v in seconds.items() if k != "start"} | {
        "write": end - written,
        "total": end - seconds["start"],
    }
    return str(path), {"label_names": dict(labels), "latencies": {k: round(v, 3) for k, v in took.items()}, **more}


def write_mask(class_map: np.ndarray, affine: np.ndarray, extension: str = ".nrrd", compress: bool = True) -> Path:
    """Write a mask into a temporary file, which the caller removes.

    OHIF reads the voxels and ignores the header, so the array is written as it is: never resampled or turned.

    Args:
        class_map: (i, j, k) uint8.
        affine: The scan's affine (RAS mm).
        extension: ``.nrrd``, ``.nii.gz`` or ``.nii``.
        compress: gzip inside NRRD.
    """
    handle, name = tempfile.mkstemp(prefix="aslseg-", suffix=extension)
    os.close(handle)
    path = Path(name)
    if extension == ".nrrd":
        path.write_bytes(nrrd(class_map.astype(np.uint8, copy=False), affine, compress))
    else:
        write_label(path, class_map, affine)
    return path


def chosen_labels(class_map: np.ndarray, wanted: Any, labels: Labels) -> np.ndarray:
    """OHIF's class prompts: only the listed values are shown, with what lies inside them."""
    if not wanted:
        return class_map
    values = {int(v) for v in wanted}
    unknown = sorted(values - set(range(1, len(labels) + 1)))
    if unknown:
        raise RefusedError(f"label_prompt: {unknown[:5]} are not among 1..{len(labels)}")
    return np.where(np.isin(class_map, sorted(values)), class_map, 0).astype(np.uint8)


def without_model(request: InferenceRequest, settings: Settings, paths: Paths) -> dict[str, Any]:
    """The answer to a request without a model: the stored mask of the scan, or an empty one.

    3D Slicer asks so by itself on the next sample while no automatic model is published. It then shows what comes in
    place of the mask that it has loaded, so both must be the same.

    Raises:
        BadImageError: The scan cannot be read.
    """
    seconds, scan = {"start": time.perf_counter()}, read_header(request.path)
    stored = stored_mask(paths, request.case, request.path) if request.case else None
    if stored is None or stored.array.shape != scan.array.shape:
        stored = None
    class_map = np.zeros(scan.array.shape, np.uint8) if stored is None else stored.array
    source = "nothing stored" if stored is None else "stored"
    file, result = reply(class_map, scan.affine, request.params, settings.label_set.values, seconds, source=source)
    return {"label": file, "tag": request.params.label_tag, "file": file, "params": result}
