"""How the predictions of a round are named on disk, and how they are found again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aslseg.compute.hardware import resolved
from aslseg.models.cascade import NEEDS, StageOutput
from aslseg.models.kinds import ModelKind
from aslseg.models.model_set import ModelSet
from aslseg.rounds.ledger.ledger import Score
from aslseg.rounds.steps.artefacts import folder_name, read_probabilities
from aslseg.settings import Paths, Settings, relevant


@dataclass(frozen=True)
class PredictionStep:
    """How the predictions of a kind of model are named on disk; another name would not find those made before.

    Attributes:
        name: First part of the folder's name.
        output: Key of this folder among the inputs of later steps.
        settings: Groups of settings that the result depends on.
        single: Settings beside the groups that it depends on.
    """

    name: str
    output: str
    settings: tuple[str, ...] = ()
    single: tuple[str, ...] = ()


PREDICTION_STEPS = {
    ModelKind.SSL: PredictionStep("predict", "regions", ("predict",)),
    ModelKind.SAM: PredictionStep("redraw", "redrawn", ("prompts",)),
    ModelKind.ADAPTER: PredictionStep("refine", "refined", ("predict",)),
    ModelKind.CANVAS: PredictionStep("draw", "drawn", single=("sam_canvas",)),
}


def prediction_inputs(kind: ModelKind, models: ModelSet, settings: Settings) -> dict[str, Any]:
    """All that the predictions of a model depend on: its hash, settings, and the predictions that it is given.

    Args:
        kind: The last model.
        models: It, and those that it needs.
        settings: Resolved settings.
    """
    step = PREDICTION_STEPS[kind]
    return {
        kind.value: models.sha256(kind),
        "settings": relevant(settings, *step.settings),
        **{PREDICTION_STEPS[need].output: prediction_folder(need, models, settings) for need in NEEDS[kind]},
        **{name: getattr(settings, name) for name in step.single},
    }


def prediction_folder(kind: ModelKind, models: ModelSet, settings: Settings) -> str:
    """The name of the folder with a model's predictions."""
    return folder_name(PREDICTION_STEPS[kind].name, prediction_inputs(kind, models, settings))


def find_prediction(
    kind: ModelKind, score: Score, image_hash: str, paths: Paths, settings: Settings
) -> StageOutput | None:
    """Region probabilities (R, i, j, k) on the working grid, and notes, that the round kept when it measured a score.

    Args:
        kind: ``ssl``, ``sam`` or ``adapter``.
        score: Names the scan and the round's models.
        image_hash: SHA-256 of the scan's file.
        paths: Where the round's files are.
        settings: As the round had them; with others nothing is found.

    Returns:
        None if there are none, or they are of another version of the scan.
    """
    hashes = {ModelKind(name): digest for name, digest in score.details.get("models", {}).items()}
    if not {kind, *NEEDS[kind]} <= set(hashes):
        return None
    models = ModelSet(dict.fromkeys(hashes, Path()), hashes)
    folder = paths.rounds / "steps" / prediction_folder(kind, models, resolved(settings))
    return read_probabilities(folder, score.case, image_hash)
