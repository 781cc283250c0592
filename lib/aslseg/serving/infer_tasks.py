"""The models that annotators see, as MONAI Label inference tasks."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
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
from aslseg.rounds.ledger.ledger import Ledger, Score
from aslseg.rounds.steps.predictions import find_prediction
from aslseg.serving.cascade_cache import CascadeCache
from aslseg.serving.inference_request import InferenceRequest
from aslseg.serving.labels import decode_label
from aslseg.serving.replies import chosen_labels, reply
from aslseg.serving.stored_masks import stored_mask
from aslseg.types import Labels, Volume
from aslseg.volume.geometry import Grid
from aslseg.volume.io import read_header

logger = logging.getLogger(__name__)


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
        times = {"start": time.perf_counter()}
        if not self.is_valid():
            raise NoModelError(
                f"{request.model}: its models are not there yet; run a round (trainer 'round' or "
                "`aslseg round`) first. Model 'sam' works meanwhile"
            )
        class_map, affine, more = self.mask(request.path, request, times)
        more = {"models": {k: h[:12] for k, h in self.scans.models.hashes().items()}} | more
        shown = self.shown(class_map, request)
        return reply(shown, affine, request.params, self.result_labels(request), times, **more)

    def shown(self, class_map: np.ndarray, request: InferenceRequest) -> np.ndarray:
        """The part of a class map (i, j, k), uint8, that the client asked for."""
        return chosen_labels(class_map, request.params.label_prompt, self.scans.models.settings.label_set)

    def result_labels(self, request: InferenceRequest) -> dict[str, int]:
        """Names of the values in the mask, contiguous from 1."""
        return self.scans.models.settings.label_set.values

    def mask(
        self, path: Path, request: InferenceRequest, times: dict[str, float]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Class map (i, j, k) uint8 on the scan's own grid, its affine, and what else to send to the client."""
        scan = self.scans.open(path, times)
        regions = self.scans.stage(scan, self.kind, times)
        labels = self.scans.models.settings.label_set
        return _native(scan.grid, regions, labels, times), scan.grid.affine, _noted(scan.notes)


class CascadeTask(MaskTask):
    """The whole cascade; the mask that the last round stored is served at once while its models are current."""

    def mask(
        self, path: Path, request: InferenceRequest, times: dict[str, float]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """As :meth:`MaskTask.mask`."""
        stored = self._stored(request.case, path, times) if request.case and not request.params.prompts else None
        if stored is not None:
            mask, about = stored
            return mask.array, mask.affine, {"source": "stored", **about}
        class_map, affine, more = super().mask(path, request, times)
        return class_map, affine, {"source": "computed", **more}

    def _stored(self, case: str, image: Path, times: dict[str, float]) -> tuple[Volume, dict[str, Any]] | None:
        """The mask that a round has stored for a scan, and what else to send to the client."""
        models = self.scans.models
        sidecar = models.paths.home / "original" / f"{case}.json"
        start = time.perf_counter()
        try:
            about = json.loads(sidecar.read_text())
            if about["models"] != models.hashes():
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        found = stored_mask(models.paths, case, image)
        times["read"] = time.perf_counter() - start
        return None if found is None else (found, _noted(about.get("notes")))


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
            return super().mask(path, request, times) if refined is None else refined
        labels = self.scans.models.settings.label_set
        scan = self.scans.open(path, times)
        shape = np.broadcast_to(np.float32(0), scan.grid.native_shape)
        drawn = decode_label(request.label_file, Volume(shape, scan.grid.affine), None, labels)
        start = time.perf_counter()
        working = labels.regions(scan.grid.label_to_working(drawn, labels))
        regions = self.scans.adapt(scan, working)
        times["adapter"] = time.perf_counter() - start
        return _native(scan.grid, regions, labels, times), scan.grid.affine, {"source": "label"}

    def _refined(
        self, case: str, path: Path, times: dict[str, float]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]] | None:
        """As :meth:`mask`, from what the round that ranked the scan has kept."""
        models, start = self.scans.models, time.perf_counter()
        score, ssl = _score(models, case), models.published(ModelKind.SSL)
        if score is None or ssl is None:
            return None
        found = find_prediction(ModelKind.ADAPTER, score, self._hashes(path), models.paths, models.settings)
        spacing = read_metadata(ssl.path).get("spacing")
        grid = Grid.of(read_header(path), tuple(spacing) if spacing else None)
        if found is None or found.regions.shape[1:] != grid.shape:
            return None
        times["read"] = time.perf_counter() - start
        mask = _native(grid, found.regions, models.settings.label_set, times)
        return mask, grid.affine, {"source": "stored", **_noted(found.notes)}


def _noted(notes: Iterable[str] | None) -> dict[str, Any]:
    """Notes as the client gets them; nothing where there are none."""
    return {"notes": list(notes)} if notes else {}


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
