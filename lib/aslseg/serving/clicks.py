"""The models `sam` and `sam_2d`: from the clicks and the box of an annotator to the object, or to one slice of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from monailabel.interfaces.tasks.infer_v2 import InferType

from aslseg.compute.byte_lru import ByteLRU
from aslseg.models.kinds import ModelKind
from aslseg.models.loaded import Models
from aslseg.prompts.from_client import SIZES, ClientPrompt, parse
from aslseg.serving.background import Background
from aslseg.serving.cascade_cache import CascadeCache
from aslseg.serving.click_surroundings import Surroundings, SurroundingsFinder
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.infer_tasks import MaskTask
from aslseg.serving.inference_request import InferenceRequest
from aslseg.serving.open_scans import OpenScan, ScanCache
from aslseg.serving.stored_masks import StoredMasks
from aslseg.volume.segments import label_value

if TYPE_CHECKING:
    from aslseg.sam.clicks.propagation import Propagation
    from aslseg.sam.clicks.session import ClickSession
    from aslseg.sam.predictor.embeddings import EmbeddingCache

# time for a reply to OHIF, whose annotators press Run once all clicks are made and are not shown what grows later
RUN_SECONDS = 5.0
SESSION_BYTES = 500_000_000
GROWING = (
    "the object is not whole yet and grows on: press Update to see more of it, and again before you submit it, until "
    "this message is gone"
)
TOO_LARGE = (
    "{area} pixels on the clicked slice are more than a {label} plausibly has; click once more, outside the {label} "
    "where the answer is too large, or send size: smaller"
)
TOO_SMALL = (
    "{area} pixels on the clicked slice are less than a {label} plausibly has; click once more, inside the {label} "
    "where the answer is too small, or send size: larger"
)


class ClickSessions:
    """State that the click models share: open scans, embeddings, and the session of each annotator on each object.

    Args:
        models: Settings, paths and SAM.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        self.scans = ScanCache(models.settings)
        self.background = Background()
        self._sessions: ByteLRU[tuple[object, ...], ClickSession] = ByteLRU(SESSION_BYTES, _bytes)
        self.stored = StoredMasks(models.settings, models.paths)
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

    @property
    def bytes(self) -> int:
        """Memory of the sessions."""
        return self._sessions.bytes

    def session(self, opened: OpenScan, around: Surroundings, owner: tuple[object, ...]) -> ClickSession:
        """The session of one annotator on one object of one scan, which nobody else gets.

        Args:
            opened: The scan.
            around: What is known around the object.
            owner: Object and annotator.
        """
        from aslseg.sam.clicks.session import ClickSession
        from aslseg.sam.predictor.slice_predictor import SlicePredictor

        model, cache = self.models.get(ModelKind.SAM), self.cache
        self.background.pause_in(model.sam.image_encoder)
        key = (opened.key, opened.orientation, model.fingerprint, *owner, around.key)
        with self._lock:
            found = self._sessions.get(key)
            if found is None:
                predictor = SlicePredictor(model, opened.source, self.models.settings, cache)
                automatic = around.automatic.make() if around.automatic is not None else None
                found = ClickSession(predictor, automatic, around.nested, around.allowed())
            self._sessions.put(key, found)
        return found

    def prefetch(self, session: ClickSession, k: int) -> None:
        """Encode the slices around slice k in the background, the nearest first."""
        predictor, reach = session.predictor, self.models.settings.prefetch_slices
        around = [s for n in range(1, reach + 1) for s in (k + n, k - n)]
        waiting = iter([s for s in around if 0 <= s < predictor.depth])

        def step() -> bool:
            wanted = next((s for s in waiting if not predictor.is_embedded(s)), None)
            if wanted is not None:
                predictor.embed([wanted])
            return wanted is not None

        self.background.add(step, session)


def _bytes(sessions: Collection[ClickSession]) -> int:
    """Bytes that sessions keep in memory; a scan or an automatic mask that several of them share counts once."""
    shared = {id(s.predictor.source.volume): s.predictor.source.volume.nbytes for s in sessions}
    shared |= {id(s.automatic.array): s.automatic.array.nbytes for s in sessions if s.automatic is not None}
    return sum(shared.values()) + sum(s.bytes for s in sessions)


