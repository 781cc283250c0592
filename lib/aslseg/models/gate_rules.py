"""When a new model replaces the published one: the rules, on differences of Dice of both on the same human labels.

What has changed since the published model decides what is asked (docs/science.md §6.7). New human labels are worth
more than promoted masks, so a model that learned from them is published unless it is shown to be worse; one that
learned only from other promoted masks has to show that it is better than the published one, and not below the first one
that learned these labels: of many nights' candidates the best on a few labels is too often only the luckiest.
Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

import numpy as np
from scipy.special import stdtrit

GAIN = 0.024
"""A model with other promoted masks is better if the mean of n differences is at least this, divided by n."""
FEWEST_LABELS = 3
"""With fewer labels nothing shows that it is better."""
LOSS, LOSS_ALPHA = 0.005, 0.01
"""Mean Dice by which it may be below the first model with the same human labels, and the level at which that is shown;
the n-th candidate since that model is held against the n-th part of the level."""
ALPHA = 0.1
"""Level of the one-sided test that shows that a model is worse."""
SPREAD, SPREAD_LABELS = 0.05, 4
"""Standard deviation of a difference that is assumed before any is seen, and how many labels this assumption counts."""


class Cause(StrEnum):
    """What has changed since the published model was trained."""

    MASKS = "masks"
    """Promoted masks or unlabelled scans, nothing that people decide."""
    LABELS = "labels"
    """Human labels, or people took back masks that the published model learned from."""
    SETTINGS = "settings"
    """Settings of the training alone; or the published model is of a version that did not note what it learned."""


def least_gain(count: int) -> float:
    """The mean difference that ``count`` labels ask of a model that learned only from other promoted masks."""
    return GAIN / count if count >= FEWEST_LABELS else math.inf


def shown_better(differences: Sequence[float]) -> bool:
    """Whether a model is better than the published one: the mean of n >= 3 differences is at least 0.024 / n.

    Args:
        differences: Dice of the new model minus Dice of the published one, one number a label.
    """
    return len(differences) >= FEWEST_LABELS and float(np.mean(differences)) >= least_gain(len(differences))


def least_since_first(differences: Sequence[float], tries: int) -> float:
    """The mean difference to the first model that shows that a candidate is at most :data:`LOSS` below it.

    It is t(1 - LOSS_ALPHA / tries, n - 1) s / sqrt(n) - LOSS, of the plain one-sided paired t test: a standard
    deviation that is assumed, as in :func:`shown_worse`, would let too much pass where the true one is larger.

    Args:
        differences: Dice of the candidate minus Dice of the first model with the same human labels, one number a label.
        tries: How many candidates were held against that model, this one included.
    """
    n = len(differences)
    if n < FEWEST_LABELS:
        return math.inf
    return float(-stdtrit(n - 1, LOSS_ALPHA / tries) * np.std(differences, ddof=1) / math.sqrt(n)) - LOSS


def shown_not_below(differences: Sequence[float], tries: int) -> bool:
    """Whether a candidate is shown to be at most :data:`LOSS` below the first model.

    Args:
        differences, tries: As for :func:`least_since_first`.
    """
    return len(differences) >= FEWEST_LABELS and float(np.mean(differences)) >= least_since_first(differences, tries)


def shown_worse(differences: Sequence[float]) -> bool:
    """Whether a model is worse than the published one: a one-sided paired t test at level :data:`ALPHA`.

    The variance of n differences d_i is (4 * 0.05^2 + sum (d_i - mean)^2) / (n + 3), with n + 3 degrees of freedom: as
    if four labels with a standard deviation of 0.05 had been seen before, so that one label alone shows what is clearly
    worse, and equal differences on two labels show nothing by being equal.

    Args:
        differences: As for :func:`shown_better`. Numbers that are not finite count as worse; none shows nothing.
    """
    if not len(differences):
        return False
    d = np.asarray(differences, float)
    freedom = len(d) + SPREAD_LABELS - 1
    variance = (SPREAD_LABELS * SPREAD**2 + ((d - d.mean()) ** 2).sum()) / freedom
    bound = stdtrit(freedom, ALPHA) * math.sqrt(variance / len(d))
    # so that nan is worse
    return not d.mean() >= bound
