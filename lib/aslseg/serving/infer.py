"""The models that annotators see, as MONAI Label inference tasks."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from aslseg.cases.studies import ORIGINAL
from aslseg.compute.weights import read_metadata
from aslseg.errors import AslsegError, LedgerError, NoModelError
from aslseg.files import FileHashes
from aslseg.models.kinds import ModelKind
from aslseg.models.loaded import Models
from aslseg.rounds.ledger import Ledger, Score
from aslseg.rounds.predictions import find_prediction
from aslseg.serving.cascade_cache import CascadeCache
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.labels import decode_label
from aslseg.serving.params import InferenceParams, validate_params
from aslseg.serving.results import write_result
from aslseg.settings import Paths, Settings
from aslseg.types import Labels, Volume
from aslseg.volume.geometry import Grid
from aslseg.volume.io import read_header, read_image

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
        return _native(scan.grid, regions, self.scans.models.settings.label_set, times), scan.grid.affine, more


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
        sidecar = models.paths.home / "original" / f"{case}.json"
        start = time.perf_counter()
        try:
            if json.loads(sidecar.read_text())["models"] != models.hashes():
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        found = stored_mask(models.paths, case, image)
        times["read"] = time.perf_counter() - start
        return found


def stored_mask(paths: Paths, case: str, image: Path) -> Volume | None:
    """The mask that clients show for a scan (tag ``original``), uint8; None without one that was made for this file."""
    if paths.studies is None:
        return None
    label = paths.studies / "labels" / ORIGINAL / f"{case}.nii.gz"
    try:
        if image.stat().st_mtime_ns > label.stat().st_mtime_ns:
            return None
        stored = read_image(label)
    except (AslsegError, OSError):
        return None
    return Volume(stored.array.astype(np.uint8), stored.affine)


def without_model(request: InferenceRequest, settings: Settings, paths: Paths) -> dict[str, Any]:
    """The answer to a request without a model: the stored mask of the scan, or an empty one.

    3D Slicer asks so by itself on the next sample while no automatic model is published. It then shows what comes in
    place of the mask that it has loaded, so both must be the same.

    Raises:
        BadImageError: The scan cannot be read.
    """
    start, scan = time.perf_counter(), read_header(request.path)
    stored = stored_mask(paths, request.case, request.path) if request.case else None
    if stored is None or stored.array.shape != scan.array.shape:
        stored = None
    class_map = np.zeros(scan.array.shape, np.uint8) if stored is None else stored.array
    file = write_result(class_map, scan.affine, request.params.result_extension, request.params.result_compress)
    params = {
        "label_names": settings.label_set.values,
        "latencies": {"total": round(time.perf_counter() - start, 3)},
        "source": "nothing stored" if stored is None else "stored",
    }
    return {"label": str(file), "tag": request.params.label_tag, "file": str(file), "params": params}


class AdapterTask(MaskTask):
    """The adaptation network on SAM's mask, or on the mask that the client sends along (``label``).

    What a round has refined is not computed again, as long as its SAM and its adaptation network are published. The SSL
    network may have been retrained since.
    """

    def __init__(self, scans: CascadeCache, kind: ModelKind, needs: tuple[ModelKind, ...], description: str) -> None:
        super().__init__(scans, kind, needs, description)
        self._hashes = FileHashes()

    def mask(
        self, path: Path, request: InferenceRequest, times: dict[str, float]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """As :meth:`MaskTask.mask`."""
        if request.label_file is None:
            refined = self._refined(request.case, path, times) if request.case else None
            return super().mask(path, request, times) if refined is None else (*refined, {"source": "stored"})
        labels = self.scans.models.settings.label_set
        scan = self.scans.open(path, times)
        shape = np.broadcast_to(np.float32(0), scan.grid.native_shape)
        drawn = decode_label(request.label_file, Volume(shape, scan.grid.affine), None, labels)
        start = time.perf_counter()
        working = labels.regions(scan.grid.label_to_working(drawn, labels))
        regions = self.scans.adapt(scan, working)
        times["adapter"] = time.perf_counter() - start
        return _native(scan.grid, regions, labels, times), scan.grid.affine, {"source": "label"}

    def _refined(self, case: str, path: Path, times: dict[str, float]) -> tuple[np.ndarray, np.ndarray] | None:
        """Class map (i, j, k) on the scan's grid and its affine, from what the round that ranked the scan has kept."""
        models, start = self.scans.models, time.perf_counter()
        score, ssl = _score(models, case), models.published(ModelKind.SSL)
        if score is None or ssl is None:
            return None
        regions = find_prediction(ModelKind.ADAPTER, score, self._hashes(path), models.paths, models.settings)
        spacing = read_metadata(ssl.path).get("spacing")
        grid = Grid.of(read_header(path), tuple(spacing) if spacing else None)
        if regions is None or regions.shape[1:] != grid.shape:
            return None
        times["read"] = time.perf_counter() - start
        return _native(grid, regions, models.settings.label_set, times), grid.affine


def _score(models: Models, case: str) -> Score | None:
    """The score of a scan, if the SAM and the adaptation network that it was measured with are published."""
    try:
        ledger = Ledger(models.paths.ledger)
        score = _scores(ledger.path, ledger.last_seq(("scored",))).get(case)
    except LedgerError:
        return None
    published = models.hashes()
    made_with = score.details.get("models", {}) if score else {}
    same = all(kind in published and made_with.get(kind) == published[kind] for kind in ("sam", "adapter"))
    return score if same else None


@lru_cache(maxsize=1)
def _scores(path: Path, last: int) -> dict[str, Score]:
    """The scores of all scans, read again only when there are others."""
    return {score.case: score for score in Ledger(path).scores()}


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


def _native(grid: Grid, regions: np.ndarray, labels: Labels, times: dict[str, float]) -> np.ndarray:
    start = time.perf_counter()
    class_map = grid.regions_to_native(regions, labels)
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
