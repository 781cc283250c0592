"""Whether the masks that a round promotes differ from human labels as a whole, in volume or in intensity.

The verdict refuses single masks that look strange. A night in which all promoted masks are a little too large, or lie
on darker tissue, shows only when they are compared with the human labels together.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from aslseg.cases.prepared_case import Prepared
from aslseg.rounds.steps.pipeline import RoundPipeline
from aslseg.rounds.steps.promoted import Promoted
from aslseg.types import Labels

logger = logging.getLogger(__name__)

LEVEL = 0.01
"""Chance of a warning in a night without drift, over all labels and features."""
FEATURES = {"volume": "ml", "intensity": "of the window"}
"""What is compared, with its unit; intensity is the median inside the mask, 0 to 1."""
FEWEST = 4
"""Human labels, and promoted masks, below which nothing is compared: no difference would be a clear one."""


def find_drift(pipeline: RoundPipeline, promoted: Sequence[Promoted]) -> dict[str, Any]:
    """Compare the promoted masks of a night with the human labels; a difference is a warning of the round.

    Args:
        pipeline: The round.
        promoted: What is about to be learned.

    Returns:
        :func:`compare_groups`.
    """
    cases = pipeline.cases
    human = [features(c, pipeline.labels) for c in (*cases.train, *cases.validation)]
    found = compare_groups(human, [features(p.case, pipeline.labels) for p in promoted])
    warnings = in_words(found)
    pipeline.cases.warnings += warnings
    for warning in warnings:
        logger.warning("%s", warning)
    return found


def features(case: Prepared, labels: Labels) -> dict[str, dict[str, float]]:
    """Volume (ml) and median intensity (0..1) of each label that a case holds, with all that is nested in it."""
    found = {}
    voxel, label = math.prod(case.grid.spacing) / 1000, np.asarray(case.label)
    # a promoted mask marks what is this label or anything in it (Labels.mark_unknown)
    label = np.where(label > len(labels), label - len(labels), label)
    for name, mask in zip(labels.names, labels.regions(label), strict=True):
        if mask.any():
            found[name] = {"volume": float(mask.sum()) * voxel, "intensity": float(np.median(case.image[mask]))}
    return found


def compare_groups(
    human: Sequence[dict[str, dict[str, float]]], promoted: Sequence[dict[str, dict[str, float]]]
) -> dict[str, Any]:
    """Test whether promoted masks differ from human labels: two-sided Mann-Whitney test of each label and feature.

    The test looks at ranks alone, so that a single strange mask decides nothing, and holds its level for any
    distribution. The level of one test is :data:`LEVEL` divided by the number of tests (Bonferroni).

    Args:
        human, promoted: :func:`features` of each case.

    Returns:
        Label to feature to ``human`` and ``promoted`` (medians), ``cases`` (numbers of both), ``p`` and ``drift``;
        without a label that too few cases hold.
    """
    names = sorted({name for case in (*human, *promoted) for name in case})
    found: dict[str, Any] = {}
    for name in names:
        ours, theirs = ([c[name] for c in group if name in c] for group in (human, promoted))
        if min(len(ours), len(theirs)) < FEWEST:
            continue
        found[name] = {}
        for feature in FEATURES:
            a, b = ([values[feature] for values in group] for group in (ours, theirs))
            found[name][feature] = {
                "human": float(np.median(a)),
                "promoted": float(np.median(b)),
                "cases": [len(a), len(b)],
                "p": float(stats.mannwhitneyu(a, b).pvalue),
            }
    tests = sum(map(len, found.values()))
    for about in (about for by_feature in found.values() for about in by_feature.values()):
        about["drift"] = about["p"] < LEVEL / tests
    return found


def in_words(found: dict[str, Any]) -> list[str]:
    """A line for each difference that :func:`compare_groups` found."""
    return [
        f"drift: the {feature} of {name} in the {about['cases'][1]} promoted masks is unlike that of "
        f"{about['cases'][0]} human labels: median {about['promoted']:.3g} against {about['human']:.3g} {unit} "
        f"(p = {about['p']:.1g}); look at the promoted masks before you trust the round"
        for name, by_feature in sorted(found.items())
        for feature, unit in FEATURES.items()
        if (about := by_feature[feature])["drift"]
    ]
