"""How long the model of a fold is trained. Imports nothing, so that benchmarks need no more than the engine."""

from __future__ import annotations

SHARED_STEPS, LEAST_SHARE = 2.0, 0.5
"""All folds together train for so many times the steps of the SSL training, but each for at least this part of them."""


def fold_share(parts: int) -> float:
    """Part of the SSL training's steps for which the model of each of so many folds is trained.

    Shorter trainings find a little less, so that out-of-fold Dice is rather too low than too high.
    """
    return min(1.0, max(LEAST_SHARE, SHARED_STEPS / parts)) if parts else 0.0
