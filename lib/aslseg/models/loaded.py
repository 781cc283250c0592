"""Published models in memory: loaded when first asked for, replaced when a round publishes better ones."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Literal

from aslseg.errors import NoModelError
from aslseg.models.published import Published, find_published
from aslseg.settings import Paths, Settings

Kind = Literal["ssl", "sam", "adapter"]
KINDS: tuple[Kind, ...] = ("ssl", "sam", "adapter")


class Models:
    """At most one model of each kind, found by the manifest's hash. Safe to share between threads.

    Args:
        settings: Device and labels.
        paths: Where models are published.
    """

    def __init__(self, settings: Settings, paths: Paths) -> None:
        self.settings, self.paths = settings, paths
        self._locks = {kind: threading.Lock() for kind in KINDS}
        self._loaded: dict[str, tuple[str, Any]] = {}

    def published(self, kind: Kind) -> Published | None:
        """The manifest's entry, or None. Reads a small JSON file; loads nothing."""
        return find_published(self.paths, kind)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each published model by kind."""
        found = {kind: self.published(kind) for kind in KINDS}
        return {kind: entry.sha256 for kind, entry in found.items() if entry}

    def get(self, kind: Kind) -> Any:
        """The current model, loaded.

        Raises:
            NoModelError: Nothing is published; for ``sam`` the one that ships is used then.
            BadWeightsError: The file is damaged or made for other labels.
        """
        entry = self.published(kind)
        if entry is None and kind != "sam":
            raise NoModelError(f"no {kind} model yet; run a round (trainer 'round' or `aslseg round`) first")
        key, path = (entry.sha256, entry.path) if entry else ("pretrained", None)
        with self._locks[kind]:
            known, model = self._loaded.get(kind, ("", None))
            if known != key:
                self._loaded.pop(kind, None)
                model = _load(kind, path, self.settings)
                self._loaded[kind] = (key, model)
            return model


def _load(kind: Kind, path: Path | None, settings: Settings) -> Any:
    if kind == "ssl" and path:
        from aslseg.ssl import predict as ssl

        return ssl.load(path, settings)
    if kind == "adapter" and path:
        from aslseg.adaptation import predict as adaptation

        return adaptation.load(path, settings)
    from aslseg.sam.modeling import build

    return build.load(path or build.base_path(settings), settings)
