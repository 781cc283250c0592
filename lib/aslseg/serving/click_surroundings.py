"""What is known about a scan around the object that is clicked on: its automatic mask, its parent, its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aslseg.cases.studies import FINAL, ORIGINAL, PSEUDO
from aslseg.files import sha256
from aslseg.models.kinds import ModelKind
from aslseg.prompts.from_client import ClientPrompt
from aslseg.serving.cascade_cache import CascadeCache
from aslseg.serving.inference_request import InferenceRequest
from aslseg.serving.labels import decode_label
from aslseg.serving.open_scans import OpenScan
from aslseg.serving.stored_masks import Key, StoredMasks
from aslseg.types import Labels, Volume

if TYPE_CHECKING:
    from aslseg.sam.clicks.allowed_region import AllowedRegion
    from aslseg.sam.clicks.automatic_mask import AutomaticMask


BLOCKED = (
    "{count} click(s) on a finished object were left out; to draw over it untick respect_existing, or correct it under "
    "its own label"
)
OUTSIDE = "a click lies outside the mask of {parent}, which therefore does not limit this {label}"


@dataclass(frozen=True)
class Mask:
    """A mask of one object, with a key that changes with it.

    Attributes:
        key: Equal for equal masks.
        make: Returns it, on the slices of the scan.
    """

    key: object
    make: Callable[[], AutomaticMask]


@dataclass(frozen=True)
class Surroundings:
    """What a session on an object is made from.

    Attributes:
        prompt: The prompt without clicks on finished objects, in voxels of the scan.
        nested: Whether the label has a parent.
        automatic: The mask that clicks repair, or None.
        parent: The mask of the object around it, or None.
        submitted: Whether the automatic mask is what was submitted or promoted.
        finished: Returns the objects of other labels that nothing is drawn over, bool (i, j, k) on the slices of the
            scan; or None.
        kept: Alike for those of this label.
        key: Changes with the others but for the prompt.
        notes: For the annotator.
    """

    prompt: ClientPrompt
    nested: bool = False
    automatic: Mask | None = None
    parent: Mask | None = None
    submitted: bool = False
    finished: Callable[[], np.ndarray] | None = None
    kept: Callable[[], np.ndarray] | None = None
    key: tuple[object, ...] = ()
    notes: tuple[str, ...] = ()

    def allowed(self) -> AllowedRegion:
        """Where the object may lie."""
        from aslseg.sam.clicks.allowed_region import AllowedRegion

        parent = self.parent.make() if self.parent is not None else None
        return AllowedRegion(parent, *(made() if made is not None else None for made in (self.finished, self.kept)))


@dataclass(frozen=True, eq=False)
class _Asked:
    """A request about a label.

    Attributes:
        path: The scan.
        opened: The scan.
        request: As it came.
        index: Of the label.
        use_ssl: Whether automatic masks count.
    """

    path: Path
    opened: OpenScan
    request: InferenceRequest
    index: int
    use_ssl: bool

    def mask(self, key: object, array: Callable[[], np.ndarray]) -> Mask:
        """A mask from an array (i, j, k) on the grid of the scan."""
        from aslseg.sam.clicks.automatic_mask import AutomaticMask

        turn, shape = self.opened.orientation, self.opened.source.shape
        return Mask(key, lambda: AutomaticMask(turn.view(array()), shape))


class SurroundingsFinder:
    """Finds what is known around an object. Nothing is computed that takes long: a click does not wait for a network.

    Args:
        scans: Automatic masks in memory.
        stored: Masks in the studies folder.
    """

    def __init__(self, scans: CascadeCache, stored: StoredMasks) -> None:
        self.scans, self.stored = scans, stored

    def find(self, path: Path, opened: OpenScan, prompt: ClientPrompt, request: InferenceRequest) -> Surroundings:
        """The surroundings of the object that a prompt is about.

        Args:
            path: The scan.
            opened: The scan.
            prompt: In voxels of the scan, with the name of its label.
            request: ``respect_existing``, ``use_ssl``, the case, and a label that came with it.

        Raises:
            BadLabelError: The label that came with the request does not fit the scan.
        """
        labels, params, settings = self._labels, request.params, self.scans.models.settings
        if prompt.label not in labels.names:
            return Surroundings(prompt)
        use_ssl = settings.use_ssl if params.use_ssl is None else params.use_ssl
        asked = _Asked(path, opened, request, labels.names.index(prompt.label), use_ssl)
        existing = self._existing(asked)
        found = Surroundings(prompt, labels.parents[asked.index] is not None)
        if existing is not None and params.respect_existing:
            found = self._beside(found, asked, *existing)
        if found.automatic is None and use_ssl:
            found = replace(found, automatic=self._automatic(asked, asked.index))
        found = self._inside(found, asked, existing)
        return replace(found, key=(*found.key, *(m and m.key for m in (found.automatic, found.parent)), found.nested))

    @property
    def _labels(self) -> Labels:
        return self.scans.models.settings.label_set

    def _existing(self, asked: _Asked) -> tuple[Key, np.ndarray] | None:
        """The class map that came with the request, or else what was submitted or promoted; and a key for it."""
        file, opened = asked.request.label_file, asked.opened
        if file is not None:
            image = Volume(np.broadcast_to(np.float32(0), opened.orientation.shape), opened.affine)
            return (sha256(file),), decode_label(file, image, None, self._labels)
        found = (self.stored.find(asked.path, asked.request.case, opened, tag) for tag in (FINAL, PSEUDO))
        return next((one for one in found if one is not None), None)

    def _beside(self, found: Surroundings, asked: _Asked, key: Key, class_map: np.ndarray) -> Surroundings:
        """Separate what is clicked on from what is finished: other labels, and objects of this one without a click.

        Those of this label are the mask that is repaired, so that a reply holds them. Its outer objects are none of
        the finished ones: it lies in them.
        """
        value, outer, prompt = asked.index + 1, self._with_parents(asked.index), found.prompt
        values = class_map[tuple(prompt.foreground.T)]
        blocked = (values > 0) & ~np.isin(values, outer)
        notes = found.notes
        if blocked.any():
            notes += (BLOCKED.format(count=int(blocked.sum())),)
            prompt = replace(prompt, foreground=prompt.foreground[~blocked])
        own = value in self.stored.values(key, class_map)
        hit: list[int] | None = None
        if own and prompt.box is None:
            components = self.stored.components(key, class_map, value)
            hit = np.unique(components[tuple(np.concatenate([prompt.foreground, prompt.background]).T)]).tolist()

        def finished() -> np.ndarray:
            return asked.opened.orientation.view((class_map > 0) & ~np.isin(class_map, outer))

        def kept() -> np.ndarray:
            components = self.stored.components(key, class_map, value)
            return asked.opened.orientation.view(~np.isin(components, [0, *(hit or ())]))

        automatic = asked.mask((key, "submitted"), lambda: self.stored.region(key, class_map, [value])) if own else None
        known = (key, tuple(hit or ()), hit is None)
        return replace(
            found,
            prompt=prompt,
            automatic=automatic,
            submitted=own,
            finished=finished,
            kept=kept if hit is not None else None,
            key=known,
            notes=notes,
        )

    def _inside(self, found: Surroundings, asked: _Asked, existing: tuple[Key, np.ndarray] | None) -> Surroundings:
        """With the parent's mask, unless a click lies outside it: then it is wrong there, and does not count."""
        index = self._labels.parents[asked.index]
        if index is None:
            return found
        parent = None
        if existing is not None:
            key, class_map = existing
            members = self._labels.members(index)
            if self.stored.values(key, class_map).intersection(members):
                parent = asked.mask((key, index), lambda: self.stored.region(key, class_map, members))
        if parent is None and asked.use_ssl:
            parent = self._automatic(asked, index)
        if parent is None:
            return found
        limit = replace(found, parent=parent, finished=None, kept=None).allowed()
        if limit.holds(asked.opened.orientation.points(found.prompt.foreground)).all():
            return replace(found, parent=parent)
        note = OUTSIDE.format(parent=self._labels.names[index], label=self._labels.names[asked.index])
        return replace(found, notes=(*found.notes, note))

    def _automatic(self, asked: _Asked, index: int) -> Mask | None:
        """The automatic mask of a label: the SSL model's where that is in memory, else the stored one."""
        from aslseg.sam.clicks.automatic_mask import AutomaticMask

        opened = asked.opened
        known = self.scans.known(asked.path, ModelKind.SSL)
        if known is not None:
            key, regions = known
            array = opened.orientation.of_working(regions[index])
            return Mask((key, index), lambda: AutomaticMask(array, opened.source.shape))
        stored = self.stored.find(asked.path, asked.request.case, opened, ORIGINAL)
        if stored is None:
            return None
        key, class_map = stored
        members = self._labels.members(index)
        return asked.mask((key, index), lambda: self.stored.region(key, class_map, members))

    def _with_parents(self, index: int) -> list[int]:
        """Values of a label and of all that it lies in."""
        found, at = [index + 1], self._labels.parents[index]
        while at is not None:
            found.append(at + 1)
            at = self._labels.parents[at]
        return found
