"""New human labels are scored by the served models before anything learns from them, each once, and stated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aslseg.cases.studies import ORIGINAL
from aslseg.compute.overlap import dice
from aslseg.models.published import list_published, manifest
from aslseg.review.page import render
from aslseg.review.report import headline, write
from aslseg.review.status import collect
from aslseg.rounds.gate import fresh
from aslseg.rounds.gate.fresh import FRESH, pooled, with_fresh_dice
from aslseg.rounds.ledger.ledger import Entry, Event, Ledger
from aslseg.rounds.run import run_round, train_stage
from aslseg.rounds.steps.pipeline import RoundPipeline
from aslseg.settings import Paths, Settings
from aslseg.volume.io import read_image, write_label
from tiny_rounds import Judged, published_hashes, tiny_settings, tiny_studies

STORE = {"total": 3, "completed": 1, "label_tags": {"final": 1}}
ROLES = (
    "case,patient,role\nphantom_000,a,train\nphantom_001,b,validation\nphantom_002,c,train\nphantom_003,d,validation\n"
)
SHORT = {
    "ssl_iterations": 1,
    "retrain_iterations": 1,
    "sam_iterations": 1,
    "adapter_iterations": 1,
    "promote_fraction": 0,
}


def folder(root: Path, **conf: object) -> tuple[Path, Settings, Ledger]:
    """One label to learn from, one that validates; nothing is promoted unless a test asks for it."""
    studies, settings = tiny_studies(root, cases=5, labelled=2), tiny_settings(root, **SHORT | conf)
    (studies / "patients.csv").write_text(ROLES)
    return studies, settings, Ledger(Paths(settings, studies).ledger)


def label(studies: Path, case: str) -> Path:
    """A person labels a scan."""
    return Path(shutil.copy(studies.with_name("studies_truth") / f"{case}.nii.gz", studies / "labels" / "final"))


def correct(path: Path) -> None:
    """A person corrects a label."""
    volume = read_image(path)
    array = volume.array.astype(np.uint8)
    array[:2] = 0
    array[0, 0, 0] = 1
    write_label(path, array, volume.affine)


def scored(ledger: Ledger) -> list[tuple[int | None, str | None]]:
    return [(e.round, e.case) for e in ledger.events(kinds=(FRESH,))]


@pytest.mark.usefixtures("plausible", "trainings")
def test_a_new_label_is_scored_once_and_before_it_is_learned(tmp_path: Path, judged: Judged) -> None:
    judged(lambda _: 0.5)
    studies, settings, ledger = folder(tmp_path)
    assert run_round(studies, settings)["fresh"] == {}, "nothing was served yet"
    served = published_hashes(settings, studies)
    shown = read_image(studies / "labels" / ORIGINAL / "phantom_002.nii.gz").array
    path = label(studies, "phantom_002")
    summary = run_round(studies, settings)
    assert published_hashes(settings, studies)["ssl"] != served["ssl"], "it is learned by now"
    assert scored(ledger) == [(2, "phantom_002")], "phantom_001 has judged the models that are served"
    (event,) = ledger.events(kinds=(FRESH,))
    assert event.details["models"] == served
    assert set(event.details["dice"]) == {"ssl", "sam", "adapter", "shown"}
    expected = dice(shown > 0, read_image(path).array > 0)
    assert event.details["dice"]["shown"]["liver"] == pytest.approx(expected)
    assert summary["fresh"] == pooled(ledger.events(kinds=(FRESH,)))
    assert summary["fresh"]["shown"]["liver"] == {"dice": pytest.approx(expected), "scans": 1}
    order = [e.kind for e in ledger.events(number=2)]
    assert order.index(FRESH) < order.index("scored") < order.index("published")

    # corrections: of a case that was learned, and of one that has judged
    correct(path)
    correct(studies / "labels" / "final" / "phantom_001.nii.gz")
    # a label that will judge is fresh in the first round that sees it
    later = label(studies, "phantom_003")
    run_round(studies, settings)
    assert scored(ledger)[1:] == [(3, "phantom_003")]
    correct(later)
    run_round(studies, settings)
    assert len(scored(ledger)) == 2


@pytest.mark.usefixtures("plausible", "trainings")
def test_what_a_model_has_learned_anything_of_is_not_fresh(tmp_path: Path, judged: Judged) -> None:
    judged(lambda _: 0.5)
    studies, settings, ledger = folder(tmp_path, promote_fraction=1, promote_empty=1)
    (studies / "patients.csv").write_text(f"{ROLES}phantom_004,a,train\n")
    promoted = run_round(studies, settings)["promoted"]
    assert "phantom_002" in promoted
    label(studies, "phantom_002")  # the published model learned the machine's mask of it
    label(studies, "phantom_004")  # another scan of a patient that it learned from
    run_round(studies, settings)
    assert scored(ledger) == []
    assert next(e.case for e in ledger.events(kinds=("checked",))) == "phantom_002"


@pytest.mark.usefixtures("quick", "trainings")
def test_a_label_that_is_corrected_before_a_model_learns_it_is_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies, settings, ledger = folder(tmp_path)
    train_stage("ssl", studies, settings)
    served = manifest(Paths(settings, studies))["ssl"]["sha256"]
    path = label(studies, "phantom_002")

    def harsh(self: Any, maps: Any, cases: Any = None) -> float | None:
        """Every new model is clearly worse than the published one."""
        weights = json.loads((maps.folder / "inputs.json").read_text())["ssl"]
        return 0.8 if weights == served else 0.1

    monkeypatch.setattr(RoundPipeline, "dice", harsh)
    assert "not published" in train_stage("ssl", studies, settings)["published"][0]
    assert scored(ledger) == [(None, "phantom_002")]
    train_stage("ssl", studies, settings)
    assert len(scored(ledger)) == 1
    correct(path)
    train_stage("ssl", studies, settings)
    assert scored(ledger) == [(None, "phantom_002")] * 2
    assert pooled(ledger.events(kinds=(FRESH,)))["ssl"]["liver"]["scans"] == 1, "of a scan the last counts"


def test_a_round_that_goes_on_asks_for_the_models_of_before(tmp_path: Path) -> None:
    studies, settings, ledger = folder(tmp_path)
    one, two = ({"ssl": {"sha256": digit, "file": digit}} for digit in "12")

    class Round:
        paths, number = Paths(settings, studies), 2

    Round.ledger = ledger  # type: ignore[attr-defined]
    ledger.append([Entry("published", 2, details={"before": {}, "after": two, "why": []})])
    assert fresh.entries_before(Round) == {}, "its own models are none of before"  # type: ignore[arg-type]
    ledger.append([Entry("published", None, details={"before": two, "after": one, "why": "rollback"})])
    assert fresh.entries_before(Round) == one  # type: ignore[arg-type]
    Round.number = 3
    assert fresh.entries_before(Round) == manifest(Round.paths)  # type: ignore[arg-type]


def test_pages_reports_and_info_state_it(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    studies = tiny_studies(tmp_path, cases=2, labelled=1)
    paths = Paths(settings, studies)
    ledger = Ledger(paths.ledger)
    page = render(collect(settings, paths, STORE))
    assert "No new human label has been scored yet" in page
    dices = ({"liver": 0.9, "tumour": 0.3}, {"liver": 0.8, "tumour": None})
    about = [{"dice": {"ssl": d}, "models": {}, "label": str(n)} for n, d in enumerate(dices)]
    entries = [Entry(FRESH, 2, f"c{n}", details=a) for n, a in enumerate(about)]
    ledger.append([Entry("opened", 2), *entries])
    found: list[Event] = ledger.events(kinds=(FRESH,))
    classes = {"liver": {"dice": 0.97, "cases": 1}, "tumour": {"dice": 0.6, "cases": 1}}
    ledger.close_round(2, {"fresh": pooled(found), "classes": classes, "validation": {"ssl": 0.97}})

    page = render(collect(settings, paths, STORE))
    assert "liver <b>0.850</b> on 2 scans, tumour <b>0.300</b> on 1 scan" in page
    path, content = write(paths, settings, 2)
    report = path.read_text()
    assert '<td>liver</td><td class="n">0.850</td><td class="n">2</td><td class="n">0.970</td>' in report
    assert "each scored before a model learned from it" in report
    assert "Mostly right. Expect small corrections, and look at every slice. Uncertain: measured on 2 scans." in report
    assert headline(content)["classes"] == {"liver": pytest.approx(0.85), "tumour": pytest.approx(0.3)}
    assert headline(content)["scans"] == {"liver": 2, "tumour": 1}

    models = with_fresh_dice([{"kind": "ssl"}, {"kind": "sam"}], settings, studies)
    assert models[0] == {"kind": "ssl", "fresh_dice": pytest.approx(0.575), "fresh_scans": 2}
    assert models[1] == {"kind": "sam", "fresh_dice": None, "fresh_scans": 0}
    assert with_fresh_dice(list_published(settings, studies), settings, None) == []
