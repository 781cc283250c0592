"""What any rule could promise on the simulated nights of ``bench_promise.py``, however clever.

Three rules see the nights of the product, and its audits. They promise the largest number of masks whose mean Dice
reaches the target with a probability of 0.9; they differ in what they know:

* *knows f*: the distribution of Dice for each agreement on this night, with drift, new scanner and the rate of shared
  mistakes; not which scans lie above or below it.
* *ideal Bayes*: how studies are drawn (:func:`prior`), the correlation and the rate of mistakes; it learns the rest
  from the same pairs as the product, by weighting draws from the prior.
* *ideal Bayes, mistakes unknown*: the rate too has to be learned; it is 0 in a third of the studies, else
  Beta(0.5, 20).

    python benchmarks/promise_limits.py --studies 40 --seed 1001      # 800 nights a row; minutes of one core
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import stats

from aslseg.agreement.promise import Pair
from bench_promise import (
    AUDITS,
    CLOSEST,
    CONFIDENCE,
    FRACTION,
    POOL,
    SCENARIOS,
    TARGET,
    THRESHOLD,
    Scenario,
    Simulated,
    largest,
    logs,
    product,
)

logger = logging.getLogger("promise_limits")

DRAWS, KEPT = 3000, 600
"""Draws from the prior, and how many of the heaviest make a prediction."""
Z = np.linspace(-3.6, 3.2, 35)
"""What Dice is made of, in standard deviations: the lower half of the distribution is 1.15, the upper 0.85 wide."""
WIDTHS = np.where(Z < 0, 1.15, 0.85)
DENSITY = np.exp(-0.5 * (Z / WIDTHS) ** 2) / WIDTHS
WRONG_MEAN, WRONG_VARIANCE, MOST_WRONG = 0.15, 0.0075, 7
"""Dice of a mistake: uniform from 0 to 0.3; and how many mistakes among promoted masks are reckoned with."""
RULES = ("knows f", "ideal Bayes", "ideal Bayes, mistakes unknown", "product")


@dataclass(frozen=True)
class Parameters:
    """What differs from study to study, (p,) each; ``better`` is (p, nights + 1)."""

    mean: np.ndarray
    width: np.ndarray
    easier: np.ndarray
    closer: np.ndarray
    change: np.ndarray
    changed: np.ndarray
    visible: np.ndarray
    part: np.ndarray
    better: np.ndarray
    rate: np.ndarray

    def chosen(self, index: np.ndarray) -> Parameters:
        """Some of them."""
        return Parameters(**{name: values[index] for name, values in vars(self).items()})

    def mixture(self, night: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Weight, shift of log(1 - a) and shift of Dice of each scanner's scans, (p,) each; night 0: labelled scans."""
        sd = 0.6 / self.width
        if night == 0:
            return [(np.ones_like(self.mean), -(self.closer + 0.5 * self.easier * sd), self.easier)]
        new, better = (night >= self.changed) * self.part, self.better[:, night]
        seen = self.visible * self.change * sd
        return [(1 - new, np.zeros_like(seen), better), (new, seen, better - self.change)]


def prior(rng: np.random.Generator, draws: int, drift: float, nights: int) -> Parameters:
    """Draws of what :class:`bench_promise.Study` draws."""
    walk = np.cumsum(rng.normal(0.002, 0.006, (draws, nights)), 1) * drift
    return Parameters(
        mean=rng.uniform(0.74, 0.86, draws),
        width=rng.uniform(0.07, 0.12, draws),
        easier=rng.uniform(0, 0.08, draws) * drift,
        closer=rng.uniform(0, 0.5, draws) * drift,
        change=rng.uniform(0.03, 0.1, draws) * drift,
        changed=rng.integers(2, 12, draws),
        visible=rng.uniform(0, 1, draws),
        part=rng.uniform(0.3, 1, draws),
        better=np.hstack([np.zeros((draws, 2)), walk[:, :-1]]),
        rate=np.where(rng.random(draws) < 1 / 3, 0, rng.beta(0.5, 20, draws)),
    )


def truth(study: Simulated, night: int) -> Parameters:
    """Those of a study; it has drawn no scans of this night yet."""
    drift, one = study.drift, np.ones(1)
    return Parameters(
        mean=study.mean * one,
        width=study.width * one,
        easier=study.easier * drift * one,
        closer=study.closer * drift * one,
        change=study.change * drift * one,
        changed=study.changed * one,
        visible=study.visible * one,
        part=study.part * one,
        better=np.full((1, night + 1), study.better),
        rate=study.scenario.mistakes * one,
    )


