"""The arms of bench_loop.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

from aslseg.rounds.folds.fold_share import fold_share
from aslseg.settings.model import MOST_FOLDS
from loop_rounds import ADAPTER, RETRAIN, SAM

DISAGREEMENT = 0.3


@dataclass(frozen=True)
class Arm:
    """A training, a mean of several models' probabilities, or a round.

    Attributes:
        method: SSL method.
        steps: Times ``--steps``.
        masks: Arm whose masks of the unlabelled scans it learns; ``true`` their true labels; empty: none.
        start: Arm from whose model it goes on; empty: random weights.
        confidence: Whether a voxel of a mask weighs max(0.1, |2p - 1|), or 1.
        disagreement: Weight of voxels on which the arms ``ssl`` and ``supervised`` disagree.
        sure: Least |2p - 1| of the voxels of a mask that have a weight at all.
        weight: Weight of a scan with such a mask.
        fraction: Part of the scans that is learned: those on which ``ssl`` and ``supervised`` agree best.
        fold: The part of the labelled scans that is left out, from 0; None: none is.
        members: Arms whose mean it is.
        recipe: Of the round that it is; its model is the retrained one.
        oracle: What the truth says of its masks: ``selection``, which scans have the best ones; ``weights``, which
            voxels are right, the others have weight 0.
    """

    method: str = "supervised"
    steps: float = 1
    masks: str = ""
    start: str = ""
    confidence: bool = True
    disagreement: float = 1
    sure: float = 0
    weight: float = 1
    fraction: float = 1
    fold: int | None = None
    members: tuple[str, ...] = ()
    recipe: str = ""
    oracle: tuple[str, ...] = ()

    @property
    def compares(self) -> bool:
        """Whether it asks where the arms ``ssl`` and ``supervised`` agree."""
        return self.fraction < 1 or self.disagreement < 1

    @property
    def needs(self) -> tuple[str, ...]:
        """Arms that are computed before."""
        compared = ("ssl", "supervised") if self.compares else ()
        masks = (self.masks,) if self.masks not in ("", "true") else ()
        return (*self.members, *masks, *filter(None, [self.start]), *compared)


STUDENT = Arm(masks="ssl")
TODAY = Arm("bcp_mt", RETRAIN, "ssl", "ssl", confidence=False, disagreement=DISAGREEMENT, weight=0.5, fraction=0.5)
MAIN = "ssl,ssl at equal compute,self-training,today,today with the ensemble,distilled,ensemble,true labels for as long"
"""The arms of ``--arms main``."""


def arms(labelled: int, with_folds: bool = True) -> dict[str, Arm]:
    """The arms with so many labelled scans.

    The loop's compute is that of a round: the SSL model, the folds, the second network (here as long as the first one),
    and retraining. ``at equal compute`` and ``for as long`` spend all of it.

    Args:
        labelled: Number of labelled scans.
        with_folds: Whether the round has folds (setting ``label_folds``); with one label it has none.
    """
    count = min(MOST_FOLDS, labelled) if with_folds and labelled > 1 else 0
    folds = {f"fold {n + 1}": Arm("bcp_mt", fold_share(count), fold=n) for n in range(count)}
    loop = 2 + count * fold_share(count) + TODAY.steps
    found = {
        "supervised": Arm(),
        "ssl": Arm("bcp_mt"),
        "ssl at equal compute": Arm("bcp_mt", loop),
        "supervised at equal compute": Arm(steps=loop),
        "self-training": Arm("bcp_mt", loop - 1, "ssl", "ssl", confidence=False),
        "today": TODAY,
        "today for as long": replace(TODAY, steps=loop - 2),
        "today from scratch": replace(TODAY, start="", steps=1),
        "today with confidence": replace(TODAY, confidence=True),
        "today all scans": replace(TODAY, fraction=1),
        "today sure voxels": replace(TODAY, disagreement=0, sure=0.9),
        "today sure voxels of all scans": replace(TODAY, disagreement=0, sure=0.9, fraction=1, weight=1),
        "ssl going on without masks": Arm("bcp_mt", RETRAIN, start="ssl"),
        "student": STUDENT,
        "student for as long": replace(STUDENT, steps=loop - 1),
        "student going on": replace(STUDENT, start="ssl"),
        "student hard masks": replace(STUDENT, confidence=False),
        "student agreed half": replace(STUDENT, fraction=0.5),
        "student case weight 0.5": replace(STUDENT, weight=0.5),
        "student bcp_mt": replace(STUDENT, method="bcp_mt"),
        "student disagreement 0.3": replace(STUDENT, disagreement=DISAGREEMENT),
        "student of the student": replace(STUDENT, masks="student"),
        "true labels": replace(STUDENT, masks="true"),
        "true labels for as long": replace(STUDENT, masks="true", steps=loop),
        "perfect selection": replace(TODAY, oracle=("selection",)),
        "perfect weights": replace(TODAY, oracle=("weights",)),
        "perfect selection and weights": replace(TODAY, oracle=("selection", "weights")),
        "true labels of the agreed half": replace(TODAY, masks="true"),
        "round aslseg": Arm(steps=loop - 1 + SAM + ADAPTER, recipe="aslseg"),
        "round cfr": Arm(steps=loop, recipe="cfr"),
        "round self_training": Arm(steps=loop - 1 + SAM + ADAPTER, recipe="self_training"),
        "round supervised": Arm(steps=loop - 1 + SAM + ADAPTER, recipe="supervised"),
    }
    if count:
        found |= folds | {
            "ensemble": Arm(members=("ssl", *folds)),
            "today with the ensemble": replace(TODAY, masks="ensemble"),
            "student of the ensemble": replace(STUDENT, masks="ensemble"),
            "distilled": Arm("bcp_mt", TODAY.steps + 1, "ensemble"),
            "distilled going on": Arm("bcp_mt", TODAY.steps + 1, "ensemble", "ssl"),
        }
    return found
