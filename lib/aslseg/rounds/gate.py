"""The publishing gate over a round's cases: no model is replaced by one that the human labels call worse."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aslseg.adaptation import predict as adapter_predict
from aslseg.cases.prepared import Prepared
from aslseg.files import sha256
from aslseg.models import published
from aslseg.models.files import ModelSet
from aslseg.models.published import Candidate, Published, gate
from aslseg.rounds.artefacts import CachedProbabilities
from aslseg.rounds.ledger import Entry
from aslseg.rounds.pipeline import RoundPipeline, usable
from aslseg.sam.modeling import build as sam_build
from aslseg.ssl import predict as ssl_predict
from aslseg.types import ProgressCallback

logger = logging.getLogger(__name__)


def publish_better(
    stages: RoundPipeline,
    number: int | None,
    first: ModelSet,
    retrained: Path,
    promoted: Sequence[str],
    report: ProgressCallback,
    kinds: Sequence[str] = published.KINDS,
) -> tuple[ModelSet, list[str], dict[str, float | None]]:
    """Compare each model with the published one of its kind on the same validation cases, and publish the better.

    SSL comes first; SAM is then judged by its redrawing of the winner's masks, the adapter by its refinement of
    that: what is published works together. Validation cases that the published model was trained on (it may be
    older than their role) are left out, as long as others remain.

    Args:
        stages: The round's cases and steps.
        number: The round; None for a single training.
        first: Models of this round before retraining.
        retrained: The SSL model after it.
        promoted: Cases that it learned from besides the human ones.
        report: Told after each kind.
        kinds: Only these are published.

    Returns:
        The models that are published now, a line per kind saying why, and the candidates' validation Dice.
    """
    best, lines, dice, chosen = replace(first, ssl=_better_ssl(stages, first.ssl, retrained)), [], {}, []
    foreign = False
    for done, kind in enumerate(kinds, 1):
        current = _comparable(stages, kind)
        learned = tuple(sorted([c.id for c in stages.team.train] + (list(promoted) if kind == "ssl" else [])))
        candidate = _judge(stages, kind, best, current, learned)
        accepted, line = gate(candidate, current, stages.settings.gate_tolerance)
        if foreign and kind != "ssl":
            accepted, line = False, f"{kind}: not published; the published ssl works on another spacing"
        if accepted:
            chosen.append(candidate)
        elif current is not None:
            best = replace(best, **{kind: current.path})
            foreign = kind == "ssl" and best.spacing != stages.team.spacing
        if kind == "ssl":
            name = "retrained" if candidate.path == retrained and retrained != first.ssl else "ssl"
            dice["retrained"] = stages.dice(stages.predict(retrained))
            line += f" [{name}]"
        logger.info("%s", line)
        lines.append(line)
        dice[f"published {kind}"] = candidate.dice if accepted else candidate.published_dice
        report(done, len(kinds))
    _serve(stages, number, chosen, lines)
    return best, lines, dice


def _serve(stages: RoundPipeline, number: int | None, chosen: list[Candidate], lines: list[str]) -> None:
    """Switch the manifest to the chosen models, if that changes anything."""
    before = published.manifest(stages.paths)
    after = published.stage_files(stages.paths, chosen, number)
    if after != before:
        # the ledger first: whatever is served can be taken back
        noted = [e.details["after"] for e in stages.ledger.events(("published",), number=number) if number]
        if noted and _hashes(noted[-1]) == _hashes(after):
            after = noted[-1]  # killed between the two
        else:
            stages.ledger.append([Entry("published", number, details={"before": before, "after": after, "why": lines})])
        published.put_manifest(stages.paths, after)
    published.prune(stages.paths)


def _hashes(models: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {kind: entry["sha256"] for kind, entry in models.items()}


def _better_ssl(stages: RoundPipeline, before: Path, after: Path) -> Path:
    """The retrained model unless validation says that retraining made it worse."""
    a, b = stages.dice(stages.predict(before)), stages.dice(stages.predict(after))
    return before if a is not None and b is not None and a > b else after


def _comparable(stages: RoundPipeline, kind: str) -> Published | None:
    current = published.find_published(stages.paths, kind, check=True)
    if current is None:
        return None
    path, loads = (
        current.path,
        {"ssl": ssl_predict.load, "sam": sam_build.load, "adapter": adapter_predict.load},
    )
    return current if usable(lambda: loads[kind](path, stages.settings), kind) else None


def _judge(
    stages: RoundPipeline, kind: str, best: ModelSet, current: Published | None, learned: tuple[str, ...]
) -> Candidate:
    """Dice of a candidate and of the published model on the same cases, each on its own working grid."""
    path: Path = getattr(best, kind)
    everyone = stages.team.validation
    fair = [c for c in everyone if current is None or c.id not in current.trained_on] or everyone
    dice = stages.dice(_maps(stages, kind, best), fair)
    theirs = None
    if current is not None and current.sha256 == sha256(path):
        theirs = dice
    elif current is not None:
        other = replace(best, **{kind: current.path})
        theirs = stages.dice(_maps(stages, kind, other), _on_grid(stages, kind, other, fair))
    return Candidate(kind, path, dice, theirs, len(fair), learned)


def _maps(stages: RoundPipeline, kind: str, cascade: ModelSet) -> CachedProbabilities:
    """What a model makes of the cases, given the models before it."""
    regions = stages.predict(cascade.ssl)
    if kind == "ssl":
        return regions
    redrawn = stages.redraw(cascade.sam, regions)
    return redrawn if kind == "sam" else stages.refine(cascade.adapter, redrawn, regions)


def _on_grid(stages: RoundPipeline, kind: str, cascade: ModelSet, cases: list[Prepared]) -> list[Prepared]:
    wanted = {c.id for c in cases}
    grid = cascade.spacing if kind == "ssl" else stages.team.spacing
    return [c for c in stages.validation_at(grid) if c.id in wanted]
