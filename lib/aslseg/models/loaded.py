"""Models in memory: loaded by kind, and replaced when a round publishes better ones."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aslseg.adaptation import predict as adaptation
from aslseg.errors import NoModelError
from aslseg.models.kinds import PUBLISHED_KINDS, ModelKind
from aslseg.models.published import Published, find_published
from aslseg.sam.cfr import canvas
from aslseg.sam.modeling import build as sam
from aslseg.settings import Paths, Settings
from aslseg.ssl import predict as ssl

LOADERS: dict[ModelKind, Callable[[Path, Settings], Any]] = {
    ModelKind.SSL: ssl.load,
    ModelKind.SAM: sam.load,
    ModelKind.ADAPTER: adaptation.load,
    ModelKind.CANVAS: canvas.load,
}


def load_model(kind: ModelKind, path: Path, settings: Settings) -> Any:
    """Load a model file.

    Raises:
        BadWeightsError: The file is damaged, of another kind, or made for other labels.
    """
    return LOADERS[kind](path, settings)


class Models:
    """At most one published model of each kind, found by the manifest's hash. Safe to share between threads.

    Args:
        settings: Device and labels.
        paths: Where models are published.
    """

    def __init__(self, settings: Settings, paths: Paths) -> None:
        self.settings, self.paths = settings, paths
        self._locks = {kind: threading.Lock() for kind in PUBLISHED_KINDS}
        self._loaded: dict[ModelKind, tuple[str, Any]] = {}

    def published(self, kind: ModelKind) -> Published | None:
        """The manifest's entry, or None. Reads a small JSON file; loads nothing."""
        return find_published(self.paths, kind)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each published model by kind."""
        found = {kind.value: self.published(kind) for kind in PUBLISHED_KINDS}
        return {kind: entry.sha256 for kind, entry in found.items() if entry}

    def get(self, kind: ModelKind) -> Any:
        """The current model, loaded.

        Raises:
            NoModelError: No model of this kind is published. For ``sam`` the file of the settings, or the SAM that
                ships with ASLseg, is loaded instead.
            BadWeightsError: The file is damaged or made for other labels.
        """
        entry = self.published(kind)
        if entry is None and kind != ModelKind.SAM:
            raise NoModelError(f"no {kind} model yet; run a round (trainer 'round' or `aslseg round`) first")
        digest, path = (entry.sha256, entry.path) if entry else ("pretrained", sam.base_path(self.settings))
        with self._locks[kind]:
            known, model = self._loaded.get(kind, ("", None))
            if known != digest:
                self._loaded.pop(kind, None)
                model = load_model(kind, path, self.settings)
                self._loaded[kind] = (digest, model)
            return model
