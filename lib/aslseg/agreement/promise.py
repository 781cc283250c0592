"""What can be promised of the masks that are promoted: a lower bound of their mean Dice, from audits.

An audit is a promoted scan that was drawn at random and then labelled by a person. From pairs of agreement a and true
Dice d, those of audits and those of human labels that the predicting network was not trained on, a line
f(a) = b0 + b1 log(1 - a) is fitted by least squares. The audits say how far the promoted masks lie from that line, and
with which uncertainty, and how often both networks share a gross mistake (docs/science.md 6.2). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

LEAST_PAIRS, LEAST_AUDITS = 9, 3
"""Fewer pairs or audits promise nothing."""
LEAST_DISAGREEMENT = 0.005
"""1 - a is not taken for smaller, so that log(1 - a) is finite."""
PRIOR_SD, PRIOR_WEIGHT = 0.05, 4
"""Standard deviation of the residuals before any audit, and how many residuals it counts for."""
GROSS, LOSS = 0.3, 0.6
"""Dice below the line from which a mask is a gross mistake, and what one costs where none was seen."""
MISTAKES, MASKS = 0.5, 40.0
"""How common gross mistakes are before any audit: Beta(0.5, 40), one in 81 masks on average."""
LARGEST_LEVERAGE = 0.9
HALVINGS, UNLIKELY, EXACT_COUNTS = 18, 1e-6, 32
"""Accuracy of the bound: halvings of an interval of one mistake's loss, probability of more mistakes that is neglected,
and up to this many mistakes every number of them is computed by itself."""


@dataclass(frozen=True)
class Pair:
    """How far the two networks agreed on one label of one scan, and how good the mask turned out to be.

    Attributes:
        case: The scan.
        agreement: Dice between the two networks' masks.
        dice: Dice between the mask that is (or would be) promoted and the human label.
        audited: Whether the scan was drawn at random from the promoted ones; otherwise it is a human label that the
            predicting network was not trained on.
    """

    case: str
    agreement: float
    dice: float
    audited: bool


@dataclass(frozen=True)
class DiceLine:
    """The fitted line, and what the audits say of it.

    Attributes:
        offset, slope: b0 and b1, from the pairs that are no gross mistakes.
        lowest: The lowest log(1 - a) of these pairs; the line is not extrapolated to better agreement.
        shift: Mean leave-one-out residual of the audits, in Dice.
        sd: Standard deviation of a residual.
        freedom: Degrees of freedom of ``sd``.
        audits: M, the audits that are no gross mistakes.
        audited: All audits.
        mistakes: Gross mistakes among all pairs.
        loss: What a gross mistake costs, in Dice.
        correlation: Of Dice and -log(1 - a); None where one of them is constant.
    """

    offset: float
    slope: float
    lowest: float
    shift: float
    sd: float
    freedom: int
    audits: int
    audited: int
    mistakes: int
    loss: float
    correlation: float | None

    def lower_bounds(self, agreements: Sequence[float], confidence: float) -> np.ndarray:
        """Lower confidence bounds LCB(k) of the mean Dice of the first k masks, for k = 1 to all of them.

        Args:
            agreements: Of masks, in the order in which they would be promoted.
            confidence: Probability with which the mean is at least the bound, in 0.5..1.

        Returns:
            (n,) Dice; empty without masks.
        """
        if not len(agreements):
            return np.zeros(0)
        x = np.maximum(_transformed(agreements), self.lowest)
        k = np.arange(1, len(x) + 1)
        mean = np.cumsum(self.offset + self.slope * x) / k + self.shift
        error = self.sd * np.sqrt(1 / self.audits + 1 / k)
        highest = mean - float(special.stdtrit(self.freedom, confidence)) * error
        counts, chances = _mistakes(k, MISTAKES + self.mistakes, MASKS + self.audited - self.mistakes)
        means = mean - self.loss * np.minimum(counts[:, None] / k, 1)
        # between the bounds where no mask is a mistake and where all are
        low, high = highest - self.loss, highest
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            holds = (chances * special.stdtr(self.freedom, (means - middle) / error)).sum(0) >= confidence
            low, high = np.where(holds, middle, low), np.where(holds, high, middle)
        return np.asarray(low)


def fit_line(pairs: Sequence[Pair]) -> DiceLine | None:
    """Fit the line and measure the audits against it.

    Args:
        pairs: Of one label, in any order.

    Returns:
        None with fewer than 9 pairs or 3 audits, or where no audit is left that is no gross mistake.
    """
    if missing_audits(pairs):
        return None
    x, dice = _transformed([p.agreement for p in pairs]), np.array([p.dice for p in pairs], float)
    audited = np.array([p.audited for p in pairs])
    kept = _without_gross(x, dice)
    ours = audited[kept]
    if not ours.any():
        return None
    offset, slope = _least_squares(x[kept], dice[kept])
    centred, spread = _centred(x[kept])
    leverage = 1 / kept.sum() + (centred**2 / spread if spread else 0)
    residuals = (dice[kept] - offset - slope * x[kept]) / (1 - np.minimum(leverage, LARGEST_LEVERAGE))
    of_audits, of_others = residuals[ours], residuals[~ours]
    squares = sum(float(((e - e.mean()) ** 2).sum()) for e in (of_audits, of_others) if len(e))
    freedom = PRIOR_WEIGHT - 1 + len(of_audits) + max(len(of_others) - 1, 0)
    below = offset + slope * x[~kept] + of_audits.mean() - dice[~kept]
    return DiceLine(
        offset=offset,
        slope=slope,
        lowest=float(x[kept].min()),
        shift=float(of_audits.mean()),
        sd=float(np.sqrt((PRIOR_WEIGHT * PRIOR_SD**2 + squares) / freedom)),
        freedom=freedom,
        audits=len(of_audits),
        audited=int(audited.sum()),
        mistakes=int((~kept).sum()),
        loss=max(LOSS, float(below.mean())) if len(below) else LOSS,
        correlation=correlation(pairs),
    )


def missing_audits(pairs: Sequence[Pair]) -> int:
    """How many more audits are needed at least before anything can be promised."""
    audits = sum(p.audited for p in pairs)
    return max(LEAST_AUDITS - audits, LEAST_PAIRS - len(pairs), 0)


def correlation(pairs: Sequence[Pair]) -> float | None:
    """Correlation r of true Dice and -log(1 - agreement); None where it is not defined."""
    x, dice = -_transformed([p.agreement for p in pairs]), np.array([p.dice for p in pairs], float)
    if len(pairs) < 3 or np.ptp(x) <= 1e-9 or np.ptp(dice) <= 1e-9:
        return None
    return float(np.corrcoef(x, dice)[0, 1])


def _transformed(agreements: Sequence[float]) -> np.ndarray:
    return np.log(np.maximum(1 - np.asarray(agreements, float), LEAST_DISAGREEMENT))


def _centred(x: np.ndarray) -> tuple[np.ndarray, float]:
    """x without its mean, and the sum of the squares; that is 0 where all x are equal, whatever is rounded."""
    centred = x - x.mean()
    return centred, float((centred**2).sum()) if np.ptp(x) > 1e-9 else 0.0


def _least_squares(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Offset and slope; the slope is 0 where all x are equal."""
    centred, spread = _centred(x)
    slope = float((centred * y).sum()) / spread if spread else 0.0
    return float(y.mean()) - slope * float(x.mean()), slope


