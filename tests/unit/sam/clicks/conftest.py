"""Sessions on small phantoms, with a SAM that draws what is bright."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from aslseg.cases.prepared_case import Prepared
from aslseg.sam.clicks.session import ClickSession
from aslseg.sam.modeling.build import SAMModel
from click_scenes import TUBE_SHAPE, session
from seeing_sam import Sees


@pytest.fixture
def scene(ball_case: Callable[..., Prepared], tiny: SAMModel) -> tuple[ClickSession, Sees, np.ndarray]:
    """A bright ball through nine slices of 40 x 32 pixels: session, SAM and truth."""
    case = ball_case(shape=(40, 32, 9), tumour=False)
    model = Sees(tiny)
    return session(model, case.image), model, np.asarray(case.label)


@pytest.fixture
def tube(tiny: SAMModel) -> ClickSession:
    """A bright column through 20 slices but number 12."""
    image = np.full(TUBE_SHAPE, 0.1, np.float32)
    image[8:26, 6:24] = 0.8
    image[..., 12] = 0.1
    return session(Sees(tiny), image)