def chances(known: Parameters, x: np.ndarray, night: int, r: float, rate: np.ndarray) -> np.ndarray:
    """(p, n) probability that the mean Dice of the first k masks reaches the target.

    Args:
        known: What is assumed.
        x: (n,) log(1 - agreement) of masks, best first.
        night: From 1 on.
        r: Correlation.
        rate: (p,) of shared mistakes.
    """
    total = first = second = np.zeros((len(rate), len(x)))
    for weight, shift, lift in known.mixture(night):
        error = (x[None, :, None] - shift[:, None, None] + 2.2 + 0.6 * r * Z) / (0.6 * np.sqrt(1 - r * r))
        density = np.exp(-0.5 * error**2) * DENSITY * weight[:, None, None]
        dice = np.clip(known.mean[:, None, None] + known.width[:, None, None] * Z + lift[:, None, None], 0, 0.98)
        total, first = total + density.sum(2), first + (density * dice).sum(2)
        second = second + (density * dice**2).sum(2)
    mean, variance = first / total, second / total - (first / total) ** 2
    k, found = np.arange(1, len(x) + 1), np.zeros_like(mean)
    sums, spread = np.cumsum(mean, 1), np.cumsum(variance, 1) + 1e-9
    for wrong in range(MOST_WRONG):
        right = np.maximum(k - wrong, 0) / k
        centre = (sums * right + WRONG_MEAN * wrong) / k
        sd = np.sqrt(spread * right + wrong * WRONG_VARIANCE) / k
        found += stats.binom.pmf(wrong, k[None], rate[:, None]) * stats.norm.cdf((centre - TARGET) / sd)
    return found


def log_likelihood(
    known: Parameters, x: np.ndarray, dice: np.ndarray, night: int, r: float, rate: np.ndarray
) -> np.ndarray:
    """(p,) of pairs of log(1 - agreement) and Dice; labelled scans (night 0) hold no mistakes."""
    likely = np.zeros((len(rate), len(x)))
    spread = 0.6 * np.sqrt(1 - r * r)
    for weight, shift, lift in known.mixture(night):
        z = (dice[None] - known.mean[:, None] - lift[:, None]) / known.width[:, None]
        wide = np.where(z < 0, 1.15, 0.85)
        error = (x[None] - shift[:, None] + 2.2 + 0.6 * r * z) / spread
        of_dice = stats.norm.pdf(z / wide) / wide / known.width[:, None]
        likely += weight[:, None] * of_dice * stats.norm.pdf(error) / spread
    wrong = rate[:, None] * (night > 0)
    # a mistake's agreement is drawn as any other, so its density is left out on both sides but for a constant
    likely = (1 - wrong) * likely + wrong * (dice[None] <= 0.3)
    return np.asarray(np.log(likely + 1e-12).sum(1))


def nights(
    scenario: Scenario, rng: np.random.Generator, draws: np.random.Generator, count: int
) -> Iterator[np.ndarray]:
    """For each night and rule the number of promised masks, that of the oracle, and whether the promise is broken."""
    study, known = Simulated(scenario, rng), prior(draws, DRAWS, float(scenario.drift), count)
    rates = (np.full(DRAWS, scenario.mistakes), known.rate)
    agreement, dice = study.draw(int(rng.integers(6, 13)), 0)
    pairs = [Pair(f"l{n}", a, d, audited=False) for n, (a, d) in enumerate(zip(agreement, dice, strict=True))]
    weights = [log_likelihood(known, logs(agreement), dice, 0, scenario.r, rate) for rate in rates]
    for night in range(1, count + 1):
        here = truth(study, night)
        agreement, dice = study.draw(POOL, night)
        order = np.argsort(-agreement, kind="stable")[: int(np.ceil(FRACTION * POOL))]
        agreement, dice = agreement[order], dice[order]
        x, means = logs(agreement), np.cumsum(dice) / np.arange(1, len(dice) + 1)
        promised = [chances(here, x, night, scenario.r, here.rate)[0]]
        for weight, rate in zip(weights, rates, strict=True):
            best = np.argsort(-weight)[:KEPT]
            share = np.exp(weight[best] - weight[best].max())
            promised.append(share @ chances(known.chosen(best), x, night, scenario.r, rate[best]) / share.sum())
        bounds = product(pairs, agreement)
        found = [*(largest(p >= CONFIDENCE) for p in promised), 0 if bounds is None else largest(bounds >= TARGET)]
        yield np.array([[k, largest(means >= TARGET), bool(k and means[k - 1] < TARGET)] for k in found])
        drawn_from = found[-1] or max(int((agreement >= THRESHOLD).sum()), CLOSEST)
        drawn = rng.choice(drawn_from, min(AUDITS, drawn_from), replace=False)
        pairs += [Pair(f"{night} {n}", agreement[n], dice[n], audited=True) for n in drawn]
        weights = [
            weight + log_likelihood(known, x[drawn], dice[drawn], night, scenario.r, rate)
            for weight, rate in zip(weights, rates, strict=True)
        ]


def table(scenario: Scenario, studies: int, length: int, seed: int) -> Iterator[str]:
    """A line for each rule."""
    each = ((np.random.default_rng([seed, n]), np.random.default_rng([seed, n, 5])) for n in range(studies))
    found = np.array([night for rng, draws in each for night in nights(scenario, rng, draws, length)], float)
    for number, name in enumerate(RULES):
        k, oracle, broken = found[:, number].T
        made = k > 0
        lost = f"{broken[made].mean():.1%}" if made.any() else "-"
        yield f"| {scenario.name} | {name} | {made.mean():.0%} | {lost} | {k.sum() / max(oracle.sum(), 1):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=40, help="per scenario")
    parser.add_argument("--nights", type=int, default=20, help="per study")
    parser.add_argument("--seed", type=int, default=1001)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logger.info("| nights | rule | all nights | broken | of the oracle's masks |\n|---|---|---|---|---|")
    for scenario in SCENARIOS:
        for line in table(scenario, arguments.studies, arguments.nights, arguments.seed):
            logger.info("%s", line)


if __name__ == "__main__":
    main()
