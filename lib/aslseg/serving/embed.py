"""Overnight: the slices of the scans that the strategies hand out next, encoded before anybody clicks."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.cases.studies import ORIGINAL, read_studies
from aslseg.errors import AslsegError, BadImageError
from aslseg.models.kinds import ModelKind
from aslseg.models.loaded import Models
from aslseg.rounds.ledger import Ledger
from aslseg.serving.open_scans import ScanCache, SliceOrientation
from aslseg.settings import Paths, Settings
from aslseg.types import ProgressCallback, no_progress
from aslseg.volume.io import read_image, require_free_disk

logger = logging.getLogger(__name__)

MARGIN = 5  # slices beyond the automatic mask
FULL = 0.9  # of the disk limit: beyond, new embeddings would push out those made a moment ago


def embed_studies(
    studies: Path, settings: Settings, cases: int, report: ProgressCallback = no_progress
) -> dict[str, Any]:
    """Encode scans without a human label, lowest agreement first, unscored ones last.

    Only slices within the automatic mask (tag ``original``) and a few beyond; without one, all. What is on disk
    already costs nothing; a scan that cannot be read is passed over.

    Args:
        studies: Studies folder.
        settings: As the server's: window, SAM and ``embedding_disk_gb`` decide what will be found again.
        cases: How many scans at most.
        report: Progress in slices of the current scan.

    Returns:
        ``cases`` (ids), ``slices``, ``encoded``, ``skipped`` (id to reason), ``full`` (limit reached), ``seconds``.

    Raises:
        BadWeightsError, NotEnoughCasesError, DiskFullError: As loading SAM, listing the folder, and the disk say.
    """
    from aslseg.sam.clicks.session import ClickSession
    from aslseg.sam.predictor.embedding_store import EmbeddingStore
    from aslseg.sam.predictor.embeddings import EmbeddingCache

    paths, started = Paths(settings, studies), time.monotonic()
    require_free_disk(paths.home, settings.min_free_gb)
    model, pictures = Models(settings, paths).get(ModelKind.SAM), ScanCache(settings)
    limit = settings.embedding_disk_gb * 1e9
    store = EmbeddingStore(paths.cache / "embeddings", limit)
    cache = EmbeddingCache(0, store)
    a = model.architecture
    room = int(FULL * limit / (2 * a.out_chans * a.grid**2 + 128))
    done: dict[str, Any] = {"cases": [], "slices": 0, "encoded": 0, "skipped": {}, "full": False}
    for case, path in _waiting(studies, paths)[:cases]:
        try:
            opened = pictures.open(path)
        except BadImageError as error:
            logger.warning("passed over %s: %s", case, error)
            done["skipped"][case] = str(error)
            continue
        clicks = ClickSession(model, opened.picture, settings, cache=cache)
        wanted = _slices(studies, case, opened.turn)
        if done["slices"] + len(wanted) > room:
            done["full"] = True
            break
        for n, k in enumerate(wanted):
            if not clicks.embedded(k):
                clicks.embed([k])
                done["encoded"] += 1
            report(n + 1, len(wanted), stage=f"encode {case}")
        done["cases"].append(case)
        done["slices"] += len(wanted)
    return {**done, "seconds": round(time.monotonic() - started, 1)}


def _waiting(studies: Path, paths: Paths) -> list[tuple[str, Path]]:
    """Scans without a human label in the order in which the strategy ``agreement`` hands them out."""
    found = read_studies(studies)
    scores = {s.case: s.agreement for s in Ledger(paths.ledger).scores()} if paths.ledger.exists() else {}
    waiting = [c for c in found.images if c not in found.final]
    return [(c, found.images[c]) for c in sorted(waiting, key=lambda c: (c not in scores, scores.get(c, 0.0), c))]


def _slices(studies: Path, case: str, turn: SliceOrientation) -> list[int]:
    """Slices around the automatic mask, middle first; all where there is none."""
    count = turn.shape[turn.axes[2]]
    low, high = 0, count - 1
    try:
        mask = read_image(studies / "labels" / ORIGINAL / f"{case}.nii.gz").array
        filled = np.flatnonzero(turn.view(mask).any((0, 1))) if mask.shape == turn.shape else np.zeros(0)
        if len(filled):
            low, high = max(int(filled[0]) - MARGIN, 0), min(int(filled[-1]) + MARGIN, count - 1)
    except AslsegError:
        pass
    return sorted(range(low, high + 1), key=lambda k: (abs(2 * k - low - high), k))
