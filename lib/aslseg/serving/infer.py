"""The models that annotators see, as MONAI Label inference tasks."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
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
from aslseg.serving.params import PROMPTS, validate_params
from aslseg.serving.results import write_result
from aslseg.types import Labels, Volume
from aslseg.volume.io import read_image, read_label

logger = logging.getLogger(__name__)


class Upload(str):
    """A file that the server itself wrote for this request. JSON cannot make one, so no client can name a path."""

    __slots__ = ()


class SessionUpload(Upload):
    """An upload that stays when the request is over, for those that follow in its session."""

    __slots__ = ()


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

    def __call__(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Answer a request that :func:`answer` has checked."""
        start = time.perf_counter()
        times: dict[str, float] = {}
        if not self.is_valid():
            raise NoModelError(
                f"{request.get('model')}: its models are not there yet; run a round (trainer 'round' or "
                "`aslseg round`) first. Model 'sam' works meanwhile"
            )
        class_map, affine, more = self.mask(Path(request["image"]), request, times)
        class_map = self.shown(class_map, request)
        written = time.perf_counter()
        path = write_result(
            class_map,
            affine,
            request.get("result_extension", ".nrrd"),
            bool(request.get("result_compress", True)),
        )
        times["write"] = time.perf_counter() - written
        times["total"] = time.perf_counter() - start
        result = {
            "label_names": self.result_labels(request),
            "latencies": {k: round(v, 3) for k, v in times.items()},
            "models": {k: h[:12] for k, h in self.scans.models.hashes().items()},
            **more,
        }
        return str(path), result

    def shown(self, class_map: np.ndarray, request: Mapping[str, Any]) -> np.ndarray:
        """What the client asked to see of a class map (i, j, k), uint8."""
        return _chosen(class_map, request.get("label_prompt"), self.scans.models.settings.label_set)

    def result_labels(self, request: Mapping[str, Any]) -> dict[str, int]:
        """Names of the values in the mask, contiguous from 1."""
        return self.scans.models.settings.label_set.values

    def mask(
        self, path: Path, request: Mapping[str, Any], times: dict[str, float]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Class map (i, j, k) uint8 on the scan's own grid, its affine, and what else to tell the client."""
        scan = self.scans.open(path, times)
        regions = self.scans.stage(scan, self.kind, times)
        more = {"notes": list(scan.notes)} if scan.notes else {}
        return _native(scan, regions, self.scans.models.settings.label_set, times), scan.grid.affine, more


class CascadeTask(MaskTask):
    """The whole cascade; the mask that the last round stored is served at once while its models are current."""

    def mask(
        self, path: Path, request: Mapping[str, Any], times: dict[str, float]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """As :meth:`MaskTask.mask`."""
        stored = self._stored(request.get("image_id"), path, times)
        if stored is not None:
            return stored.array, stored.affine, {"source": "stored"}
        class_map, affine, more = super().mask(path, request, times)
        return class_map, affine, {"source": "computed", **more}

    def _stored(self, case: str | None, image: Path, times: dict[str, float]) -> Volume | None:
        models = self.scans.models
        if case is None or models.paths.studies is None:
            return None
        sidecar = models.paths.home / "original" / f"{case}.json"
        path = models.paths.studies / "labels" / ORIGINAL / f"{case}.nii.gz"
        start = time.perf_counter()
        try:
            written = json.loads(sidecar.read_text())["models"]
            if written != models.hashes() or image.stat().st_mtime_ns > path.stat().st_mtime_ns:
                return None
            stored = read_image(path)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        times["read"] = time.perf_counter() - start
        return Volume(stored.array.astype(np.uint8), stored.affine)


class AdapterTask(MaskTask):
    """The adaptation network on SAM's mask, or on the mask that the client sends along (``label``)."""

    def mask(
        self, path: Path, request: Mapping[str, Any], times: dict[str, float]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """As :meth:`MaskTask.mask`."""
        given = request.get("label_file")
        if given is None:
            return super().mask(path, request, times)
        labels = self.scans.models.settings.label_set
        scan = self.scans.open(path, times)
        shape = np.broadcast_to(np.float32(0), scan.grid.native_shape)
        drawn = read_label(Path(given), Volume(shape, scan.grid.affine), labels)
        start = time.perf_counter()
        working = labels.regions(scan.grid.label_to_working(drawn, labels))
        regions = self.scans.adapt(scan, working)
        times["adapter"] = time.perf_counter() - start
        return _native(scan, regions, labels, times), scan.grid.affine, {"source": "label"}


def answer(tasks: Mapping[str, InferTask], request: dict[str, Any], store: Datastore) -> dict[str, Any]:
    """Check a request, run its task, and save the mask if asked.

    Args:
        tasks: By model name.
        request: ``model``, ``image`` (a scan's id, or an :class:`Upload`), optionally ``label`` (an Upload), and
            the client's parameters.
        store: Where ids are looked up.

    Returns:
        What MONAI Label's ``send_response`` expects: ``label``, ``tag``, ``file``, ``params``.

    Raises:
        AslsegError: With the message for the client.
    """
    model, image, label = request.get("model"), request.get("image"), request.get("label")
    task = tasks.get(model) if isinstance(model, str) else None
    if task is None:
        raise RefusedError(f"no model {str(model)[:80]!r}; there are {', '.join(tasks)}", 404)
    ours = ("model", "image", "client")
    inner = validate_params({k: v for k, v in request.items() if k not in ours and not isinstance(v, Upload)})
    inner |= {"model": model, "client": str(request.get("client", ""))}
    if isinstance(label, Upload):
        inner["label_file"] = str(label)
    if isinstance(image, Upload):
        inner["image"], inner["once"] = str(image), not isinstance(image, SessionUpload)
        inner.pop("save_label", None)
    elif isinstance(image, str) and image and (path := store.get_image_uri(image)):
        inner["image"], inner["case"] = path, image
        if not any(inner.get(k) is not None for k in PROMPTS):
            inner["image_id"] = image
    else:
        raise RefusedError(f"no scan {str(image)[:80]!r} here", 404)
    file, params = task(inner)
    saved = file
    tag = inner.get("label_tag", ORIGINAL)
    if inner.get("save_label"):
        saved = store.save_label(image, file, tag, {"model": model, "params": params})
    return {"label": saved, "tag": tag, "file": file, "params": params}


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
