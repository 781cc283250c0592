"""Image embeddings in memory and on disk, so that a slice is encoded once, whoever asks and how often."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from aslseg.compute.byte_lru import ByteLRU
from aslseg.compute.click_priority import waiting_for_background
from aslseg.sam.modeling.attention import use_fused_attention
from aslseg.sam.modeling.build import SAMModel
from aslseg.sam.predictor.embedding_store import EmbeddingStore

LIMIT_BYTES = 500_000_000


def encode_slices(model: SAMModel, slices: np.ndarray) -> Tensor:
    """Embeddings (n, C, grid, grid) float32 of the slices (i, j, n) of a volume in 0..1."""
    use_fused_attention(model.sam.image_encoder)
    stack = torch.from_numpy(np.ascontiguousarray(np.moveaxis(slices, -1, 0), np.float32))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.bf16):
        return model.encode(stack).float()


def slice_name(model: SAMModel, pixels: np.ndarray) -> str:
    """A hash of everything that an embedding depends on: the pixels that SAM is shown, its weights, its architecture.

    The pixels stand for the volume, its window, the axis and the slice: another window gives other pixels, and a scan
    that replaces another one under the same name has its own.

    Args:
        model: SAM.
        pixels: A slice (i, j) in 0..1.
    """
    described = json.dumps([model.fingerprint, model.architecture.to_metadata(), pixels.shape], sort_keys=True)
    return hashlib.sha256(described.encode() + np.ascontiguousarray(pixels, np.float16).tobytes()).hexdigest()


class EmbeddingCache:
    """Half-precision embeddings; past a byte limit the least recently used leave memory. Safe between threads.

    Args:
        limit: Bytes in memory; an embedding of the small SAM takes 150 kB.
        store: Keeps them on disk beyond memory, or None.
    """

    def __init__(self, limit: float = LIMIT_BYTES, store: EmbeddingStore | None = None) -> None:
        self.store = store
        self._kept: ByteLRU[Hashable, Tensor] = ByteLRU(limit, lambda kept: sum(e.nbytes for e in kept))
        self._pending: dict[Hashable, Future[Tensor]] = {}
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """Bytes that the embeddings take in memory."""
        return self._kept.bytes

    def embed(self, model: SAMModel, names: Sequence[Hashable], pixels: Callable[[int], np.ndarray]) -> Tensor:
        """Embeddings (n, C, grid, grid) float32 by name; those not kept are encoded together.

        An embedding that several threads want at once is computed by one of them.

        Args:
            model: SAM.
            names: One for each slice; only strings are kept on disk.
            pixels: Returns the n-th slice (i, j) in 0..1; called where it has to be encoded.

        Raises:
            RuntimeError: From torch, in every thread that waits for the slice.
        """
        found: dict[Hashable, Tensor] = {}
        mine: dict[Hashable, int] = {}
        theirs: dict[Hashable, Future[Tensor]] = {}
        with self._lock:
            for n, name in enumerate(names):
                kept = self._kept.get(name)
                if kept is not None:
                    found[name] = kept
                elif name in mine:
                    continue
                elif name in self._pending:
                    theirs[name] = self._pending[name]
                else:
                    mine[name] = n
                    self._pending[name] = Future()
        found |= self._compute(model, mine, pixels)
        with waiting_for_background() if theirs else nullcontext():
            found |= {name: future.result() for name, future in theirs.items()}
        return torch.stack([found[name].to(model.device, torch.float32) for name in names])

    def has(self, name: Hashable) -> bool:
        """Whether an embedding is in memory or on disk."""
        if name in self._kept:
            return True
        return self.store is not None and isinstance(name, str) and self.store.has(name)

    def _compute(
        self, model: SAMModel, wanted: dict[Hashable, int], pixels: Callable[[int], np.ndarray]
    ) -> dict[Hashable, Tensor]:
        """Read from disk or encode; threads that wait for the same names get the result or the error."""
        try:
            found = {name: stored for name in wanted if (stored := self._stored(name)) is not None}
            missing = [name for name in wanted if name not in found]
            if missing:
                with torch.no_grad():
                    stack = np.stack([pixels(wanted[name]) for name in missing], -1)
                    fresh = encode_slices(model, stack).to("cpu", torch.float16)
                found |= {name: one.clone() for name, one in zip(missing, fresh, strict=True)}
        except BaseException as error:
            with self._lock:
                for name in wanted:
                    self._pending.pop(name).set_exception(error)
            raise
        with self._lock:
            for name, embedding in found.items():
                self._kept.put(name, embedding)
                self._pending.pop(name).set_result(embedding)
        for name in missing:
            if self.store is not None and isinstance(name, str):
                self.store.write(name, found[name].numpy())
        return found

    def _stored(self, name: Hashable) -> Tensor | None:
        if self.store is None or not isinstance(name, str):
            return None
        stored = self.store.read(name)
        return None if stored is None else torch.from_numpy(np.array(stored))
