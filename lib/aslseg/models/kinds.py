"""The kinds of model that a round trains."""

from __future__ import annotations

from enum import StrEnum


class ModelKind(StrEnum):
    """What a model file holds, as its metadata and the manifest name it."""

    SSL = "ssl"
    """The semi-supervised network: a scan to class probabilities."""
    SAM = "sam"
    """SAM, fine-tuned; redraws the masks of the SSL network."""
    ADAPTER = "adapter"
    """The adaptation network; refines what SAM has drawn."""
    CANVAS = "canvas"
    """SAM fine-tuned on stitched slices (CFR); needs no prompts."""


PUBLISHED_KINDS = (ModelKind.SSL, ModelKind.SAM, ModelKind.ADAPTER)
"""The kinds that are served, each after the ones that it is built on."""
