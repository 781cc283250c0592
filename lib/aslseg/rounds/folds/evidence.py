"""What human labels say of a round's masks, on cases that the network which drew the mask was not trained on.

Such cases are the validation cases and, by cross-fitting, every labelled case: the model of its fold has not seen its
patient. Masks of a fold are redrawn by SAM and refined by the adaptation network exactly as those of unlabelled scans
are, so that there is a Dice for every source of masks. SAM and the adaptation network learn to correct the masks of
every other fold; these folds say how good the SSL masks are, and nothing of the other sources. Of the folds between
them they have learned the labels with other errors: that raises the agreement and the Dice of their masks slightly,
and training both without each fold would cost more than the SSL models do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from aslseg.agreement.measures import compare
from aslseg.agreement.promise import Pair
from aslseg.cases.prepared_case import Prepared
from aslseg.compute.overlap import dice
from aslseg.models.kinds import ModelKind
from aslseg.models.model_set import ModelSet
from aslseg.rounds.folds.cross_fit import CrossFit, Fold, region_dice, share
from aslseg.rounds.steps.artefacts import CachedProbabilities, mixed
from aslseg.rounds.steps.pipeline import RoundPipeline
from aslseg.types import Labels, ProgressCallback

POOR = 0.5
"""Dice below which a first model is published with a warning."""

MIXED = "mixed"
"""The source whose labels come from several others."""
REFINED = ("sam", "adapter", "consensus")
"""Sources that SAM or the adaptation network have a part in."""

Sources = Mapping[str, CachedProbabilities]
"""Region probabilities by the name of their source."""


@dataclass(frozen=True)
class Scored:
    """A human label and the masks that were drawn without it.

    Attributes:
        case: The scan.
        fold: Whether the model of a fold drew them; otherwise it is a validation case.
        agreement: Dice between the SSL mask and the second network's, by label; None where both are empty, and where
            the second network has learned to correct this very mask.
        dice: Dice with the human label, by source and label; None where both are empty. A label is missing where the
            source has no mask of it here that says anything.
        merged: As ``agreement``, but of each label with everything nested in it.
        learned: Whether SAM and the adaptation network have learned to correct this very mask, so that what they make
            of it says nothing.
    """

    case: str
    fold: bool
    agreement: dict[str, float | None]
    dice: dict[str, dict[str, float | None]]
    merged: dict[str, float | None] = field(default_factory=dict)
    learned: bool = False

    def of(self, source: str) -> dict[str, float | None]:
        """Dice of a source's mask by label, of the SSL mask for the ensemble where that has none; empty if unknown."""
        if source not in self.dice and self.learned and source in REFINED:
            return {}
        return self.dice[source] if source in self.dice else self.dice["ssl"]

    def knows(self, source: str, names: Collection[str]) -> bool:
        """Whether a source has masks of its own of all of these labels that the SSL masks have."""
        return source in self.dice and set(names) & self.dice["ssl"].keys() <= self.dice[source].keys()


@dataclass(frozen=True)
class Evidence:
    """All human labels that masks of a round can be measured on.

    Attributes:
        scored: One for each label.
        names: Of the labels.
    """

    scored: tuple[Scored, ...] = ()
    names: tuple[str, ...] = ()

    def by_label(self, source: str) -> dict[str, list[float]]:
        """Dice of a source's masks by label. A case in which both masks of a label are empty does not count for it.

        All members of the ensemble but one were trained on a labelled case that does not validate; there the mask of
        that one, the SSL mask of the case's fold, stands for it.
        """
        found: dict[str, list[float]] = {name: [] for name in self.names}
        for one in self.scored:
            for name, value in one.of(source).items():
                if value is not None and name in found:
                    found[name].append(value)
        return found

    def pairs(self, source: str, merged: Collection[str] = ()) -> dict[str, list[Pair]]:
        """Agreement and Dice of a source's masks by label, where there is both.

        Args:
            source: Whose masks.
            merged: Labels whose agreement is taken with everything nested in them: those that lie around a label that
                promoted masks leave open, since the agreement of these masks is measured so.
        """
        found: dict[str, list[Pair]] = {name: [] for name in self.names}
        for one in self.scored:
            for name, value in one.of(source).items():
                agreement = one.merged[name] if name in merged else one.agreement[name]
                if value is not None and agreement is not None:
                    found[name].append(Pair(one.case, agreement, value, audited=False))
        return found

    def dice(self, source: str, cases: Sequence[Scored] | None = None) -> float | None:
        """Mean over the labels of the mean over the cases; None without cases."""
        chosen = self if cases is None else Evidence(tuple(cases), self.names)
        means = [float(np.mean(v)) for v in chosen.by_label(source).values() if v]
        return float(np.mean(means)) if means else None

    def compared(self, sources: Iterable[str]) -> dict[str, float | None]:
        """The Dice by which sources are compared: on all human labels.

        What has masks on some of them only is given the SSL masks' Dice on all, plus how far it is better than these
        where it has masks; None where it has none.
        """
        found: dict[str, float | None] = {}
        for source in sources:
            own = [one for one in self.scored if one.knows(source, self.names)]
            ours, theirs, whole = self.dice(source, own), self.dice("ssl", own), self.dice("ssl")
            if ours is None or theirs is None or whole is None:
                found[source] = None
            else:
                # in this order, so that equal sources stay equal to the last bit
                found[source] = whole + (ours - theirs) if len(own) < len(self.scored) else ours
        return found

    def of_label(self, name: str) -> Evidence:
        """The same human labels, of which one label alone counts."""
        return Evidence(self.scored, (name,))


