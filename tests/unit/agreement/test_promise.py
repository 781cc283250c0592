"""The lower bound of the mean Dice of promoted masks, against a slow computation that shares no code with it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats

from aslseg.agreement.promise import Pair, correlation, fit_line, missing_audits


def pairs(seed: int = 0, crossed: int = 8, audits: int = 6, noise: float = 0.03) -> list[Pair]:
    generator = np.random.default_rng(seed)
    agreement = generator.uniform(0.6, 0.97, crossed + audits)
    dice = np.clip(0.6 - 0.1 * np.log(1 - agreement) + noise * generator.standard_normal(len(agreement)), 0, 1)
    return [Pair(f"c{n}", a, d, n >= crossed) for n, (a, d) in enumerate(zip(agreement, dice, strict=True))]


def slow_bounds(found: list[Pair], agreements: list[float], confidence: float) -> list[float]:
    """The equations of docs/science.md 6.2 word by word, for pairs without a gross mistake."""
    design = np.array([[1, np.log(1 - p.agreement)] for p in found])
    dice = np.array([p.dice for p in found])
    hat = design @ np.linalg.inv(design.T @ design) @ design.T
    beta = np.linalg.inv(design.T @ design) @ design.T @ dice
    residuals = (dice - hat @ dice) / (1 - np.diag(hat))
    ours = [e for e, p in zip(residuals, found, strict=True) if p.audited]
    others = [e for e, p in zip(residuals, found, strict=True) if not p.audited]
    squares = sum((e - np.mean(ours)) ** 2 for e in ours) + sum((e - np.mean(others)) ** 2 for e in others)
    freedom = 3 + len(ours) + len(others) - 1
    sd = np.sqrt((4 * 0.05**2 + squares) / freedom)
    best = min(np.log(1 - p.agreement) for p in found)
    bounds = []
    for k in range(1, len(agreements) + 1):
        mean = np.mean([beta[0] + beta[1] * max(np.log(1 - a), best) for a in agreements[:k]]) + np.mean(ours)
        error = sd * np.sqrt(1 / len(ours) + 1 / k)

        def too_sure(bound: float, mean: float = mean, error: float = error, k: int = k) -> float:
            """How much more probable than the confidence it is that the mean of the masks is at least so high."""
            counts = np.arange(k + 1)
            chances = stats.betabinom.pmf(counts, k, 0.5, 40 + len(ours))
            return float((chances * stats.t.cdf((mean - 0.6 * counts / k - bound) / error, freedom)).sum()) - confidence

        bounds.append(optimize.brentq(too_sure, -5, 5, xtol=1e-12))
    return bounds


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.99])
def test_as_the_slow_computation(seed: int, confidence: float) -> None:
    found, masks = pairs(seed), list(np.random.default_rng(seed).uniform(0.5, 0.99, 40))
    line = fit_line(found)
    assert line is not None
    assert line.mistakes == 0
    assert line.lower_bounds(masks, confidence) == pytest.approx(slow_bounds(found, masks, confidence), abs=1e-5)
    shuffled = [found[n] for n in np.random.default_rng(1).permutation(len(found))]
    again = fit_line(shuffled)
    assert again is not None
    assert again.lower_bounds(masks, confidence) == pytest.approx(line.lower_bounds(masks, confidence))


def test_more_confidence_and_more_noise_promise_less_and_more_audits_more() -> None:
    masks = [0.95] * 20
    line, noisy, longer = (fit_line(p) for p in (pairs(), pairs(noise=0.1), pairs(audits=60)))
    assert line is not None
    assert noisy is not None
    assert longer is not None
    low, middle, high = (line.lower_bounds(masks, c) for c in (0.8, 0.9, 0.99))
    assert (low > middle).all()
    assert (middle > high).all()
    assert noisy.sd > 2 * line.sd
    assert (noisy.correlation or 0) < (line.correlation or 0)
    assert longer.lower_bounds(masks, 0.9)[-1] > middle[-1]


@pytest.mark.parametrize(
    ("crossed", "audits", "missing"), [(0, 0, 9), (5, 0, 4), (6, 0, 3), (20, 0, 3), (20, 2, 1), (5, 3, 1), (0, 8, 1)]
)
def test_too_few_pairs_promise_nothing_and_say_how_many_are_missing(crossed: int, audits: int, missing: int) -> None:
    found = pairs(crossed=crossed, audits=audits)
    assert fit_line(found) is None
    assert missing_audits(found) == missing


def test_nine_pairs_with_three_audits_are_enough() -> None:
    assert fit_line(pairs(crossed=6, audits=3)) is not None
    assert fit_line(pairs(crossed=0, audits=9)) is not None


def test_ties_full_agreement_and_constant_agreement_are_finite() -> None:
    same = [Pair(str(n), 0.9, 0.8 + 0.01 * (n % 3), n > 5) for n in range(12)]
    line = fit_line(same)
    assert line is not None
    assert (line.slope, line.correlation) == (0, None)
    assert line.lower_bounds([0.9] * 5, 0.9)[-1] < 0.83
    full = [Pair(str(n), 1.0 if n % 2 else 0.8, 0.9, n > 5) for n in range(12)]
    found = fit_line(full)
    assert found is not None
    assert np.isfinite(found.lower_bounds([1.0, 1.0, 0.8, 0.0], 0.9)).all()
    assert found.lower_bounds([], 0.9).shape == (0,)


def test_better_agreement_than_any_pair_has_is_not_extrapolated() -> None:
    line = fit_line([Pair(str(n), 0.6 + 0.02 * n, 0.6 + 0.02 * n, n > 5) for n in range(12)])
    assert line is not None
    assert (line.lower_bounds([0.999] * 3, 0.9) == line.lower_bounds([0.82] * 3, 0.9)).all()


def test_audits_worse_than_human_labels_lower_the_bound_as_a_whole() -> None:
    """Scans that people label first may be the easy ones."""
    even = pairs()
    lower = [p if not p.audited else Pair(p.case, p.agreement, p.dice - 0.1, True) for p in even]
    before, after = fit_line(even), fit_line(lower)
    assert before is not None
    assert after is not None
    fall = before.lower_bounds([0.9] * 10, 0.9) - after.lower_bounds([0.9] * 10, 0.9)
    assert (fall > 0.08).all()


def test_a_mistake_that_both_networks_share_costs_by_its_rate_and_does_not_bend_the_line() -> None:
    clean = pairs(audits=12)
    wrong = [*clean[:-1], Pair("wrong", 0.95, 0.05, True)]
    before, after = fit_line(clean), fit_line(wrong)
    assert before is not None
    assert after is not None
    assert (before.mistakes, after.mistakes) == (0, 1)
    assert after.audits == 11
    assert after.slope == pytest.approx(before.slope, abs=0.03)
    assert after.loss > 0.6, "what was seen costs more than what is assumed"
    masks = [0.95] * 40
    assert (after.lower_bounds(masks, 0.9) <= before.lower_bounds(masks, 0.9) + 0.01).all()
    # two of forty are possible now
    assert before.lower_bounds(masks, 0.9)[-1] - after.lower_bounds(masks, 0.9)[-1] > 0.8 / 40


def test_correlation_is_that_of_the_pairs() -> None:
    found = pairs()
    x = [-np.log(1 - p.agreement) for p in found]
    assert correlation(found) == pytest.approx(np.corrcoef(x, [p.dice for p in found])[0, 1])
    assert correlation(found[:2]) is None
