"""The nouns that pass between the stages.

Conventions: arrays are indexed (i, j, k) as nibabel gives them; world coordinates are RAS millimetres; a class
map holds 0 for background and 1..N in the order of the ``labels`` setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

# report(done, total, **numbers to show); raises to stop the work
ProgressCallback = Callable[..., None]


def no_progress(done: int, total: int, **shown: Any) -> None:
    """A report that nobody reads."""


@dataclass(frozen=True)
class Labels:
    """Label names in the order of their values, and which lies inside which.

    A *region* is a label with everything nested in it: a tumour is part of its liver. SAM and the adaptation
    network work on regions (independent sigmoids); the SSL network works on exclusive classes (softmax).

    Attributes:
        names: N label names; value of ``names[n]`` is n + 1.
        parents: For each label the index of its parent, or None.
    """

    names: tuple[str, ...]
    parents: tuple[int | None, ...]

    @classmethod
    def parse(cls, names: str, nested: str = "") -> Labels:
        """From the settings ``labels`` and ``nested``.

        Raises:
            ValueError: Empty, repeated or reserved names, or a nesting that goes in a circle.
        """
        listed = tuple(n.strip() for n in names.split(",") if n.strip())
        if not listed or len(set(listed)) != len(listed):
            raise ValueError(f"labels: expected different names separated by commas, got {names!r}")
        reserved = {"background", "label", "image", "model", "roi", "device", "foreground", "slice"}
        for name in listed:
            if name.lower() in reserved:
                raise ValueError(f"labels: {name!r} has a meaning of its own in the clients; choose another name")
        parents: list[int | None] = [None] * len(listed)
        for pair in (p for p in nested.split(",") if p.strip()):
            child, colon, parent = (s.strip() for s in pair.partition(":"))
            if not colon:
                raise ValueError(f"nested: expected child:parent, got {pair!r}")
            if child in listed and parent in listed:
                if listed.index(parent) >= listed.index(child):
                    raise ValueError(f"nested: list {parent!r} before {child!r} in labels")
                parents[listed.index(child)] = listed.index(parent)
        return cls(listed, tuple(parents))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def values(self) -> dict[str, int]:
        """Name to value, contiguous from 1."""
        return {name: n + 1 for n, name in enumerate(self.names)}

    def members(self, region: int) -> list[int]:
        """Values that make up a region: its own and those of everything nested in it."""
        found = [region]
        for child, parent in enumerate(self.parents):
            if parent in found:
                found.append(child)
        return [n + 1 for n in found]

    def regions(self, class_map: np.ndarray) -> np.ndarray:
        """Class map (...) to region masks (N, ...), bool."""
        return np.stack([np.isin(class_map, self.members(n)) for n in range(len(self))])

    def region_probabilities(self, probabilities: np.ndarray) -> np.ndarray:
        """Softmax output (1 + N, ...) to region probabilities (N, ...), float32.

        The best class of the region against the best class outside it, p_in / (p_in + p_out): 0.5 is reached exactly
        where the argmax lies in the region. A plain sum would lose a small class that wins with less than half of the
        probability, as tumours do against liver and background. With one label it is the softmax output itself.
        """
        p = probabilities.astype(np.float32, copy=False)
        out = np.empty((len(self), *p.shape[1:]), np.float32)
        for n in range(len(self)):
            inside = self.members(n)
            best = p[inside].max(0)
            rival = p[[c for c in range(len(p)) if c not in inside]].max(0)
            out[n] = best / np.maximum(best + rival, 1e-12)
        return out

    def decode(self, regions: Iterable[np.ndarray]) -> np.ndarray:
        """Region probabilities or masks (N, ...) to a class map (...), uint8.

        A later (inner) label wins over an earlier one where both reach 0.5.

        Args:
            regions: One for each label; looked at one after the other, so that large ones need not exist at once.
        """
        out: np.ndarray | None = None
        for value, region in zip(self.values.values(), regions, strict=True):
            out = np.zeros(region.shape, np.uint8) if out is None else out
            out[region >= 0.5] = value
        assert out is not None  # noqa: S101 - there is at least one label
        return out


@dataclass(frozen=True)
class Volume:
    """A scan or a label in its own grid.

    Attributes:
        array: (i, j, k); float32 for scans, uint8 for labels.
        affine: 4 x 4, voxel index to RAS millimetres.
        notes: What was unusual about its header and how it was understood.
    """

    array: np.ndarray
    affine: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel edge lengths in millimetres along i, j, k."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)
