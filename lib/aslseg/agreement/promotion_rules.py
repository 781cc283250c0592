"""Which machine masks are good enough to be trained on.

A mask is promoted if the two networks agree on every label and the mask is similar to the human labels
(:mod:`aslseg.agreement.plausibility`). A verdict never raises an error: a mask that cannot be judged is not promoted,
and the verdict gives the reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from aslseg.agreement.measures import Agreement
from aslseg.agreement.plausibility import Reference, implausible
from aslseg.settings import Settings


@dataclass(frozen=True)
class Verdict:
    """Whether a mask may be trained on, and all reasons against it.

    Attributes:
        promote: Whether it may.
        reasons: Against it.
        flags: What is unusual about it and no reason against it: a person should have a look.
    """

    promote: bool
    reasons: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def against(self, *reasons: str) -> Verdict:
        """The verdict with further reasons against the mask."""
        return Verdict(self.promote and not reasons, (*self.reasons, *reasons), self.flags)


def judge(
    agreement: Agreement,
    class_map: np.ndarray,
    spacing: Sequence[float],
    reference: Reference,
    settings: Settings,
    shape: tuple[int, ...] | None = None,
    unknown: Collection[str] = (),
    image: np.ndarray | None = None,
) -> Verdict:
    """Judge one machine mask. Never raises; lower thresholds never turn a promotion into a refusal.

    A label that is empty in both networks' masks is no reason against the mask, but :func:`select` limits how many such
    masks are promoted; a mask without any label is refused.

    Args:
        agreement: Between the two networks.
        class_map: The mask to be promoted (i, j, k), values 0..N.
        spacing: Its voxel size in mm.
        reference: From the human labels.
        settings: ``promote_threshold``, ``labels``, ``nested``.
        shape: The scan's shape; None leaves it unchecked.
        unknown: Labels that nobody learns from the mask; it does not hold them.
        image: The scan (i, j, k) in 0..1; None leaves shape and place unchecked.
    """
    labels = settings.label_set
    reasons = _disagreement(agreement, {n: t for n, t in settings.thresholds.items() if n not in unknown})
    malformed = _malformed(class_map, spacing, len(labels), shape)
    flags: list[str] = []
    if not malformed:
        array = np.asarray(class_map).astype(np.uint8)
        malformed, flags = implausible(array, image, spacing, reference, labels)
    reasons += malformed
    return Verdict(not reasons, tuple(reasons), tuple(flags))


def without_thresholds(verdict: Verdict, agreement: Agreement, thresholds: Mapping[str, float]) -> Verdict:
    """A verdict that does not ask for a fixed agreement of the labels for which the promise decides instead.

    Args:
        verdict: Of :func:`judge`.
        agreement: That it judged; a label whose agreement is not known stays a reason.
        thresholds: What it asked of these labels.
    """
    known = {name for name, value in agreement.per_label.items() if value is not None and not math.isnan(value)}
    low = _disagreement(agreement, {name: least for name, least in thresholds.items() if name in known})
    reasons = tuple(reason for reason in verdict.reasons if reason not in low)
    return replace(verdict, promote=not reasons, reasons=reasons) if reasons != verdict.reasons else verdict


@dataclass(frozen=True)
class PromotionLimits:
    """How many scans a round may promote.

    Attributes:
        fraction: Largest fraction of the judged scans; rounded up.
        cases: Largest number; 0 for no limit.
        empty: Largest fraction of the promoted scans in which both networks find nothing of a label, for each label.
    """

    fraction: float
    cases: int = 0
    empty: float = 1.0

    def most(self, judged: int) -> int:
        """How many of so many judged scans may be promoted."""
        # 0.1 x 30 is a little more than 3 in floating point
        allowed = max(math.ceil(self.fraction * judged - 1e-9), 0)
        return min(allowed, self.cases) if self.cases else allowed


def select(
    verdicts: Mapping[str, Verdict],
    agreements: Mapping[str, Agreement],
    limits: PromotionLimits,
    before: Collection[str] = (),
) -> list[str]:
    """The cases to promote: those with a good verdict that agree best, within the limits.

    Cases in which both networks find every label come first: a label that is empty in both says nothing of how well
    they agree on it, and masks without it would otherwise be promoted before all others.

    Args:
        verdicts: By case id, of all unlabelled cases.
        agreements: By case id.
        limits: How many are taken.
        before: Cases that come before others with as many empty labels: those whose masks are promoted already.

    Returns:
        Ids, best first; ties are ordered by id.
    """
    good = [case for case, verdict in verdicts.items() if verdict.promote]
    order = sorted(good, key=lambda c: (len(agreements[c].empty), c not in before, -agreements[c].mean, c))
    chosen: list[str] = []
    empty: Counter[str] = Counter()
    most = limits.most(len(verdicts))
    for case in order:
        more = empty + Counter(agreements[case].empty)
        allowed = limits.empty * (len(chosen) + 1) + 1e-9
        if len(chosen) < most and all(count <= allowed for count in more.values()):
            chosen.append(case)
            empty = more
    return chosen


def refusals(
    verdicts: Mapping[str, Verdict],
    agreements: Mapping[str, Agreement],
    limits: PromotionLimits,
    chosen: Sequence[str],
) -> dict[str, list[str]]:
    """Why each case that :func:`select` did not choose is not promoted, in words."""
    full = len(chosen) >= limits.most(len(verdicts))
    found = {}
    for case in sorted(set(verdicts) - set(chosen)):
        reasons = list(verdicts[case].reasons)
        if not reasons and full:
            limit = f", promote_cases {limits.cases}" if limits.cases else ""
            reasons = [f"passed, but {len(chosen)} scans agree better (promote_fraction {limits.fraction:g}{limit})"]
        elif not reasons:
            names = ", ".join(agreements[case].empty)
            reasons = [f"both networks find no {names}; at most {limits.empty:.0%} of the promoted may (promote_empty)"]
        found[case] = reasons
    return found


def _disagreement(agreement: Agreement, thresholds: Mapping[str, float]) -> list[str]:
    reasons = []
    for name, least in thresholds.items():
        if name not in agreement.per_label:
            reasons.append(f"{name}: agreement unknown")
            continue
        value = agreement.per_label[name]
        # written so that NaN fails
        if value is not None and not value >= least:
            reasons.append(f"{name}: agreement {value:.3f} below {least:g}")
    return reasons


def _malformed(
    class_map: np.ndarray, spacing: Sequence[float], classes: int, shape: tuple[int, ...] | None
) -> list[str]:
    """Reasons why an array is no class map."""
    array = np.asarray(class_map)
    if array.dtype.kind not in "buif":
        return [f"mask: voxels of type {array.dtype}"]
    if array.ndim != 3 or not array.size or (shape is not None and array.shape != tuple(shape)):
        return [f"mask: shape {array.shape}, expected {'three axes' if shape is None else tuple(shape)}"]
    if not np.isfinite(array).all():
        return ["mask: NaN or infinite voxels"]
    if array.min() < 0 or array.max() > classes or (array.dtype.kind == "f" and (array != np.rint(array)).any()):
        return [f"mask: values outside 0..{classes}"]
    if not array.any():
        return ["mask: empty"]
    sizes = np.asarray(spacing, float)
    if sizes.shape != (3,) or not np.isfinite(sizes).all() or sizes.min() <= 0:
        return [f"mask: voxel size {spacing}, expected three lengths in mm"]
    return []
