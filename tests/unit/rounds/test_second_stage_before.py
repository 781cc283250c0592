"""A studies folder whose SSL models are of the version in which the second stage saw the parent's mask as well."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aslseg.cases.studies import read_studies
from aslseg.commands.ledger import ledger_rollback
from aslseg.compute.hardware import resolved
from aslseg.compute.weights import load_weights, read_metadata, save_weights
from aslseg.errors import BadWeightsError, LedgerError
from aslseg.models.cascade import Cascade
from aslseg.models.kinds import ModelKind
from aslseg.models.published import find_published
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.nightly import run_night
from aslseg.rounds.ranking import rank_studies
from aslseg.rounds.run import run_round, train_stage
from aslseg.rounds.scheduling.nights import inputs_hash
from aslseg.settings import Paths, Settings
from aslseg.ssl import engine, networks, predict
from tiny_rounds import published_hashes, tiny_network, tiny_settings, tiny_studies

SAYS = r"saw the mask of liver as well; the next round trains a new one \(Train, or `aslseg round`\)"
PATIENTS = "case,patient,role\n" + "".join(
    f"phantom_00{n},{n},{'train' if n < 3 else 'validation'}\n" for n in range(4)
)
PUBLISHED = "ssl: published, as the one before it does not load"
CONF = {"promote_fraction": 1, "nested_fraction": 0.5}


@dataclass(frozen=True)
class Left:
    """A studies folder that such a round has left."""

    studies: Path
    settings: Settings

    @property
    def paths(self) -> Paths:
        return Paths(self.settings, self.studies)

    @property
    def served(self) -> dict[str, str]:
        return published_hashes(self.settings, self.studies)

    def saw_the_mask(self) -> bool:
        """Whether the SSL model that is served is of that version."""
        model = find_published(self.paths, ModelKind.SSL)
        assert model is not None
        return "channels" in read_metadata(model.path)["stages"]["second"]["liver"]["model"]["options"]

    def forget_predictions(self) -> None:
        """As if the rounds that made them were long ago."""
        for folder in (self.paths.rounds / "steps").glob("predict-*"):
            shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, plausible: None) -> None:
    monkeypatch.setattr(networks, "unet", tiny_network_of_both_stages)


def tiny_network_of_both_stages(classes: int, patch: Any, last_relu: bool = True) -> Any:
    return tiny_network(classes, patch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a round of that version has run."""
    root = tmp_path_factory.mktemp("before")
    studies = tiny_studies(root, cases=5, labelled=4)
    (studies / "patients.csv").write_text(PATIENTS)
    train, stage_model = engine.train, predict.stage_model

    def marked(labelled: Any, unlabelled: Any, chosen: Any, out: Path, **more: Any) -> dict[str, Any]:
        result = train(labelled, unlabelled, chosen, out, **more)
        state, metadata = load_weights(out, "ssl")
        if "options" in metadata:
            save_weights(out, state, metadata | {"options": metadata["options"] | {"channels": 2}})
        return result

    def of_any_version(path: Path, state: Any, metadata: dict[str, Any], chosen: Any) -> Any:
        options = {name: value for name, value in metadata.get("options", {}).items() if name != "channels"}
        return stage_model(path, state, metadata | {"options": options}, chosen)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("aslseg.settings.groups.SECOND_STAGE", 1)
        patched.setattr(networks, "unet", tiny_network_of_both_stages)
        patched.setattr(engine, "STATISTICS_BATCHES", 2)
        patched.setattr(engine, "train", marked)
        patched.setattr(predict, "stage_model", of_any_version)
        run_round(studies, tiny_settings(root, **CONF))
    return root


@pytest.fixture
def left(made: Path, tmp_path: Path) -> Left:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    found = Left(tmp_path / "studies", tiny_settings(tmp_path, **CONF))
    assert found.saw_the_mask()
    return found


def test_a_night_is_due_although_nobody_has_changed_anything(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    found, settings = read_studies(left.studies), resolved(left.settings)
    (row,) = Ledger(left.paths.ledger).rounds()
    assert row.summary["inputs"] != inputs_hash(found, settings)
    monkeypatch.setattr("aslseg.settings.groups.SECOND_STAGE", 1)
    assert row.summary["inputs"] == inputs_hash(found, settings)


def test_the_next_night_trains_anew(left: Left) -> None:
    before = left.served
    with pytest.raises(BadWeightsError, match=SAYS):
        Cascade.published(ModelKind.SSL, left.paths, left.settings)
    summary = run_night(left.studies, left.settings, night="5")
    assert "ssl" in summary["measured"]
    assert summary["published"][0].startswith(PUBLISHED)
    assert not left.saw_the_mask()
    assert left.served["ssl"] != before["ssl"]
    Cascade.published(ModelKind.ADAPTER, left.paths, left.settings)
    # the nights after it do not ask the old model, which was published with the same labels
    left.forget_predictions()
    assert run_night(left.studies, left.settings, night="6")["round"] == summary["round"] + 1


def test_a_single_training_trains_anew_and_a_scan_that_came_in_before_it_is_not_ranked(left: Left) -> None:
    scan = left.studies / "phantom_009.nii.gz"
    shutil.copy(left.studies / "phantom_004.nii.gz", scan)
    with pytest.raises(BadWeightsError, match=SAYS):
        rank_studies(left.studies, left.settings)
    # with it the inputs of the training would be others in any case
    scan.unlink()
    assert train_stage("ssl", left.studies, left.settings)["published"][0].startswith(PUBLISHED)
    assert not left.saw_the_mask()


def test_a_rollback_to_such_a_model_is_refused_or_said_and_the_next_round_trains_again(
    left: Left, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = [f"{name}={value}" for name, value in left.settings.model_dump(exclude_defaults=True).items()]
    summary = run_night(left.studies, left.settings, night="5")
    with pytest.raises(LedgerError, match=r"no earlier ssl model is kept .* still loads; .* --round 2"):
        ledger_rollback(left.studies, model="ssl", conf=conf)
    assert not left.saw_the_mask()
    ledger_rollback(left.studies, number=summary["round"], conf=conf)
    assert left.saw_the_mask()
    assert re.search(f"the published ssl does not load: .*{SAYS}", capsys.readouterr().out)
    again = run_night(left.studies, left.settings, night="6")
    assert again["published"][0].startswith(PUBLISHED)
    assert not left.saw_the_mask()
