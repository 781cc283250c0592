"""Image embeddings kept in memory, so that a slice is encoded once."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from aslseg.sam.build import SAMModel
from aslseg.sam.predict import encode

LIMIT_BYTES = 500_000_000


def content_hash(image: np.ndarray) -> str:
    """A volume (any shape) named by its voxels."""
    return hashlib.sha256(np.ascontiguousarray(image).view(np.uint8).data).hexdigest()


class EmbeddingCache:
    """Least recently used embeddings leave first once a byte limit is passed. Safe between threads.

    Args:
        limit: Bytes; half-precision embeddings of the small SAM take 150 kB each.
    """

    def __init__(self, limit: int = LIMIT_BYTES) -> None:
        self.limit = limit
        self.bytes = 0
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, model: SAMModel, image: np.ndarray, slices: Sequence[int], key: Hashable) -> Tensor:
        """Embeddings (n, C, grid, grid) float32 of some slices; those not kept are encoded together.

        Args:
            model: SAM.
            image: (i, j, k) float32 in 0..1.
            slices: Indices k.
            key: What the embeddings depend on beside k: the content of the volume and the weights.
        """
        with self._lock:
            found = {k: self._kept[key, k] for k in slices if (key, k) in self._kept}
            for k in found:
                self._kept.move_to_end((key, k))
        wanted = [k for k in dict.fromkeys(slices) if k not in found]
        if wanted:
            fresh = encode(model, image[..., wanted]).to(torch.float16)
            found |= dict(zip(wanted, fresh, strict=True))
            self._keep(key, {k: found[k] for k in wanted})
        return torch.stack([found[k].float() for k in slices])

    def has(self, key: Hashable, k: int) -> bool:
        """Whether a slice's embedding is kept."""
        with self._lock:
            return (key, k) in self._kept

    def _keep(self, key: Hashable, fresh: dict[int, Tensor]) -> None:
        with self._lock:
            for k, embedding in fresh.items():
                if (key, k) not in self._kept:
                    self._kept[key, k] = embedding.clone()
                    self.bytes += embedding.nbytes
            while self.bytes > self.limit and len(self._kept) > 1:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes
