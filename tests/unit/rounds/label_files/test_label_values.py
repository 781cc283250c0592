"""Label files hold numbers: a label may not move to another one, unless a person says that it had the wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from aslseg.cli import app
from aslseg.errors import BadSettingsError
from aslseg.rounds.label_files.label_values import require_same_values
from aslseg.rounds.ledger.ledger import Entry, Ledger
from aslseg.rounds.run import run_round, train_stage
from aslseg.settings import Paths
from tiny_rounds import label_hashes, tiny_settings, tiny_studies


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A folder with labels and a round of liver and tumour."""
    studies = tiny_studies(tmp_path, cases=2, labelled=2)
    ledger = Ledger(Paths(tiny_settings(tmp_path), studies).ledger)
    ledger.append([Entry("opened", 1, details={"settings": {"labels": ["liver", "tumour"]}})])
    ledger.close_round(1, {})
    return ledger


@pytest.mark.parametrize("names", ["liver,cyst,tumour", "tumour,liver", "tumour"])
def test_a_label_that_has_moved_starts_nothing(ledger: Ledger, tmp_path: Path, names: str) -> None:
    studies, settings = tmp_path / "studies", tiny_settings(tmp_path, labels=names, nested="")
    before, events = label_hashes(studies), ledger.events()
    for start in (run_round, lambda *given: train_stage("ssl", *given)):
        with pytest.raises(BadSettingsError, match=r"would have [123] with labels = ") as found:
            start(studies, settings)
    assert "Expected the order of before with new labels last: liver,tumour" in str(found.value)
    assert (label_hashes(studies), ledger.events()) == (before, events)


@pytest.mark.parametrize("names", ["liver,tumour", "liver,tumour,cyst", "liver", "liver,lesion"])
def test_new_labels_at_the_end_and_new_names_are_accepted(ledger: Ledger, tmp_path: Path, names: str) -> None:
    require_same_values(ledger, tmp_path / "studies", tiny_settings(tmp_path, labels=names, nested=""))


def test_nothing_has_moved_where_nothing_is_drawn(ledger: Ledger, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, labels="tumour,liver", nested="")
    require_same_values(ledger, None, settings)
    for path in (tmp_path / "studies" / "labels").rglob("*.nii.gz"):
        path.unlink()
    require_same_values(ledger, tmp_path / "studies", settings)


def test_a_person_may_say_that_the_order_of_before_was_wrong(ledger: Ledger, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, labels="tumour,liver", nested="")
    conf = ["--conf", "labels=tumour,liver", "--conf", "nested="]
    found = CliRunner().invoke(app, ["ledger", "labels", "--studies", str(tmp_path / "studies"), *conf])
    assert (found.exit_code, found.output) == (0, "noted: tumour = 1, liver = 2\n")
    require_same_values(ledger, tmp_path / "studies", settings)
    with pytest.raises(BadSettingsError):
        require_same_values(ledger, tmp_path / "studies", tiny_settings(tmp_path, labels="liver,tumour", nested=""))
