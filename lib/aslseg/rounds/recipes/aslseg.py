"""What a round does, in order. A recipe is a function of the stages and the round's number."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aslseg.agreement.measures import Agreement, compare
from aslseg.agreement.verdict import Verdict, judge, select
from aslseg.cases.prepared import Prepared
from aslseg.cases.studies import ORIGINAL, PSEUDO, read_studies
from aslseg.models.files import ModelSet
from aslseg.rounds.artefacts import CachedProbabilities
from aslseg.rounds.gate import publish_better
from aslseg.rounds.ledger import Score
from aslseg.rounds.masks import plan_label_changes, sync_label_files
from aslseg.rounds.pipeline import Promoted, RoundPipeline
from aslseg.types import ProgressCallback

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaseAssessment:
    """What both networks make of one scan."""

    agreement: Agreement
    verdict: Verdict


def aslseg(stages: RoundPipeline, number: int) -> dict[str, Any]:
    """SSL proposes, SAM redraws, the adapter refines; where SSL and adapter agree, the mask is learned from.

    Returns:
        The summary: validation Dice, source of the masks, promoted cases, what was published and why.
    """
    team, progress = stages.team, stages.progress
    before = stages.promoted_before()
    with progress.stage("ssl") as report:
        ssl = stages.train_ssl(before, report)
    with progress.stage("predict") as report:
        regions = stages.fill(stages.predict(ssl), [*team.waiting, *team.validation], report)
    with progress.stage("sam") as report:
        sam = stages.train_sam(report)
    with progress.stage("redraw") as report:
        redrawn = stages.fill(stages.redraw(sam, regions), [*team.waiting, *team.validation], report)
    with progress.stage("adapter") as report:
        adapter = stages.train_adapter(sam, report)
    with progress.stage("refine") as report:
        refined = stages.fill(stages.refine(adapter, redrawn, regions), [*team.waiting, *team.validation], report)
    first = ModelSet(ssl, sam, adapter)
    source, masks, dice = choose_source(stages, regions, refined)
    with progress.stage("rank") as report:
        judged = rank(stages, number, first, regions, refined, masks, report)
    with progress.stage("promote") as report:
        wanted = promotable(stages, first, source, masks, judged, regions, refined, report)
        chosen = promote(stages, number, wanted)
    with progress.stage("retrain") as report:
        retrained = stages.train_ssl(chosen, report)
    with progress.stage("publish") as report:
        best, lines, gated = publish_better(stages, number, first, retrained, [p.case.id for p in chosen], report)
    with progress.stage("originals") as report:
        shown, masks = choose_shown(stages, source, masks, best)
        stages.fill(masks, team.waiting, report)
        write_originals(stages, number, best, shown, masks, judged, report)
    return {
        "validation": dice | gated,
        "source": source,
        "shown": shown,
        "promoted": [p.case.id for p in chosen],
        "agreement": {c: j.agreement.mean for c, j in sorted(judged.items())},
        "published": lines,
        "models": {"ssl": str(ssl), "sam": str(sam), "adapter": str(adapter), "retrained": str(retrained)},
    }


def choose_source(
    stages: RoundPipeline, regions: CachedProbabilities, refined: CachedProbabilities
) -> tuple[str, CachedProbabilities, dict[str, float | None]]:
    """Whose mask is promoted: the best on the validation cases (science.md §6.4, the safety valve).

    The adapter helps a weak SSL model and can hurt a strong one; the labelled cases say which it is. Without
    validation cases, or where they are equal, the SSL model's.

    Returns:
        ``ssl``, ``adapter`` or ``consensus``; its maps; the validation Dice of all three.
    """
    candidates = {"ssl": regions, "adapter": refined, "consensus": stages.consensus(regions, refined)}
    dice = {name: stages.dice(maps) for name, maps in candidates.items()}
    source = max(candidates, key=lambda name: -1.0 if dice[name] is None else dice[name])  # type: ignore[arg-type, return-value]
    logger.info("masks are taken from %s (validation Dice %s)", source, dice)
    return source, candidates[source], dice


def rank(
    stages: RoundPipeline,
    number: int | None,
    models: ModelSet,
    regions: CachedProbabilities,
    refined: CachedProbabilities,
    masks: CachedProbabilities,
    report: ProgressCallback,
) -> dict[str, CaseAssessment]:
    """Agreement between the SSL and the adapter's mask of every waiting scan, on the working grid, into the ledger."""
    judged = {}
    for done, case in enumerate(stages.team.waiting, 1):
        agreement = compare(stages.decode(regions(case)), stages.decode(refined(case)), stages.labels)
        mask = stages.decode(masks(case))
        verdict = judge(agreement, mask, case.grid.spacing, stages.reference, stages.settings, case.image.shape)
        judged[case.id] = CaseAssessment(agreement, verdict)
        report(done, len(stages.team.waiting))
    stages.ledger.set_scores(
        Score(
            case,
            number,
            j.agreement.mean,
            {
                "per_label": j.agreement.per_label,
                "flags": list(j.agreement.flags),
                "promote": j.verdict.promote,
                "reasons": list(j.verdict.reasons),
                "models": models.hashes,
            },
        )
        for case, j in judged.items()
    )
    return judged


