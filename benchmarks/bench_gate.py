"""What the gate lets through, and how far the Dice that is stated is from the truth: simulated nights, no networks.

    python benchmarks/bench_gate.py [--nights 30] [--runs 4000] [--out FILE]

The Dice of a model on a case is its true mean, plus what is peculiar to the case, plus noise of this model on this
case; a case has a standard deviation of 0.07, four fifths of its variance common to all models. The rules are those of
the product (:mod:`aslseg.models.gate_rules`), as is the mean over fresh labels
(:func:`aslseg.rounds.gate.fresh.pooled`). The rule before published a model whose mean was no lower. Prints tables in
Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aslseg.models.gate_rules import shown_better, shown_not_below, shown_worse
from aslseg.rounds.gate.fresh import SHOWN, pooled
from aslseg.rounds.ledger.ledger import Event

SPREAD, COMMON = 0.07, 0.8
"""Standard deviation of a case's Dice, and the part of its variance that all models share."""
LEVEL = 0.8
"""True Dice of the first model."""
DIFFERENCES = (-0.02, 0.0, 0.02)
SEVERAL_NIGHTS = (-0.02, 0.0, 0.02, 0.04)
"""True Dice of candidates minus that of the first model."""
LABEL_DIFFERENCES = (-0.1, -0.05, -0.02, 0.0, 0.02)
LABELS = (1, 2, 4, 8, 16)
VALIDATION = 0.2
"""Part of the labels that judged before; at least one."""
Rule = Callable[[Sequence[float]], bool]


def mean_rule(differences: Sequence[float]) -> bool:
    """The rule before: a mean that is no lower."""
    return bool(len(differences)) and float(np.mean(differences)) >= 0


def not_worse(differences: Sequence[float]) -> bool:
    """The rule for new human labels."""
    return not shown_worse(differences)


RULES: dict[str, Rule] = {"before": mean_rule, "other masks": shown_better, "new labels": not_worse}


@dataclass
class World:
    """Cases and models of one simulation."""

    rng: np.random.Generator

    def cases(self, count: int) -> np.ndarray:
        """What is peculiar to each case."""
        return self.rng.normal(0, SPREAD * np.sqrt(COMMON), count)

    def noise(self, count: int) -> np.ndarray:
        """What a model has on each case beside its mean and the case."""
        return self.rng.normal(0, SPREAD * np.sqrt(1 - COMMON), count)


