"""Small volumes, prompts and sessions for the tests of the click code."""

from __future__ import annotations

from typing import Any

import numpy as np

from aslseg.prompts.from_client import ClientPrompt, parse
from aslseg.sam.clicks.session import ClickSession
from aslseg.sam.modeling.build import SAMModel
from aslseg.sam.predictor.slice_predictor import SlicePredictor
from aslseg.settings import Settings

SHAPE = (40, 32, 9)
TUBE_SHAPE = (40, 32, 20)
Voxels = list[list[int]]


def clicks(foreground: Voxels | None = None, background: Voxels | None = None, **more: object) -> ClientPrompt:
    """Clicks on a volume of 40 x 32 x 9 voxels."""
    return parse({"foreground": foreground or [], "background": background or [], **more}, SHAPE)


def through(foreground: Voxels | None = None, background: Voxels | None = None, **more: object) -> ClientPrompt:
    """Clicks on a volume of 40 x 32 x 20 voxels."""
    return parse({"foreground": foreground or [], "background": background or [], **more}, TUBE_SHAPE)


def session(model: SAMModel, volume: np.ndarray, automatic: np.ndarray | None = None, **settings: Any) -> ClickSession:
    """A session that enlarges nothing: on so small slices everything is small."""
    chosen = Settings(**{"sam_zoom": 0, "sam_batch": 2, "device": "cpu", **settings})
    return ClickSession(SlicePredictor(model, volume, chosen), automatic)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Of two masks, bool."""
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))
