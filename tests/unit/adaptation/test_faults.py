"""Masks with errors for training: real ones, and synthetic ones as severe as these."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from aslseg.adaptation.faults import Faults, fit_severities
from aslseg.adaptation.severity import Truth, median_dice
from aslseg.adaptation.train import redraw_bank
from aslseg.cases.prepared_case import Prepared
from aslseg.compute.overlap import dice
from aslseg.settings import Settings
from aslseg.types import Labels, no_progress

PAIR = Labels.parse("liver,tumour", "tumour:liver")


def test_half_of_the_masks_are_real_where_there_are_any(scan: Callable[[int], Prepared]) -> None:
    real = np.full((2, 40, 36, 20), 0.25, np.float32)
    faults, rng = Faults(PAIR, real={"scan0": lambda case: real}), np.random.default_rng(0)
    drawn = [faults(scan(0), rng) is real for _ in range(40)]
    assert 10 < sum(drawn) < 30
    synthetic = faults(scan(1), rng)
    assert synthetic.shape == real.shape
    assert 0 <= synthetic.min() < 0.5 < synthetic.max() <= 1


def test_each_label_has_errors_of_its_own_severity(scan: Callable[[int], Prepared]) -> None:
    case = scan(0)
    truth, image = PAIR.regions(np.asarray(case.label)), np.asarray(case.image)
    rng = np.random.default_rng(0)
    mild = [Faults(PAIR, (0.02, 1.0)).corrupt(truth, image, case.grid.spacing, rng) for _ in range(16)]
    livers, tumours = (np.median([dice(m[n], truth[n]) or 0 for m in mild]) for n in (0, 1))
    assert livers > 0.95
    assert tumours < 0.9


def test_synthetic_errors_are_fitted_to_real_ones(scan: Callable[[int], Prepared]) -> None:
    """Median Dice within 0.05 of the real one, label by label; a label that no case holds keeps the usual severity."""
    cases = [scan(seed) for seed in range(3)]
    dices = zip(cases, (0.7, 0.9, 0.95), strict=True)
    real = {case.id: {"liver": value, "tumour": value - 0.3} for case, value in dices}
    told: list[tuple[int, int]] = []
    most = fit_severities(cases, PAIR, real, np.random.default_rng(1), lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)]
    for region, target in enumerate((0.9, 0.6)):
        truths = [Truth(PAIR.regions(np.asarray(c.label))[region], np.asarray(c.image), c.grid.spacing) for c in cases]
        assert median_dice(truths, most[region], 9, 100) == pytest.approx(target, abs=0.05)
    unknown = {case.id: {"liver": None, "tumour": None} for case in cases}
    assert fit_severities(cases, PAIR, unknown, np.random.default_rng(1)) == (1, 1)


def test_sam_redraws_real_masks_for_the_adaptation_network(
    scan: Callable[[int], Prepared], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aslseg.sam.predictor import redraw

    monkeypatch.setattr(redraw, "redraw", lambda sam, image, ssl, settings: ssl)
    real = np.full((2, 40, 36, 20), 0.4, np.float32)
    faults, sam = Faults(settings.label_set, real={"scan1": lambda case: real}), object()
    cases = [scan(seed) for seed in range(2)]
    bank = redraw_bank(cases, sam, settings, np.random.default_rng(0), no_progress, faults)  # type: ignore[arg-type]
    are_real = [[bool((r.ssl == 102).all()) for r in redraws] for redraws in bank]
    assert not any(are_real[0])
    assert any(are_real[1])