def main() -> None:
    """Simulate, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nights", type=int, default=30)
    parser.add_argument("--runs", type=int, default=4000, help="models for each row of the first table")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--out", type=Path, help="file for the tables; by default they are printed")
    args = parser.parse_args()
    tables = [
        "One candidate, published in % of cases:",
        *single(args.runs, args.seed),
        "\nOne candidate that has learned a new label, published in % of cases, by the difference that this makes:",
        *with_one_label(args.runs, args.seed),
        f"\n{args.nights} nights without a new label, by the true difference of all candidates from the first model:",
        *without_labels(args.runs // 10, args.nights, args.seed),
        f"\n{args.nights} nights with one new label each, candidates that differ by N(0, 0.02):",
        *with_labels(args.runs // 10, args.nights, args.seed),
    ]
    text = "\n".join(tables) + "\n"
    if args.out:
        args.out.write_text(text)
    else:
        sys.stdout.write(text)


def single(runs: int, seed: int) -> Iterator[str]:
    """How often a candidate of a known true difference is published, by rule and number of labels that judge."""
    yield ("| labels that judge | " + " | ".join(f"{name}: {d:+.2f}" for name in RULES for d in DIFFERENCES) + " |")
    yield "|---|" + "---|" * (3 * len(RULES))
    for labels in LABELS:
        cells = []
        for rule in RULES.values():
            for true in DIFFERENCES:
                world = World(np.random.default_rng([seed, labels]))
                passed = sum(rule(true + world.noise(labels) - world.noise(labels)) for _ in range(runs))
                cells.append(f"{100 * passed / runs:.0f}")
        yield f"| {labels} | " + " | ".join(cells) + " |"


def with_one_label(runs: int, seed: int) -> Iterator[str]:
    """How often a model that has learned one more label is published: validation cases alone, and with the folds.

    The folds of both rounds differ by what the label gives, as the models do, and have noise of their own.
    """
    yield "| labels | judges | " + " | ".join(f"{d:+.2f}" for d in LABEL_DIFFERENCES) + " |"
    yield "|---|---|" + "---|" * len(LABEL_DIFFERENCES)
    for labels in LABELS[2:]:
        judging = max(1, round(VALIDATION * labels))
        folds = f"these and the folds on {labels - judging}"
        for text, judges in ((f"{judging} validating", judging), (folds, labels)):
            cells = []
            for true in LABEL_DIFFERENCES:
                world = World(np.random.default_rng([seed, labels]))
                passed = sum(not_worse(true + world.noise(judges) - world.noise(judges)) for _ in range(runs))
                cells.append(f"{100 * passed / runs:.0f}")
            yield f"| {labels} | {text} | " + " | ".join(cells) + " |"


def without_labels(runs: int, nights: int, seed: int) -> Iterator[str]:
    """Nights in which only promoted masks change, judged by the same cases again and again."""
    columns = [
        f"{what} ({d:+.2f})" for d in SEVERAL_NIGHTS for what in ("ever published, %", "true change", "too high")
    ]
    yield "| labels | rule | judges | " + " | ".join(columns) + " |"
    yield "|---|---|---|" + "---|" * len(columns)
    for labels in LABELS:
        for name, rule in (("before", mean_rule), ("0.024 / n alone", shown_better), ("now", shown_better)):
            judges = max(1, round(VALIDATION * labels)) if name == "before" else labels
            cells = []
            for true in SEVERAL_NIGHTS:
                worlds = (World(np.random.default_rng([seed, n])) for n in range(runs))
                found = [_promotions(w, nights, judges, rule, true, name == "now") for w in worlds]
                published, level, shown = np.mean(found, axis=0)
                cells += [f"{100 * published:.0f}", f"{level - LEVEL:+.3f}", f"{shown - level:+.3f}"]
            yield f"| {labels} | {name} | {judges} | " + " | ".join(cells) + " |"


def _promotions(
    world: World, nights: int, judges: int, rule: Rule, true: float, first: bool
) -> tuple[bool, float, float]:
    """Whether a candidate was ever published, the true Dice at the end, and the mean on the judges, who are reused.

    With ``first`` each candidate is held against the first model too.
    """
    cases, level = world.cases(judges), LEVEL
    served, published = world.noise(judges), False
    start = served
    for tries in range(1, nights + 1):
        new, candidate = LEVEL + true, world.noise(judges)
        not_below = not first or shown_not_below(new + candidate - LEVEL - start, tries)
        if rule(new + candidate - level - served) and not_below:
            published, level, served = True, new, candidate
    return published, level, float(np.mean(level + cases + served))


def with_labels(runs: int, nights: int, seed: int) -> Iterator[str]:
    """Nights with a new label each: what is stated by the reused judge, and by labels before they are learned."""
    yield "| gain a night | rule | nights that published | true Dice at the end | stated | too high | sd of that |"
    yield "|---|---|---|---|---|---|---|"
    for gain in (0.0, 0.001):
        for name in ("before", "now"):
            worlds = (World(np.random.default_rng([seed, n])) for n in range(runs))
            found = np.array([growing(world, nights, gain, name) for world in worlds])
            published, true, shown = found.mean(0)
            spread = (found[:, 2] - found[:, 1]).std()
            numbers = f"{published:.1f} | {true:.3f} | {shown:.3f} | {shown - true:+.3f} | {spread:.3f}"
            yield f"| {gain:g} | {name} | {numbers} |"


def growing(world: World, nights: int, gain: float, name: str) -> tuple[int, float, float]:
    """Nights that published, true Dice at the end, and the Dice that is stated then, with a new label each night.

    Args:
        world: The simulation.
        nights: Their number.
        gain: How much better candidates get each night; each differs from that by N(0, 0.02).
        name: ``before``: one validation case judges, and its Dice is stated. ``now``: the new label judges beside it,
            and the mean over such labels is stated.
    """
    judge, events = world.cases(1), []
    level, served, published = LEVEL, world.noise(1), 0
    for night in range(nights):
        case = world.cases(1)
        fresh = level + case + world.noise(1)
        events.append(fresh_event(night, float(fresh[0])))
        new, candidate = LEVEL + gain * night + world.rng.normal(0, 0.02), world.noise(1)
        on_judge = new + candidate - level - served
        on_fresh = new + case + world.noise(1) - fresh
        if mean_rule(on_judge) if name == "before" else not_worse([*on_judge, *on_fresh]):
            published, level, served = published + 1, new, candidate
    stated = float((level + judge + served)[0])
    return published, level, stated if name == "before" else pooled(events)[SHOWN]["liver"]["dice"]


def fresh_event(number: int, dice: float) -> Event:
    """An event of the ledger about a fresh label of one scan."""
    return Event("fresh", number, f"case{number}", details={"dice": {SHOWN: {"liver": dice}}}, seq=number)


if __name__ == "__main__":
    main()