def _without_gross(x: np.ndarray, dice: np.ndarray) -> np.ndarray:
    """Which pairs are no gross mistakes: those that lie less than :data:`GROSS` below the line.

    A mistake draws the line towards itself, so the line is fitted a second time without what was found at first.
    """
    kept = np.ones(len(x), bool)
    for _ in range(2):
        offset, slope = _least_squares(x[kept], dice[kept])
        residuals = dice - offset - slope * x
        kept = residuals > np.median(residuals) - GROSS
    return kept


def _mistakes(k: np.ndarray, a: float, b: float) -> tuple[np.ndarray, np.ndarray]:
    """Distribution of the number of gross mistakes among k masks, if their rate has the distribution Beta(a, b).

    Args:
        k: (n,) numbers of masks.
        a, b: Of the Beta distribution.

    Returns:
        (c,) numbers of mistakes and (c, n) their beta-binomial probabilities. From 32 on neighbouring numbers are one,
        the largest of them.
    """
    found: list[np.ndarray] = []
    left_over = np.ones(len(k))
    for count in range(int(k.max()) + 1):
        left = np.maximum(k - count, 0)
        log_p = special.betaln(count + a, left + b) - special.betaln(a, b)
        log_p = log_p + special.gammaln(k + 1) - special.gammaln(count + 1) - special.gammaln(left + 1)
        found.append(np.where(k >= count, np.exp(log_p), 0))
        left_over = left_over - found[-1]
        if (left_over < UNLIKELY).all():
            break
    # exact for few, in steps of a twentieth for many
    steps = np.geomspace(EXACT_COUNTS, max(len(found), EXACT_COUNTS + 1), 1 + int(20 * np.log1p(len(found))))
    starts = np.unique(np.concatenate([np.arange(EXACT_COUNTS), steps.astype(int)]))
    starts = starts[starts < len(found)]
    counts = np.append(starts[1:], len(found)) - 1
    chances = np.add.reduceat(np.array(found), starts, axis=0)
    return counts.astype(float), chances
