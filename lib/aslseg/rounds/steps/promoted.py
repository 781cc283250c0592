"""Promoted cases as a training learns them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from aslseg.cases.prepare import LESIONS_KEPT, Spacing, lesions_may_vanish, save_array
from aslseg.cases.prepared_case import Prepared
from aslseg.rounds.steps.artefacts import ArtefactStore
from aslseg.settings import Settings


@dataclass(frozen=True)
class Promoted:
    """A promoted case on the working grid, and the hashes of what it was made from.

    ``confidence`` is empty where all voxels are equally certain or their certainty was not kept. ``unknown`` are the
    nested labels of which the case says nothing.
    """

    case: Prepared
    image: str
    mask: str
    disagreement: str
    confidence: str = ""
    unknown: tuple[str, ...] = ()

    @property
    def key(self) -> list[str]:
        """What a training step depends on."""
        more = [*filter(None, [self.confidence]), *(f"unknown: {name}" for name in self.unknown)]
        return [self.case.id, self.image, self.mask, self.disagreement, *more]


def promoted_case(
    case: Prepared,
    details: dict[str, Any],
    settings: Settings,
    spacing: Spacing,
    artefacts: ArtefactStore,
    kept: Callable[[str], np.ndarray],
) -> Promoted:
    """A promoted case from its kept files, memory-mapped; training decides how much of it is held in memory.

    Args:
        case: The unlabelled case.
        details: ``sha256`` of its mask; ``disagreement``: of the map where both networks disagree;
            ``confidence``: of the map from :func:`aslseg.rounds.steps.artefacts.confidence`, which is kept
            only where ``uncertainty_weight`` is less than 1; ``unknown``: nested labels of which it says nothing.
        settings: Labels and weights.
        spacing: Of the round's working grid.
        artefacts: Where label and weights on this grid are kept.
        kept: Gives a map on the scan's own grid, (i, j, k), by its hash.
    """
    s, labels = settings, settings.label_set
    confidence = details.get("confidence", "") if s.uncertainty_weight < 1 else ""
    inputs = {
        **{k: details[k] for k in ("image", "sha256", "disagreement")},
        "spacing": spacing,
        "settings": [*s.model_dump(include={"labels", "nested"}).values(), s.disagreement_weight],
    }
    if confidence:
        inputs |= {"confidence": confidence, "uncertainty_weight": s.uncertainty_weight}
    unknown = tuple(n for n in details.get("unknown", ()) if n in labels.names)
    if unknown:
        inputs |= {"unknown": unknown}
    if lesions_may_vanish(case.grid, s):
        inputs |= {"lesions": LESIONS_KEPT}
    folder = artefacts.folder("promoted", inputs)
    # checkpoints know an array by the name of its file (aslseg.cases.prepared_case.backing_file)
    label, weight = (folder / f"{folder.name}.{part}.npy" for part in ("label", "weight"))
    if not (label.exists() and weight.exists()):
        differ = case.grid.to_working(kept(details["disagreement"]))
        weights = 1 - (1 - s.disagreement_weight) * differ
        if confidence:
            certain = case.grid.to_working(kept(confidence)) / 255
            weights *= 1 - (1 - s.uncertainty_weight) * (1 - certain)
        save_array(weight, weights.astype(np.float16))
        mask = kept(details["sha256"]).astype(np.uint8)
        save_array(label, labels.mark_unknown(case.grid.label_to_working(mask, labels), unknown))
    learned = replace(
        case,
        label=np.load(label, mmap_mode="r"),
        weight=s.promote_weight,
        voxel_weight=np.load(weight, mmap_mode="r"),
    )
    return Promoted(learned, details["image"], details["sha256"], details["disagreement"], confidence, unknown)
