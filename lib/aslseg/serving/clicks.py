"""The models `sam` and `sam_2d`: an annotator's clicks and box to the whole object, or to it on one slice."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from monailabel.interfaces.tasks.infer_v2 import InferType

from aslseg.cases.studies import ORIGINAL
from aslseg.errors import AslsegError
from aslseg.models.kinds import ModelKind
from aslseg.models.loaded import Models
from aslseg.prompts.from_client import ClientPrompt, parse
from aslseg.serving.background import Background
from aslseg.serving.cascade_cache import CascadeCache
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.infer import MaskTask
from aslseg.serving.open_scans import OpenScan, ScanCache, file_key
from aslseg.volume.io import read_image

if TYPE_CHECKING:
    from aslseg.sam.clicks.session import ClickSession
    from aslseg.sam.predictor.embeddings import EmbeddingCache
    from aslseg.sam.predictor.slices import Region

KEPT_BYTES = 500_000_000
# time for an answer to OHIF, whose annotators press Run after all clicks and see nothing of an object that still grows
RUN_SECONDS = 5.0


class ClickSessions:
    """What the click models share: opened scans, embeddings, and each annotator's answers on each object.

    Args:
        models: Settings, paths and SAM.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        self.pictures = ScanCache(models.settings)
        self.background = Background()
        self._clicks: OrderedDict[tuple[object, ...], ClickSession] = OrderedDict()
        self._stored: OrderedDict[tuple[object, ...], np.ndarray] = OrderedDict()
        self._cache: EmbeddingCache | None = None
        self._lock = threading.Lock()

    @property
    def cache(self) -> EmbeddingCache:
        """Embeddings in memory over those on disk."""
        from aslseg.sam.predictor.embedding_store import EmbeddingStore
        from aslseg.sam.predictor.embeddings import EmbeddingCache

        settings = self.models.settings
        with self._lock:
            if self._cache is None:
                folder = self.models.paths.cache / "embeddings"
                store = EmbeddingStore(folder, settings.embedding_disk_gb * 1e9) if settings.embedding_disk_gb else None
                self._cache = EmbeddingCache(settings.embedding_memory_mb * 1e6, store)
            return self._cache

    def clicks(self, opened: OpenScan, region: Callable[[], Region] | None, whose: tuple[object, ...]) -> ClickSession:
        """The state of one annotator on one object of one scan, and with it of nobody else.

        Args:
            opened: The scan.
            region: Gives the automatic mask that is repaired, or None.
            whose: Object, annotator and where the automatic mask comes from.
        """
        from aslseg.sam.clicks.session import ClickSession

        model, cache = self.models.get(ModelKind.SAM), self.cache
        key = (opened.key, opened.turn, model.fingerprint, *whose)
        with self._lock:
            found = self._clicks.get(key)
            if found is None:
                found = ClickSession(model, opened.picture, self.models.settings, region and region(), cache)
            self._clicks[key] = found
            self._clicks.move_to_end(key)
            while len(self._clicks) > 1 and self._held() > KEPT_BYTES:
                self._clicks.popitem(last=False)
        return found

    def _held(self) -> int:
        """Bytes that the states keep in memory, each scan and automatic mask once."""
        states = list(self._clicks.values())
        shared = {id(c.picture.volume): c.picture.volume.nbytes for c in states}
        shared |= {id(c.region): c.region.array.nbytes for c in states if c.region is not None}
        return sum(shared.values()) + sum(c.bytes for c in states)

    def stored(self, path: Path, case: Any, opened: OpenScan) -> tuple[tuple[object, ...], np.ndarray] | None:
        """The automatic mask that clients show for a scan (tag ``original``), and its name; None without one."""
        studies = self.models.paths.studies
        if not isinstance(case, str) or studies is None:
            return None
        label = studies / "labels" / ORIGINAL / f"{case}.nii.gz"
        key = file_key(label)
        # a mask older than the scan was made for another one
        if len(key) == 1 or path.stat().st_mtime_ns > label.stat().st_mtime_ns:
            return None
        if key not in self._stored:
            try:
                array = read_image(label, self.models.settings.max_voxels).array.astype(np.uint8)
            except AslsegError:
                return None
            with self._lock:
                self._stored[key] = array
                while len(self._stored) > 4:
                    self._stored.popitem(last=False)
        found = self._stored.get(key)
        return None if found is None or found.shape != opened.turn.shape else (key, found)

    def prefetch(self, clicks: ClickSession, k: int) -> None:
        """Encode the slices around one in the background, nearest first."""
        reach = self.models.settings.prefetch_slices
        around = [s for n in range(1, reach + 1) for s in (k + n, k - n)]
        waiting = iter([s for s in around if 0 <= s < clicks.picture.shape[2]])

        def step() -> bool:
            wanted = next((s for s in waiting if not clicks.embedded(s)), None)
            if wanted is not None:
                clicks.embed([wanted])
            return wanted is not None

        self.background.add(step, clicks)