def fill_folds(pipeline: RoundPipeline, crossed: CrossFit, models: ModelSet, report: ProgressCallback) -> None:
    """Redraw and refine the masks of each fold's cases, but for those that SAM and the adaptation network have learned.

    Args:
        pipeline: The round's steps.
        crossed: The folds.
        models: SAM and the adaptation network of the round.
        report: Called with (done, total).
    """
    judges = [fold for fold in crossed.folds if not crossed.learns(fold)]
    for number, fold in enumerate(judges):
        refined = pipeline.predict(ModelKind.ADAPTER, models.with_file(ModelKind.SSL, fold.model))
        pipeline.fill(refined, fold.cases, share(report, number, len(judges)))


def gather(pipeline: RoundPipeline, crossed: CrossFit | None, models: ModelSet, sources: Sources) -> Evidence:
    """Score the masks of a round on validation cases and on the labelled cases of each fold.

    Args:
        pipeline: The round's cases and steps.
        crossed: The folds.
        models: SAM and the adaptation network of the round, which refine the folds' masks.
        sources: Maps of the round's models, ``ssl`` and ``adapter`` among them.
    """
    scored = [_score(pipeline, case, "adapter", sources) for case in pipeline.cases.validation]
    for fold, own in fold_sources(pipeline, crossed, models) if crossed else []:
        scored += [_score(pipeline, case, "adapter", own, fold=True) for case in fold.cases]
    return Evidence(tuple(sorted(scored, key=lambda one: one.case)), pipeline.labels.names)


def fold_sources(
    pipeline: RoundPipeline, crossed: CrossFit, models: ModelSet
) -> list[tuple[Fold, dict[str, CachedProbabilities]]]:
    """The sources of each fold that say how good masks are: where SAM and the adaptation network have learned to
    correct this fold's masks, the SSL masks alone."""
    own = [(fold, models.with_file(ModelKind.SSL, fold.model)) for fold in crossed.folds]
    return [(f, {"ssl": f.maps} if crossed.learns(f) else cascade_sources(pipeline, m)) for f, m in own]


def cascade_sources(pipeline: RoundPipeline, models: ModelSet) -> dict[str, CachedProbabilities]:
    """Maps of each model of a cascade and the mean of the first and the last, ``ssl`` first."""
    ssl, sam, refined = (pipeline.predict(kind, models) for kind in (ModelKind.SSL, ModelKind.SAM, ModelKind.ADAPTER))
    return {"ssl": ssl, "sam": sam, "adapter": refined, "consensus": pipeline.consensus(ssl, refined)}


def mix_sources(
    pipeline: RoundPipeline,
    evidence: Evidence,
    crossed: CrossFit | None,
    models: ModelSet,
    sources: Sources,
    chosen: Mapping[str, str],
) -> tuple[CachedProbabilities, Evidence]:
    """Maps in which each label comes from a source of its own, and the evidence with their Dice as ``mixed``.

    What SAM and the adaptation network make of masks that they have learned says nothing. There a label is scored only
    where they draw neither it nor anything that it lies in or that lies in it, because these shape its mask
    (:func:`aslseg.rounds.steps.artefacts.nest`).

    Args:
        pipeline, crossed, models, sources: As for :func:`gather`.
        evidence: What :func:`gather` has found.
        chosen: Source by label. What the folds have not, the ensemble, is their SSL masks there
            (:meth:`Evidence.by_label`).
    """

    labels = pipeline.labels

    def mix(known: Sources) -> CachedProbabilities:
        return mixed(pipeline.artefacts, labels, [known.get(chosen[name], known["ssl"]) for name in labels.names])

    drawn: dict[str, dict[str, float | None]] = {}
    found = mix(sources)
    for fold, own in fold_sources(pipeline, crossed, models) if crossed else []:
        drawn |= {c.id: region_dice(pipeline, mix(own), c) for c in fold.cases}
        if crossed and crossed.learns(fold):
            for case in fold.cases:
                drawn[case.id] = {name: drawn[case.id][name] for name in _apart(labels, chosen)}
    drawn |= {c.id: region_dice(pipeline, found, c) for c in pipeline.cases.validation}
    scored = tuple(replace(one, dice={**one.dice, MIXED: drawn[one.case]}) for one in evidence.scored)
    return found, Evidence(scored, evidence.names)


def _apart(labels: Labels, chosen: Mapping[str, str]) -> list[str]:
    """The labels that have no refined source in the line from the outermost label to everything nested in them."""
    refined = {n for n, name in enumerate(labels.names) if chosen[name] in REFINED}
    lines = ({*labels.ancestors(n), *(value - 1 for value in labels.members(n))} for n in range(len(labels)))
    return [name for name, line in zip(labels.names, lines, strict=True) if not line & refined]


