"""How often the mean Dice of promoted masks is promised, and the promise broken, over simulated nights.

Each study is a pool of scans without a label, some labelled ones, and nights on which three promoted scans are drawn as
audits and answered. The rule of the product (``aslseg.agreement.promise``) and the plain one, which has no allowance
for mistakes that both networks share, no limit to extrapolation and the audits' spread alone, see the same nights.

    python benchmarks/bench_promise.py                       # simulated agreement and Dice; about a minute
    python benchmarks/bench_promise.py --pairs pairs.csv     # nights drawn from real ones, columns set,agreement,dice

The promise is broken where the true mean Dice of the masks that it promotes lies below the target. The oracle promotes
the largest number of masks, in the same order and within the same limit, whose true mean reaches the target.
"""

from __future__ import annotations

import argparse
import csv
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from aslseg.agreement.promise import LEAST_DISAGREEMENT, LEAST_PAIRS, Pair, fit_line

logger = logging.getLogger("bench_promise")

TARGET, CONFIDENCE, AUDITS, FRACTION = 0.85, 0.9, 3, 0.5
POOL, THRESHOLD, CLOSEST = 60, 0.9, 10
"""Scans without a label; the fixed agreement that decides whom to audit while nothing is promised, and the least
number of scans of which these are drawn."""
SHOWN_NIGHTS = (2, 3, 5, 10)

Rule = Callable[[Sequence[Pair], np.ndarray], "np.ndarray | None"]
"""Pairs and the agreements of the candidates, best first, to the bounds for 1 to all of them; None: no promise yet."""


@dataclass(frozen=True)
class Scenario:
    """What is simulated.

    Attributes:
        name: In the table.
        r: Correlation of true Dice and -log(1 - agreement).
        mistakes: Fraction of the scans on which both networks agree on something wrong (Dice 0 to 0.3).
        drift: Whether labelled scans are easier (Dice higher by up to 0.08, agreement higher by up to 0.5 in
            log(1 - a)), models change a little from night to night, and a new scanner comes after 2 to 12 nights, whose
            scans (30 to 100 % of the pool) have a Dice lower by 0.03 to 0.1, which agreement shows in part or not.
    """

    name: str
    r: float
    mistakes: float = 0.0
    drift: bool = False


SCENARIOS = (
    Scenario("r = 0.9", 0.9),
    Scenario("r = 0.7", 0.7),
    Scenario("r = 0.9, 2 % shared mistakes", 0.9, 0.02),
    Scenario("r = 0.9, 5 % shared mistakes", 0.9, 0.05),
    Scenario("drift, r = 0.9", 0.9, drift=True),
    Scenario("drift, r = 0.8", 0.8, drift=True),
    Scenario("drift, r = 0.7", 0.7, drift=True),
    Scenario("drift, r = 0.9, 2 % shared mistakes", 0.9, 0.02, drift=True),
)


class Study:
    """Scans of one study, with the drift that its scenario has.

    Args:
        drift: See :class:`Scenario`.
        sd: Standard deviation of log(1 - a) for each Dice, to say by how much agreement can show a lower Dice.
        generator: Of all that is random.
    """

    def __init__(self, drift: bool, sd: float, generator: np.random.Generator) -> None:
        self.drift, self.sd, self.generator = float(drift), sd, generator
        self.easier, self.closer = generator.uniform(0, 0.08), generator.uniform(0, 0.5)
        self.change, self.changed = generator.uniform(0.03, 0.1), int(generator.integers(2, 12))
        self.visible, self.part, self.better = generator.uniform(0, 1), generator.uniform(0.3, 1), 0.0

    @abstractmethod
    def scans(self, count: int, night: int) -> tuple[np.ndarray, np.ndarray]:
        """log(1 - agreement) and Dice without drift."""

    def draw(self, count: int, night: int) -> tuple[np.ndarray, np.ndarray]:
        """Agreement and Dice of scans; night 0 gives labelled ones, which nothing was trained on."""
        x, dice = self.scans(count, night)
        if night == 0:
            dice, x = dice + self.drift * self.easier, x - self.drift * (self.closer + 0.5 * self.easier * self.sd)
        else:
            new = (night >= self.changed) * (self.generator.random(count) < self.part)
            lower = self.drift * self.change * new
            dice, x = dice + self.better - lower, x + self.visible * lower * self.sd
            self.better += self.drift * self.generator.normal(0.002, 0.006)
        return np.clip(1 - np.exp(x), 0, 1), np.clip(dice, 0, 0.98)


