"""The models that annotators see, as MONAI Label inference tasks."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from aslseg.cases.studies import ORIGINAL
from aslseg.errors import AslsegError, NoModelError
from aslseg.models.kinds import ModelKind
from aslseg.serving.cascade_cache import CachedScan, CascadeCache
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.labels import decode_label
from aslseg.serving.params import InferenceParams, validate_params
from aslseg.serving.results import write_result
from aslseg.types import Labels, Volume
from aslseg.volume.io import read_image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InferenceRequest:
    """What a client wants inferred, checked.

    Attributes:
        model: Name of the model.
        path: The scan: found by its id, or a file that the server itself wrote. No client can name a path.
        params: The client's parameters.
        case: Id of the scan in the datastore; None for an upload.
        label_file: A mask that was uploaded with the request.
        client: Who asks; two annotators never share the state of their clicks.
        temporary: The scan is deleted after this request, so that work for later requests is useless.
    """

    model: str
    path: Path
    params: InferenceParams
    case: str | None = None
    label_file: Path | None = None
    client: str = ""
    temporary: bool = False


def request_from_mapping(request: Mapping[str, Any], store: Datastore) -> InferenceRequest:
    """The request of a caller inside the server, as MONAI Label passes it on: one dictionary with everything.

    Args:
        request: ``model``, ``image`` (a scan's id), optionally ``client``, and parameters.
        store: Where the id is looked up.

    Raises:
        RefusedError: No such scan, or a parameter that is not allowed.
    """
    params = validate_params({k: v for k, v in request.items() if k not in ("model", "image", "client")})
    case = request.get("image")
    return InferenceRequest(
        str(request.get("model")), scan_path(store, case), params, case, client=str(request.get("client", ""))
    )


def scan_path(store: Datastore, case: Any) -> Path:
    """The file of a scan.

    Raises:
        RefusedError: There is no scan with this id.
    """
    path = store.get_image_uri(case) if isinstance(case, str) and case else ""
    if not path:
        raise RefusedError(f"no scan {str(case)[:80]!r} here", 404)
    return Path(path)


class MaskTask(InferTask):
    """A mask of all labels, computed by the stages up to ``kind``.

    Args:
        scans: Stages and their cache.
        kind: The last stage.
        needs: Models that must be published.
        description: Shown to annotators.
    """

    def __init__(self, scans: CascadeCache, kind: ModelKind, needs: tuple[ModelKind, ...], description: str) -> None:
        labels = scans.models.settings.label_set.values
        super().__init__(InferType.SEGMENTATION, labels, 3, description)
        self.scans, self.kind, self.needs = scans, kind, needs

    def is_valid(self) -> bool:
        """Shown to clients once its models are published."""
        return all(self.scans.models.published(kind) for kind in self.needs)

    def __call__(self, request: InferenceRequest) -> tuple[str, dict[str, Any]]:
        """Compute the mask and write it to a temporary file.

        Returns:
            The file, and what else is sent to the client.

        Raises:
            NoModelError: A model that is needed is not published.
        """
        start = time.perf_counter()
        times: dict[str, float] = {}
        if not self.is_valid():
            raise NoModelError(
                f"{request.model}: its models are not there yet; run a round (trainer 'round' or "
                "`aslseg round`) first. Model 'sam' works meanwhile"
            )
        class_map, affine, more = self.mask(request.path, request, times)
        class_map = self.shown(class_map, request)
        written = time.perf_counter()
        path = write_result(class_map, affine, request.params.result_extension, request.params.result_compress)
        times["write"] = time.perf_counter() - written
        times["total"] = time.perf_counter() - start
        result = {
            "label_names": self.result_labels(request),
            "latencies": {k: round(v, 3) for k, v in times.items()},
            "models": {k: h[:12] for k, h in self.scans.models.hashes().items()},
            **more,
        }
        return str(path), result

    def shown(self, class_map: np.ndarray, request: InferenceRequest) -> np.ndarray:
        """The part of a class map (i, j, k), uint8, that the client asked for."""
        return _chosen(class_map, request.params.label_prompt, self.scans.models.settings.label_set)

    def result_labels(self, request: InferenceRequest) -> dict[str, int]:
        """Names of the values in the mask, contiguous from 1."""
        return self.scans.models.settings.label_set.values

    def mask(
        self, path: Path, request: InferenceRequest, times: dict[str, float]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Class map (i, j, k) uint8 on the scan's own grid, its affine, and what else to send to the client."""
        scan = self.scans.open(path, times)
        regions = self.scans.stage(scan, self.kind, times)
        more = {"notes": list(scan.notes)} if scan.notes else {}
        return _native(scan, regions, self.scans.models.settings.label_set, times), scan.grid.affine, more


class CascadeTask(MaskTask):
    """The whole cascade; the mask that the last round stored is served at once while its models are current."""

    def mask(
        self, path: Path, request: InferenceRequest, times: dict[str, float]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """As :meth:`MaskTask.mask`."""
        stored = self._stored(request.case, path, times) if request.case and not request.params.prompts else None
        if stored is not None:
            return stored.array, stored.affine, {"source": "stored"}
        class_map, affine, more = super().mask(path, request, times)
        return class_map, affine, {"source": "computed", **more}

    def _stored(self, case: str, image: Path, times: dict[str, float]) -> Volume | None:
        models = self.scans.models
        if models.paths.studies is None:
            return None
        sidecar = models.paths.home / "original" / f"{case}.json"
        path = models.paths.studies / "labels" / ORIGINAL / f"{case}.nii.gz"
        start = time.perf_counter()
        try:
            written = json.loads(sidecar.read_text())["models"]
            if written != models.hashes() or image.stat().st_mtime_ns > path.stat().st_mtime_ns:
                return None
            stored = read_image(path)
        except (AslsegError, OSError, ValueError, KeyError, TypeError):
            return None
        times["read"] = time.perf_counter() - start
        return Volume(stored.array.astype(np.uint8), stored.affine)


class AdapterTask(MaskTask):
    """The adaptation network on SAM's mask, or on the mask that the client sends along (``label``)."""

    def mask(
        self, path: Path, request: InferenceRequest, times: dict[str, float]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """As :meth:`MaskTask.mask`."""
        if request.label_file is None:
            return super().mask(path, request, times)
        labels = self.scans.models.settings.label_set
        scan = self.scans.open(path, times)
        shape = np.broadcast_to(np.float32(0), scan.grid.native_shape)
        drawn = decode_label(request.label_file, Volume(shape, scan.grid.affine), None, labels)
        start = time.perf_counter()
        working = labels.regions(scan.grid.label_to_working(drawn, labels))
        regions = self.scans.adapt(scan, working)
        times["adapter"] = time.perf_counter() - start
        return _native(scan, regions, labels, times), scan.grid.affine, {"source": "label"}


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


class BatchInference:
    """Inference over many scans, one after the other, for MONAI Label's batch sub-process."""

    def __call__(
        self, request: Mapping[str, Any], datastore: Datastore, infer: Callable[..., dict[str, Any]]
    ) -> dict[str, Any]:
        """Save a mask for each scan.

        Args:
            request: ``model``; ``images``: all, labeled, unlabeled, or a list of ids; ``label_tag``.
            datastore: Where the masks go.
            infer: The app's ``infer``.

        Returns:
            Id to ``{"label"}`` or ``{"error"}``.
        """
        wanted = request.get("images", "all")
        lists = {"labeled": datastore.get_labeled_images, "unlabeled": datastore.get_unlabeled_images}
        cases = wanted if isinstance(wanted, list) else lists.get(wanted, datastore.list_images)()
        found: dict[str, Any] = {}
        for n, case in enumerate(sorted(map(str, cases))):
            one = {"model": request.get("model"), "image": case, "save_label": True}
            try:
                result = infer({**one, "label_tag": request.get("label_tag") or ORIGINAL}, datastore)
                Path(result["file"]).unlink(missing_ok=True)
                found[case] = {"label": result["label"]}
            except AslsegError as error:
                found[case] = {"error": str(error)}
            logger.info("%d / %d %s: %s", n + 1, len(cases), case, found[case])
        return found


def _native(scan: CachedScan, regions: np.ndarray, labels: Labels, times: dict[str, float]) -> np.ndarray:
    start = time.perf_counter()
    class_map = scan.grid.regions_to_native(regions, labels)
    times["post"] = time.perf_counter() - start
    return class_map


def _chosen(class_map: np.ndarray, wanted: Any, labels: Labels) -> np.ndarray:
    """OHIF's class prompts: only the listed values are shown, with what lies inside them."""
    if not wanted:
        return class_map
    values = {int(v) for v in wanted}
    unknown = sorted(values - set(range(1, len(labels) + 1)))
    if unknown:
        raise RefusedError(f"label_prompt: {unknown[:5]} are not among 1..{len(labels)}")
    return np.where(np.isin(class_map, sorted(values)), class_map, 0).astype(np.uint8)
