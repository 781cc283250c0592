"""Scans whose intensities are not what training expects: no HU under ``modality = ct``, or unlike the labelled scans.

A lost rescale intercept (+1024), a scan already scaled to 0..1, or an MR among CTs is flattened or saturated by the
fixed window, and nothing else would show it. Looked at is the prepared image, 0..1 in the window, sub-sampled.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from aslseg.cases.prepared_case import Prepared
from aslseg.settings import Settings

SAMPLES = 50_000
QUANTILES = np.linspace(0.005, 0.995, 100)
LEAST_SPREAD = 0.02  # of the window, between the 1st and the 99th percentile
MOST_SATURATED = 0.3  # share of what lies above the window's lower end
MOST_DISTANCE = 0.2  # of the window, from the most similar labelled scan


def unusual_intensities(
    labelled: Sequence[Prepared], unlabelled: Sequence[Prepared], settings: Settings, confirmed: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """Which scans to keep out of training until a person has confirmed them.

    Where most labelled scans do not look like HU, the settings are wrong rather than the scans, and none is left out.
    The distance between two scans is the Wasserstein distance of their intensities.

    Args:
        labelled, unlabelled: Prepared cases.
        settings: ``modality`` and the CT window.
        confirmed: Case ids that ``patients.csv`` confirms.

    Returns:
        Case id to the reason to leave it out, and warnings.
    """
    samples = {c.id: _sample(c) for c in [*labelled, *unlabelled]}
    reasons = {case: _not_hounsfield(values, settings) for case, values in samples.items()}
    strange = [c.id for c in labelled if reasons[c.id]]
    if len(strange) * 2 > len(labelled):
        return {}, [
            f"{len(strange)} of {len(labelled)} labelled scans do not look like Hounsfield units "
            f"({strange[0]}: {reasons[strange[0]]}): modality = mr if they are MR; window_low and window_high if the "
            "window is meant for other organs; else export them with their rescale intercept"
        ]
    profiles = {case: np.quantile(values, QUANTILES) for case, values in samples.items()}
    found = {}
    for case, profile in profiles.items():
        reason = reasons[case] or _unlike(profile, [profiles[c.id] for c in labelled if c.id != case])
        if reason and case not in confirmed:
            found[case] = (
                f"{case}: {reason}; left out of training. If it is right, confirm it in patients.csv (column "
                "intensities: confirmed), else export it again"
            )
    return found, []


def _sample(case: Prepared) -> np.ndarray:
    flat = case.image.reshape(-1)
    return np.asarray(flat[:: max(1, flat.size // SAMPLES)], np.float32)


def _not_hounsfield(values: np.ndarray, settings: Settings) -> str:
    """Why a CT's intensities cannot be HU; empty if they can be."""
    if settings.modality != "ct":
        return ""
    low, high = np.quantile(values, (0.01, 0.99))
    if high - low < LEAST_SPREAD:
        return f"nearly all intensities are the same in the window {settings.window_low:g}..{settings.window_high:g}"
    zero = (0 - settings.window_low) / (settings.window_high - settings.window_low)
    if 0 < zero < 1 and values.min() > zero - 1e-3:
        return "no intensity lies below 0 HU, neither air nor fat"
    inside = values > 1e-3
    saturated = float((values[inside] > 1 - 1e-3).mean()) if inside.any() else 0.0
    if saturated > MOST_SATURATED:
        return f"{saturated:.0%} of its tissue lies above {settings.window_high:g} HU"
    return ""


def _unlike(profile: np.ndarray, labelled: Sequence[np.ndarray]) -> str:
    """How far a scan is from the most similar labelled one, where that is too far."""
    distances = [float(np.abs(profile - other).mean()) for other in labelled]
    if len(distances) < 2 or min(distances) <= MOST_DISTANCE:
        return ""
    return f"its intensities are unlike those of every labelled scan ({min(distances):.2f} of the window apart)"