class Simulated(Study):
    """Agreement and Dice are drawn from normal distributions; the lower half of Dice is wider.

    Args:
        scenario: Which.
        generator: Of all that is random.
    """

    def __init__(self, scenario: Scenario, generator: np.random.Generator) -> None:
        self.scenario, self.mean, self.width = scenario, generator.uniform(0.74, 0.86), generator.uniform(0.07, 0.12)
        super().__init__(scenario.drift, 0.6 / self.width, generator)

    def scans(self, count: int, night: int) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`Study.scans`."""
        generator, r = self.generator, self.scenario.r
        z = generator.standard_normal(count)
        z = np.where(z < 0, 1.15 * z, 0.85 * z)
        x = -2.2 + 0.6 * (np.sqrt(1 - r * r) * generator.standard_normal(count) - r * z)
        wrong = (generator.random(count) < self.scenario.mistakes) & (night > 0)
        return x, np.where(wrong, generator.uniform(0, 0.3, count), self.mean + self.width * z)


class Resampled(Study):
    """Scans are drawn, with replacement, from real pairs of agreement and Dice of two networks.

    Args:
        rows: (n, 2) agreement and Dice.
        drift: Whether the drift of :class:`Scenario` is put upon them.
        generator: Of all that is random.
    """

    def __init__(self, rows: np.ndarray, drift: bool, generator: np.random.Generator) -> None:
        self.x, self.dice = logs(rows[:, 0]), rows[:, 1]
        super().__init__(drift, float(self.x.std() / self.dice.std()), generator)

    def scans(self, count: int, night: int) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`Study.scans`."""
        chosen = self.generator.integers(len(self.x), size=count)
        return self.x[chosen], self.dice[chosen]


Maker = Callable[[np.random.Generator], Study]
"""Makes a study."""