def validated(pipeline: RoundPipeline, second: str, sources: Sources) -> Evidence:
    """The evidence of a recipe without folds: validation cases only.

    Args:
        pipeline: The round's cases.
        second: The source with which ``ssl`` is compared.
        sources: Maps of the round's models.
    """
    scored = (_score(pipeline, case, second, sources) for case in pipeline.cases.validation)
    return Evidence(tuple(scored), pipeline.labels.names)


def _score(pipeline: RoundPipeline, case: Prepared, second: str, sources: Sources, fold: bool = False) -> Scored:
    labels, found = pipeline.labels, {name: region_dice(pipeline, maps, case) for name, maps in sources.items()}
    if second not in sources:
        unknown = dict.fromkeys(labels.names)
        return Scored(case.id, fold, unknown, found, unknown, learned=True)
    first, other = (pipeline.decode(sources[name](case)) for name in ("ssl", second))
    merged = {n: dice(a, b) for n, a, b in zip(labels.names, labels.regions(first), labels.regions(other), strict=True)}
    return Scored(case.id, fold, compare(first, other, labels).per_label, found, merged)


@dataclass(frozen=True)
class Floors:
    """Which labels human labels allow to be promoted.

    Attributes:
        reasons: Why a label is not promoted, by label.
        unknown: Labels that are not promoted while the label in which they lie is: their voxels are learned as "the
            outer label, or anything in it".
        about: For the summary of a round: Dice, number of cases, floor and reason by label.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    about: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def stored(cls, about: dict[str, dict[str, Any]], labels: Labels) -> Floors:
        """From ``about``, as the summary of a round has it."""
        reasons = {name: known["reason"] for name, known in about.items() if known["reason"] and name in labels.names}
        nested = {name for name, parent in zip(labels.names, labels.parents, strict=True) if parent is not None}
        return cls(reasons, tuple(name for name in reasons if name in nested), about)

    @property
    def blocking(self) -> tuple[str, ...]:
        """Reasons for which no mask is promoted at all."""
        return tuple(reason for name, reason in self.reasons.items() if name not in self.unknown)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a promoted mask does not teach, and why."""
        return tuple(f"not learned from it: {self.reasons[name]}" for name in self.unknown)


def judge_labels(evidence: Evidence, source: str, floors: Mapping[str, float], labels: Labels) -> Floors:
    """Hold the Dice of a source's masks on human labels against the floor of each label.

    A label without a floor (0) is promoted whatever the evidence. A label that lies in one that is not promoted is not
    either.

    Args:
        evidence: Of the round.
        source: Whose masks are promoted.
        floors: Least mean Dice by label.
        labels: With their nesting.
    """
    about: dict[str, dict[str, Any]] = {}
    found = evidence.by_label(source)
    for name, parent in zip(labels.names, labels.parents, strict=True):
        values, floor = found.get(name, []), floors[name]
        outer = None if parent is None else labels.names[parent]
        reason = _too_low(name, values, floor)
        if not reason and outer and about[outer]["reason"]:
            reason = f"{name}: {outer}, in which it lies, is not promoted"
        mean = float(np.mean(values)) if values else None
        about[name] = {"dice": mean, "cases": len(values), "floor": floor, "reason": reason or None}
    return Floors.stored(about, labels)


def _too_low(name: str, values: Sequence[float], floor: float) -> str:
    if not floor:
        return ""
    if not values:
        return (
            f"{name}: no human label that was not trained on shows how good its masks are (promote_floor {floor:g}); "
            "label one more patient who has it"
        )
    mean = float(np.mean(values))
    # written so that NaN fails
    if mean >= floor:
        return ""
    return f"{name}: Dice {mean:.2f} on {_counted(len(values))} not trained on, floor {floor:g} (promote_floor)"


def _counted(labels: int) -> str:
    return "1 human label that was" if labels == 1 else f"{labels} human labels that were"


def first_model(kind: str, found: Mapping[str, Sequence[float]]) -> tuple[str, str]:
    """What is said of the first published model of a kind: nothing is known of a model before it.

    Args:
        kind: ``ssl``, ``sam`` or ``adapter``.
        found: Dice by label on human labels that were not trained on.

    Returns:
        Its Dice by label, to be added to the line of the gate, and a warning where it is poor; empty where it is not.
    """
    shown = [
        f"{name} {np.mean(values):.2f} on {len(values)}" if values else f"{name} on none"
        for name, values in found.items()
    ]
    words = f"; Dice on human labels that were not trained on: {', '.join(shown)}"
    unknown = [name for name, values in found.items() if not values]
    poor = [name for name, values in found.items() if values and not np.mean(values) >= POOR]
    if not unknown and not poor:
        return words, ""
    reasons = [f"{name} has Dice {np.mean(found[name]):.2f}" for name in poor]
    reasons += [f"nothing shows how good {name} is" for name in unknown]
    return words, (
        f"the first {kind} model is published, but {' and '.join(reasons)} on human labels that were not trained on: "
        "check every mask that it draws, and label more patients"
    )
