"""Image embeddings kept in memory and on disk, so that a slice is encoded once, whoever asks and how often."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from aslseg.compute.click_priority import awaiting
from aslseg.sam.modeling.build import SAMModel
from aslseg.sam.predictor.embedding_store import EmbeddingStore
from aslseg.sam.predictor.predict import encode

LIMIT_BYTES = 500_000_000


def slice_name(model: SAMModel, pixels: np.ndarray) -> str:
    """What an embedding depends on, in one name: the pixels that SAM is shown, its weights, size and preprocessing.

    The pixels stand for the volume, its window, the axis and the slice: another window is other pixels, and a scan
    that was replaced under its old name is another scan.

    Args:
        model: SAM.
        pixels: A slice (i, j) in 0..1.
    """
    told = json.dumps([model.fingerprint, asdict(model.architecture), pixels.shape], sort_keys=True)
    return hashlib.sha256(told.encode() + np.ascontiguousarray(pixels, np.float16).tobytes()).hexdigest()


class EmbeddingCache:
    """Half-precision embeddings; the least recently used leave memory past a byte limit. Safe between threads.

    Args:
        limit: Bytes in memory; embeddings of the small SAM take 150 kB each.
        store: Where they stay beyond memory, or None.
    """

    def __init__(self, limit: float = LIMIT_BYTES, store: EmbeddingStore | None = None) -> None:
        self.limit, self.store = limit, store
        self.bytes = 0
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._coming: dict[Hashable, Future[Tensor]] = {}
        self._lock = threading.Lock()

    def get(self, model: SAMModel, image: np.ndarray, slices: Sequence[int], key: Hashable) -> Tensor:
        """Embeddings (n, C, grid, grid) float32 of some slices; those not kept are encoded together.

        Args:
            model: SAM.
            image: (i, j, k) float32 in 0..1.
            slices: Indices k.
            key: What the embeddings depend on beside k: the volume and the weights.
        """
        return self.obtain(model, [(key, k) for k in slices], lambda n: image[..., slices[n]])

    def obtain(self, model: SAMModel, names: Sequence[Hashable], pixels: Callable[[int], np.ndarray]) -> Tensor:
        """Embeddings (n, C, grid, grid) float32 by name. What several threads want at once is encoded by one of them.

        Args:
            model: SAM.
            names: One for each slice; strings may be kept on disk.
            pixels: Gives the n-th slice (i, j) in 0..1 when it has to be encoded.

        Raises:
            RuntimeError: As torch, in every thread that waits for the slice.
        """
        found: dict[Hashable, Tensor] = {}
        mine: dict[Hashable, int] = {}
        theirs: dict[Hashable, Future[Tensor]] = {}
        with self._lock:
            for n, name in enumerate(names):
                if name in self._kept:
                    self._kept.move_to_end(name)
                    found[name] = self._kept[name]
                elif name in mine:
                    continue
                elif name in self._coming:
                    theirs[name] = self._coming[name]
                else:
                    mine[name] = n
                    self._coming[name] = Future()
        found |= self._fetch(model, mine, pixels)
        with awaiting() if theirs else nullcontext():
            found |= {name: future.result() for name, future in theirs.items()}
        return torch.stack([found[name].to(model.device, torch.float32) for name in names])

    def has(self, key: Hashable, k: int | None = None) -> bool:
        """Whether an embedding is at hand: ``key`` is a name, or with ``k`` the key of a volume."""
        name = key if k is None else (key, k)
        with self._lock:
            if name in self._kept:
                return True
        return self.store is not None and isinstance(name, str) and self.store.has(name)

    def _fetch(
        self, model: SAMModel, wanted: dict[Hashable, int], pixels: Callable[[int], np.ndarray]
    ) -> dict[Hashable, Tensor]:
        """From disk or by encoding, with word to those who wait."""
        try:
            found = {name: stored for name in wanted if (stored := self._stored(name)) is not None}
            missing = [name for name in wanted if name not in found]
            if missing:
                with torch.no_grad():
                    stack = np.stack([pixels(wanted[name]) for name in missing], -1)
                    fresh = encode(model, stack).to("cpu", torch.float16)
                found |= {name: one.clone() for name, one in zip(missing, fresh, strict=True)}
        except BaseException as error:
            with self._lock:
                for name in wanted:
                    self._coming.pop(name).set_exception(error)
            raise
        with self._lock:
            for name, embedding in found.items():
                self._kept[name] = embedding
                self.bytes += embedding.nbytes
                self._coming.pop(name).set_result(embedding)
            while self.bytes > self.limit and len(self._kept) > 1:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes
        for name in missing:
            if self.store is not None and isinstance(name, str):
                self.store.write(name, found[name].numpy())
        return found

    def _stored(self, name: Hashable) -> Tensor | None:
        if self.store is None or not isinstance(name, str):
            return None
        stored = self.store.read(name)
        return None if stored is None else torch.from_numpy(np.array(stored))