def promotable(
    stages: RoundPipeline,
    models: ModelSet,
    source: str,
    masks: CachedProbabilities,
    judged: dict[str, CaseAssessment],
    regions: CachedProbabilities,
    refined: CachedProbabilities,
    report: ProgressCallback,
) -> dict[str, dict[str, Any]]:
    """Keep the masks of the scans on which the networks agree best; case to what the ledger says of its promotion."""
    s, team = stages.settings, stages.team
    cases = {c.id: c for c in team.unlabelled}
    verdicts = {c: judged[c].verdict for c in cases}
    agreements = {c: judged[c].agreement for c in cases}
    names, wanted = select(verdicts, agreements, s.promote_fraction), {}
    for done, name in enumerate(names, 1):
        wanted[name] = {
            "sha256": keep_mask(stages, cases[name], masks),
            "disagreement": keep_disagreement(stages, cases[name], regions, refined),
            "image": team.content[name],
            "source": source,
            "agreement": agreements[name].per_label,
            "threshold": s.thresholds,
            "models": models.hashes,
        }
        report(done, len(names))
    return wanted


def promote(stages: RoundPipeline, number: int, wanted: dict[str, dict[str, Any]]) -> list[Promoted]:
    """Promote: ledger first, then the label files. A scan that a human has labelled meanwhile is left out."""
    cases = {c.id: c for c in stages.team.unlabelled}
    record(stages, number, PSEUDO, wanted)
    now = stages.ledger.masks(PSEUDO)
    return [stages.promoted(cases[n], d) for n, d in sorted(wanted.items()) if n in now and now[n].kind == "mask"]


def record(stages: RoundPipeline, number: int, tag: str, wanted: dict[str, dict[str, Any]]) -> None:
    """Append what changes for a tag, then make the label files follow."""
    studies = read_studies(stages.paths.studies or Path())
    stages.ledger.append(plan_label_changes(stages.ledger, studies, tag, number, wanted))
    sync_label_files(stages.ledger, studies, stages.paths)


def keep_mask(stages: RoundPipeline, case: Prepared, masks: CachedProbabilities) -> str:
    """Keep a case's mask on its scan's own grid; returns its hash."""
    return stages.masks.add(case.grid.regions_to_native(masks(case), stages.labels), case.grid.affine)


def keep_disagreement(
    stages: RoundPipeline, case: Prepared, regions: CachedProbabilities, refined: CachedProbabilities
) -> str:
    """Keep where both networks disagree, as a 0/1 map on the scan's own grid; returns its hash."""
    differ = stages.decode(regions(case)) != stages.decode(refined(case))
    return stages.masks.add(case.grid.to_native(differ.astype("float32")) >= 0.5, case.grid.affine)


def choose_shown(
    stages: RoundPipeline, source: str, masks: CachedProbabilities, best: ModelSet
) -> tuple[str, CachedProbabilities]:
    """Whose masks clients see: the round's source, or the published SSL model where it is better by validation."""
    model = stages.predict(best.ssl)
    ours, theirs = stages.dice(masks), stages.dice(model) if best.spacing == stages.team.spacing else None
    if ours is not None and theirs is not None and theirs > ours:
        return "published ssl", model
    return source, masks


def write_originals(
    stages: RoundPipeline,
    number: int,
    models: ModelSet,
    shown: str,
    masks: CachedProbabilities,
    judged: dict[str, CaseAssessment],
    report: ProgressCallback,
) -> None:
    """The best current mask of every waiting scan to ``labels/original``, ledger first."""
    promoted = {c for c, e in stages.ledger.masks(PSEUDO).items() if e.kind == "mask"}
    wanted = {}
    for done, case in enumerate(stages.team.waiting, 1):
        wanted[case.id] = {
            "sha256": keep_mask(stages, case, masks),
            "image": stages.team.content[case.id],
            "source": shown,
            "params": {"label_names": stages.labels.values},
            "agreement": judged[case.id].agreement.mean,
            "per_label": judged[case.id].agreement.per_label,
            "promoted": case.id in promoted,
            "models": models.hashes,
        }
        report(done, len(stages.team.waiting))
    record(stages, number, ORIGINAL, wanted)