class ClickTask(MaskTask):
    """Whole object in 3-D, value 1, replaced at every click; usable before anything is trained.

    Args:
        scans: Shared with the other models.
        sessions: Shared by the click models.
        description: Shown to annotators.
        dimension: 3, or 2 for one slice along the scan's third axis.
    """

    def __init__(self, scans: CascadeCache, sessions: ClickSessions, description: str, dimension: int = 3) -> None:
        super().__init__(scans, ModelKind.SAM, (), description)
        self.type, self.dimension, self.sessions = InferType.DEEPGROW, dimension, sessions
        self._finder = SurroundingsFinder(scans, sessions.stored)
        self._config.update(use_ssl=scans.models.settings.use_ssl, respect_existing=True, size=list(SIZES))
        if dimension == 3:
            self._config.update(whole=False)

    def is_valid(self) -> bool:
        """Listed where there is a SAM: a published one, the one of the settings, or the one that ships."""
        from aslseg.sam.modeling.build import base_path

        models = self.scans.models
        return models.published(ModelKind.SAM) is not None or base_path(models.settings).is_file()

    def shown(self, class_map: np.ndarray, request: InferenceRequest) -> np.ndarray:
        """The whole map: it holds one object, whatever its label."""
        return class_map

    def result_labels(self, request: InferenceRequest) -> dict[str, int]:
        """The one object, under the name that the client gave."""
        return {self._label(request) or self.scans.models.settings.label_set.names[0]: 1}

    def _label(self, request: InferenceRequest) -> str | None:
        """The label that is clicked: by its name, or as vista3d's class prompt."""
        if request.params.label:
            return request.params.label
        names, classes = self.scans.models.settings.label_set.names, request.params.label_prompt or [0]
        return names[int(classes[0]) - 1] if 1 <= int(classes[0]) <= len(names) else None

    def _prompt(self, request: InferenceRequest, shape: tuple[int, int, int]) -> ClientPrompt:
        """The prompt of a client with its label, under the name that the settings have.

        Raises:
            BadPromptError: As :func:`aslseg.prompts.from_client.parse`.
            BadLabelError: The clicked segment is none of the labels, so that it could not be saved.
            RefusedError: The same clicks are foreground and background.
        """
        label, labels = self._label(request), self.scans.models.settings.label_set
        known = labels.names[label_value(label, labels) - 1] if label else None
        prompt = replace(parse(request.params.prompts, shape), label=known)
        if len(prompt.foreground) and np.array_equal(prompt.foreground, prompt.background):
            raise RefusedError(
                "the same clicks came as foreground and as background; in OHIF choose the object's row again (not "
                "background) before Run"
            )
        return prompt

    def mask(
        self, path: Path, request: InferenceRequest, times: dict[str, float]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """As :meth:`aslseg.serving.infer_tasks.MaskTask.mask`; without clicks the automatic mask redrawn by SAM."""
        with self.sessions.background.click():
            start = time.perf_counter()
            opened = self.sessions.scans.open(path, native=self.dimension == 2)
            times["pre"] = time.perf_counter() - start
            prompt = self._prompt(request, opened.orientation.shape)
            around = self._finder.find(path, opened, prompt, request)
            if around.prompt.empty and not around.submitted:
                return self._automatic(path, opened, around, times)
            return self._clicked(opened, around, request, times)

    def _automatic(
        self, path: Path, opened: OpenScan, around: Surroundings, times: dict[str, float]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        native = np.zeros(opened.orientation.shape, np.uint8, order="F")
        index = self._index(around.prompt)
        if index is not None and self.scans.models.published(ModelKind.SSL) is not None:
            scan = self.scans.open(path, times)
            found = self.scans.stage(scan, ModelKind.SAM, times)[index]
            native = (scan.grid.to_native(found) >= 0.5).astype(np.uint8)
            if around.finished is not None:
                opened.orientation.view(native)[around.finished()] = 0
        source = "automatic mask" if native.any() else "nothing clicked"
        return native, opened.affine, {"source": source, "notes": [*around.prompt.notes, *around.notes]}

    def _clicked(
        self, opened: OpenScan, around: Surroundings, request: InferenceRequest, times: dict[str, float]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        start = time.perf_counter()
        prompt = around.prompt
        session = self.sessions.session(opened, around, (prompt.label, request.client, self.dimension))
        asked = opened.orientation.prompt(prompt)
        if request.params.undo:
            asked = session.without_last(asked, request.params.undo)
        native = np.zeros(opened.orientation.shape, np.uint8, order="F")
        out = opened.orientation.view(native)
        notes = [*prompt.notes, *around.notes]
        source = "submitted mask" if asked.empty else "clicks"
        more: dict[str, Any] = {"source": source, "notes": notes, "repaired": around.automatic is not None}
        inside = asked.foreground
        if self.dimension == 2:
            k = self._draw_slice(session, asked, request, out)
            if k is not None:
                inside = inside[inside[:, 2] == k]
        else:
            more |= self._draw_object(session, asked, request, out, opened)
            if more["growing"]:
                more["notes"].append(GROWING)
        if around.nested:
            more["notes"] += _size_notes(session, asked, out)
        # the clicked voxels themselves are in or out, even where SAM's coarser mask says otherwise
        out[tuple(inside.T)] = 1
        out[tuple(asked.background.T)] = 0
        times["infer"] = time.perf_counter() - start
        return native, opened.affine, more

    def _draw_slice(
        self, session: ClickSession, prompt: ClientPrompt, request: InferenceRequest, out: np.ndarray
    ) -> int | None:
        """Draw the slice that the prompt is about into ``out``; returns it, or None without a prompt."""
        found = session.on_slice(prompt)
        if found is None:
            return None
        k, out[..., found[0]] = found
        if not request.temporary:
            self.sessions.prefetch(session, k)
        return k

    def _draw_object(
        self,
        session: ClickSession,
        prompt: ClientPrompt,
        request: InferenceRequest,
        out: np.ndarray,
        opened: OpenScan,
    ) -> dict[str, Any]:
        """Draw as much of the object into ``out`` as there is time for; the rest is drawn in the background."""
        # only OHIF sends this key
        min_seconds = RUN_SECONDS if request.params.restore_label_idx is not None else 0.0
        whole = request.temporary or bool(request.params.whole)
        grown = session.draw(prompt, time_limited=not whole, min_seconds=min_seconds)
        growing = not grown.done
        for k in grown.slices():
            mask = grown.mask(k)
            if mask is not None:
                out[..., k] = mask
        current = session.current_slice(prompt)
        if current is not None and not request.temporary:
            self.sessions.prefetch(session, current)
        if growing:  # added last: the newest job comes first
            self.sessions.background.add(lambda: not grown.cancelled and grown.advance(), grown)
        return {"growing": growing, "stopped": _stops(grown, opened)}

    def _index(self, prompt: ClientPrompt) -> int | None:
        """The index of the label that is asked for; None where it could be any of several."""
        names = self.scans.models.settings.label_set.names
        if prompt.label in names:
            return names.index(prompt.label)
        return 0 if len(names) == 1 else None


def _size_notes(session: ClickSession, prompt: ClientPrompt, out: np.ndarray) -> list[str]:
    """What to do where a nested object has no plausible size on the slice that was clicked last."""
    k = session.current_slice(prompt)
    if k is None or prompt.size is not None:
        return []
    area, predictor = int(out[..., k].sum()), session.predictor
    if area > session.allowed.plausible_area(k, predictor.shape):
        return [TOO_LARGE.format(label=prompt.label, area=area)]
    if area * predictor.scale**2 < predictor.settings.min_component:
        return [TOO_SMALL.format(label=prompt.label, area=area)]
    return []


def _stops(grown: Propagation, opened: OpenScan) -> list[dict[str, Any]]:
    """Where the object ended and why, in slices of the scan."""
    axis = opened.orientation.axes[2]
    return [
        {"axis": axis, "slice": opened.orientation.scan_slice(stop.k), "reason": stop.reason.value}
        for stop in sorted(grown.stops, key=lambda stop: (stop.k, stop.step))
    ]