def plain(pairs: Sequence[Pair], agreements: np.ndarray) -> np.ndarray | None:
    """LCB(k) = mean f + mean e - t(0.9, M + 3) s sqrt(1/M + 1/k), s^2 = (4 0.05^2 + sum (e - mean e)^2) / (M + 3)."""
    audited = np.array([p.audited for p in pairs])
    if len(pairs) < LEAST_PAIRS or not audited.any():
        return None
    x, dice = logs([p.agreement for p in pairs]), np.array([p.dice for p in pairs])
    slope, offset = np.polyfit(x, dice, 1)
    leverage = 1 / len(x) + (x - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    e = ((dice - offset - slope * x) / (1 - leverage))[audited]
    m, k = len(e), np.arange(1, len(agreements) + 1)
    s = np.sqrt((4 * 0.05**2 + ((e - e.mean()) ** 2).sum()) / (m + 3))
    mean = np.cumsum(offset + slope * logs(agreements)) / k + e.mean()
    return np.asarray(mean - stats.t.ppf(CONFIDENCE, m + 3) * s * np.sqrt(1 / m + 1 / k))


def product(pairs: Sequence[Pair], agreements: np.ndarray) -> np.ndarray | None:
    """The rule that rounds use."""
    line = fit_line(pairs)
    return None if line is None else line.lower_bounds(list(agreements), CONFIDENCE)


def nights(study: Study, rule: Rule, count: int, target: float) -> Iterator[tuple[int, int, int, bool]]:
    """Night, number of promised masks, that of the oracle, and whether the promise is broken."""
    generator = study.generator
    labelled = zip(*study.draw(int(generator.integers(6, 13)), 0), strict=True)
    pairs = [Pair(f"l{n}", a, d, audited=False) for n, (a, d) in enumerate(labelled)]
    for night in range(1, count + 1):
        agreement, dice = study.draw(POOL, night)
        order = np.argsort(-agreement, kind="stable")[: int(np.ceil(FRACTION * POOL))]
        agreement, dice = agreement[order], dice[order]
        means = np.cumsum(dice) / np.arange(1, len(dice) + 1)
        bounds = rule(pairs, agreement)
        k = 0 if bounds is None else largest(bounds >= target)
        yield night, k, largest(means >= target), bool(k and means[k - 1] < target)
        # while nothing is promoted, audits are drawn from the scans that the fixed agreement would promote
        drawn_from = k or max(int((agreement >= THRESHOLD).sum()), CLOSEST)
        drawn = generator.choice(drawn_from, min(AUDITS, drawn_from), replace=False)
        pairs += [Pair(f"{night} {n}", agreement[n], dice[n], audited=True) for n in drawn]


def row(make: Maker, rule: Rule, studies: int, length: int, seed: int, target: float) -> list[str]:
    """What a rule does in one scenario, as cells of the table."""
    each = [make(np.random.default_rng([seed, n])) for n in range(studies)]
    found = np.array([night for study in each for night in nights(study, rule, length, target)])
    made = found[:, 1] > 0
    broken = found[made, 3].mean() if made.any() else 0.0
    by_night = [f"{made[found[:, 0] == n].mean():.0%}" for n in SHOWN_NIGHTS if n <= length]
    oracle = found[:, 2].sum()
    shares = [found[:, 1].sum() / oracle, found[made, 1].sum() / max(found[made, 2].sum(), 1)] if oracle else [0, 0]
    return [*by_night, f"{made.mean():.0%}", f"{broken:.1%}", *(f"{s:.2f}" for s in shares)]


def read_pairs(path: Path) -> dict[str, np.ndarray]:
    """Agreement and Dice of each set, (n, 2), from a file with the columns set, agreement and dice."""
    with path.open() as file:
        rows = [(r["set"], float(r["agreement"]), float(r["dice"])) for r in csv.DictReader(file)]
    return {name: np.array([r[1:] for r in rows if r[0] == name]) for name in dict.fromkeys(r[0] for r in rows)}


def _scenarios(pairs: dict[str, np.ndarray]) -> Iterator[tuple[str, Maker]]:
    """Name and maker of what is simulated: the scenarios, or nights of real pairs with and without drift."""
    for scenario in () if pairs else SCENARIOS:
        yield scenario.name, lambda generator, s=scenario: Simulated(s, generator)
    for name, rows in pairs.items():
        r = np.corrcoef(-logs(rows[:, 0]), rows[:, 1])[0, 1]
        for drift in (False, True):
            text = f"{name}: {len(rows)} scans, Dice {rows[:, 1].mean():.3f}, r = {r:.2f}{', drift' if drift else ''}"
            yield text, lambda generator, rows=rows, drift=drift: Resampled(rows, drift, generator)


def table(pairs: dict[str, np.ndarray], studies: int, length: int, seed: int, target: float) -> Iterator[str]:
    """The lines of the table as Markdown."""
    shown = [f"night {n}" for n in SHOWN_NIGHTS if n <= length]
    columns = ["nights", "rule", *shown, "all nights", "broken", "of the oracle's masks", "on promised nights"]
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for name, make in _scenarios(pairs):
        for text, rule in (("plain", plain), ("product", product)):
            yield "| " + " | ".join([name, text, *row(make, rule, studies, length, seed, target)]) + " |"


def largest(holds: np.ndarray) -> int:
    return int(np.flatnonzero(holds)[-1]) + 1 if holds.any() else 0


def logs(agreements: Sequence[float] | np.ndarray) -> np.ndarray:
    return np.log(np.maximum(1 - np.asarray(agreements, float), LEAST_DISAGREEMENT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, help="CSV of real pairs instead of simulated ones")
    parser.add_argument("--studies", type=int, default=50, help="per scenario")
    parser.add_argument("--nights", type=int, default=20, help="per study")
    parser.add_argument("--target", type=float, default=TARGET)
    parser.add_argument("--seed", type=int, default=11)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pairs = read_pairs(arguments.pairs) if arguments.pairs else {}
    for line in table(pairs, arguments.studies, arguments.nights, arguments.seed, arguments.target):
        logger.info("%s", line)


if __name__ == "__main__":
    main()