class ClickTask(MaskTask):
    """Whole object in 3-D, value 1, replaced at every click; usable before anything is trained.

    Args:
        scans: Shared with the other models.
        desk: Shared by the click models.
        description: Shown to annotators.
        dimension: 3, or 2 for one slice along the scan's third axis.
    """

    def __init__(self, scans: CascadeCache, desk: ClickSessions, description: str, dimension: int = 3) -> None:
        super().__init__(scans, ModelKind.SAM, (), description)
        self.type, self.dimension, self.desk = InferType.DEEPGROW, dimension, desk
        self._config.update(use_ssl=scans.models.settings.use_ssl)
        if dimension == 3:
            self._config.update(whole=False)

    def is_valid(self) -> bool:
        """Shown as long as there is a SAM: a published one, the one of the settings, or the one that ships."""
        from aslseg.sam.modeling.build import base_path

        models = self.scans.models
        return models.published(ModelKind.SAM) is not None or base_path(models.settings).is_file()

    def shown(self, class_map: np.ndarray, request: Mapping[str, Any]) -> np.ndarray:
        """All of it: there is one object, whatever its label."""
        return class_map

    def result_labels(self, request: Mapping[str, Any]) -> dict[str, int]:
        """The one object, under the name that the client gave."""
        return {self._label(request) or self.scans.models.settings.label_set.names[0]: 1}

    def _label(self, request: Mapping[str, Any]) -> str | None:
        """The label that is clicked: by its name, or as vista3d's class prompt."""
        if request.get("label"):
            return str(request["label"])
        names, classes = self.scans.models.settings.label_set.names, request.get("label_prompt") or [0]
        return names[int(classes[0]) - 1] if 1 <= int(classes[0]) <= len(names) else None

    def _prompt(self, request: Mapping[str, Any], shape: tuple[int, int, int]) -> ClientPrompt:
        """A client's prompt with its label.

        Raises:
            BadPromptError: As :func:`aslseg.prompts.from_client.parse`.
            RefusedError: The same clicks are foreground and background.
        """
        prompt = replace(parse(request, shape), label=self._label(request))
        if len(prompt.foreground) and np.array_equal(prompt.foreground, prompt.background):
            raise RefusedError(
                "the same clicks came as foreground and as background; in OHIF choose the object's row again (not "
                "background) before Run"
            )
        return prompt

    def mask(
        self, path: Path, request: Mapping[str, Any], times: dict[str, float]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """As :meth:`aslseg.serving.infer.MaskTask.mask`; without clicks SAM's redrawing of the automatic mask."""
        with self.desk.background.click():
            start = time.perf_counter()
            opened = self.desk.pictures.open(path, native=self.dimension == 2)
            times["pre"] = time.perf_counter() - start
            prompt = self._prompt(request, opened.turn.shape)
            if prompt.empty:
                return self._automatic(path, opened, prompt, times)
            return self._clicked(path, opened, prompt, request, times)

    def _automatic(
        self, path: Path, opened: OpenScan, prompt: ClientPrompt, times: dict[str, float]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        native = np.zeros(opened.turn.shape, np.uint8, order="F")
        index = self._index(prompt)
        if index is not None and self.scans.models.published(ModelKind.SSL) is not None:
            scan = self.scans.open(path, times)
            found = self.scans.stage(scan, ModelKind.SAM, times)[index]
            native = (scan.grid.to_native(found) >= 0.5).astype(np.uint8)
        source = "automatic mask" if native.any() else "nothing clicked"
        return native, opened.affine, {"source": source, "notes": list(prompt.notes)}

    def _clicked(
        self, path: Path, opened: OpenScan, prompt: ClientPrompt, request: Mapping[str, Any], times: dict[str, float]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        start = time.perf_counter()
        source, region = self._region(path, opened, prompt, request)
        whose = (prompt.label, request.get("client", ""), self.dimension, source)
        clicks = self.desk.clicks(opened, region, whose)
        asked = opened.turn.prompt(prompt)
        if request.get("undo"):
            asked = clicks.without_last(asked, int(request["undo"]))
        native = np.zeros(opened.turn.shape, np.uint8, order="F")
        out = opened.turn.view(native)
        kept = asked.foreground
        # a file that came with the request has another name the next time: what is done later helps nobody
        once = bool(request.get("once"))
        more: dict[str, Any] = {"source": "clicks", "notes": list(prompt.notes), "repaired": source is not None}
        if self.dimension == 2:
            found = clicks.on_slice(asked)
            if found is not None:
                k, out[..., found[0]] = found
                kept = asked.foreground[asked.foreground[:, 2] == k]
                if not once:
                    self.desk.prefetch(clicks, k)
        else:
            # only OHIF sends this key: its annotators press Run when they want to see something, not at every click
            least = RUN_SECONDS if "restore_label_idx" in request else 0.0
            answer = clicks.draw(asked, hurry=not (once or request.get("whole")), least=least)
            current = clicks.current(asked)
            more["growing"] = not answer.done
            for k in answer.slices():
                shown = answer.shown(k)
                if shown is not None:
                    out[..., k] = shown
            if current is not None and not once:
                self.desk.prefetch(clicks, current)  # after the object: the newest job comes first
            if more["growing"]:
                more["notes"].append("the object grows on; the next click or update shows more of it")
                self.desk.background.add(lambda: not answer.stopped and answer.advance(), answer)
        # a click is a promise: the voxel itself is in or out, whatever SAM says
        out[tuple(kept.T)] = 1
        out[tuple(asked.background.T)] = 0
        times["infer"] = time.perf_counter() - start
        return native, opened.affine, more

    def _region(
        self, path: Path, opened: OpenScan, prompt: ClientPrompt, request: Mapping[str, Any]
    ) -> tuple[object, Callable[[], Region] | None]:
        """Where the automatic mask of the clicked label comes from, and the way to it; None without or if not wanted.

        What the SSL model found if that is in memory, else the stored mask that clients show. Nothing is computed:
        a click does not wait for a whole volume.
        """
        from aslseg.sam.predictor.slices import Region

        labels = self.scans.models.settings.label_set
        if not request.get("use_ssl", self.scans.models.settings.use_ssl) or prompt.label not in labels.names:
            return None, None
        index = labels.names.index(prompt.label)
        known = self.scans.known(path, ModelKind.SSL)
        if known is not None:
            key, regions = known
            return key, lambda: Region(opened.turn.of_working(regions[index]), opened.picture.shape)
        stored = self.desk.stored(path, request.get("case"), opened)
        if stored is None:
            return None, None
        name, array = stored

        def region() -> Region:
            return Region(opened.turn.view(np.isin(array, labels.members(index))), opened.picture.shape)

        return name, region

    def _index(self, prompt: ClientPrompt) -> int | None:
        """The label that is asked for; None where it could be any of several."""
        names = self.scans.models.settings.label_set.names
        if prompt.label in names:
            return names.index(prompt.label)
        return 0 if len(names) == 1 else None
