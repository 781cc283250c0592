"""What passes between the stages: labels, volumes and progress callbacks.

Conventions: arrays are indexed (i, j, k) as nibabel gives them; world coordinates are RAS millimetres; a class
map holds 0 for background and 1..N in the order of the ``labels`` setting.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aslseg.registry import suggest

# called with (done, total, **numbers to show); may raise to stop the work
ProgressCallback = Callable[..., None]


def no_progress(done: int, total: int, **shown: Any) -> None:
    """A progress callback that does nothing."""


# Parameters of the clients' requests (serving/params.py). A label's name is a parameter too, which holds its clicks.
_CLIENT_WORDS = """
background bundle_path client_id description device foreground gpus image image_path label label_info label_path
label_prompt label_tag logging model model_filename network path point_labels points reset_state respect_existing
restore_label_idx result_compress result_dtype result_extension result_write_to_file roi save_label session size slice
timeout train_ds undo use_ssl val_ds whole
"""
RESERVED_NAMES = frozenset(_CLIENT_WORDS.split())


def parse_names(text: str) -> tuple[str, ...]:
    """Label names from ``liver,tumour``.

    Raises:
        ValueError: None at all, names that differ in nothing but case, or a word of the clients' requests.
    """
    names = tuple(n.strip() for n in text.split(",") if n.strip())
    if not names or len({n.lower() for n in names}) != len(names):
        raise ValueError(f"labels: expected different names separated by commas, got {text!r}")
    for name in names:
        if name.lower() in RESERVED_NAMES or name.startswith("_"):
            raise ValueError(f"labels: {name!r} has a meaning of its own in the clients; choose another name")
    return names


def parse_nesting(text: str) -> tuple[tuple[str, str], ...]:
    """(child, parent) pairs from ``tumour:liver,cyst:liver``.

    Raises:
        ValueError: A part is no pair.
    """
    pairs = []
    for part in (p for p in text.split(",") if p.strip()):
        child, _, parent = (s.strip() for s in part.partition(":"))
        if not child or not parent:
            raise ValueError(f"nested: expected child:parent, got {part!r}")
        pairs.append((child, parent))
    return tuple(pairs)


@dataclass(frozen=True)
class Labels:
    """Label names in the order of their values, and which label lies inside which.

    A *region* is a label with everything nested in it: a tumour is part of its liver. SAM and the adaptation
    network work on regions (independent sigmoids); the SSL network works on exclusive classes (softmax).

    Attributes:
        names: N label names; value of ``names[n]`` is n + 1.
        parents: For each label the index of its parent, or None.
    """

    names: tuple[str, ...]
    parents: tuple[int | None, ...]

    @classmethod
    def of(cls, names: Sequence[str], nested: Iterable[tuple[str, str]] = ()) -> Labels:
        """From names and (child, parent) pairs.

        Raises:
            ValueError: A pair with an unknown label, a label with two parents, or a parent that is listed after its
                child.
        """
        listed = list(names)
        parents: list[int | None] = [None] * len(listed)
        for pair in nested:
            for name in pair:
                if name not in listed:
                    raise ValueError(f"nested: unknown label {name!r}; {suggest(name, listed)}")
            child, parent = map(listed.index, pair)
            if parent >= child:
                raise ValueError(f"nested: list {pair[1]!r} before {pair[0]!r} in labels")
            if parents[child] not in (None, parent):
                raise ValueError(f"nested: {pair[0]!r} has two parents; give the innermost one")
            parents[child] = parent
        return cls(tuple(listed), tuple(parents))

    @classmethod
    def parse(cls, names: str, nested: str = "") -> Labels:
        """From text as in the settings ``labels`` (``liver,tumour``) and ``nested`` (``tumour:liver``).

        Raises:
            ValueError: As :func:`parse_names`, :func:`parse_nesting` and :meth:`of`.
        """
        return cls.of(parse_names(names), parse_nesting(nested))

    @property
    def has_nested(self) -> bool:
        """Whether any label lies in another one."""
        return any(parent is not None for parent in self.parents)

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

    def ancestors(self, region: int) -> list[int]:
        """Indices of the labels in which one lies, the innermost first."""
        parent = self.parents[region]
        return [] if parent is None else [parent, *self.ancestors(parent)]

    def regions(self, class_map: np.ndarray) -> np.ndarray:
        """Class map (...) to region masks (N, ...), bool."""
        return np.stack([np.isin(class_map, self.members(n)) for n in range(len(self))])

    def merge(self, class_map: np.ndarray, names: Collection[str]) -> np.ndarray:
        """A class map in which some nested labels count as the label in which they lie, uint8.

        Args:
            class_map: (...), values 0..N.
            names: Labels that lie in another one.
        """
        table = np.arange(256, dtype=np.uint8)
        for n, (name, parent) in enumerate(zip(self.names, self.parents, strict=True)):
            if name in names and parent is not None:
                # a parent stands before its children, so its own entry is final
                table[n + 1] = table[parent + 1]
        return table[class_map]

    def mark_unknown(self, class_map: np.ndarray, names: Collection[str]) -> np.ndarray:
        """A class map that says nothing of some nested labels, uint8.

        A voxel of one of them, or of the label in which it lies, gets the value N + 1 + n: label n or anything nested
        in it. :func:`aslseg.compute.losses.merge_unknown` learns from such a map.

        Args:
            class_map: (...), values 0..N.
            names: Labels that lie in another one.
        """
        found = self.merge(class_map, names)
        for name in names:
            outer = self.parents[self.names.index(name)]
            if outer is not None:
                found[found == outer + 1] = len(self) + 1 + outer
        return found

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
            regions: One for each label, read one after the other, so that large ones need not be in memory at once.
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
