"""Overnight: the slices of the scans that the strategies hand out next, encoded before anybody clicks."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.cases.studies import ORIGINAL, read_studies
from aslseg.errors import AslsegError, BadImageError
from aslseg.rounds.ledger import Ledger
from aslseg.serving.models import Models
from aslseg.serving.pictures import Pictures, Turn
from aslseg.settings import Places, Settings
from aslseg.types import Report, silent
from aslseg.volume.io import read_image, require_free_disk

logger = logging.getLogger(__name__)

MARGIN = 5  # slices beyond the automatic mask
FULL = 0.9  # of the disk limit: beyond, new embeddings would push out those made a moment ago


def embed_studies(studies: Path, settings: Settings, cases: int, report: Report = silent) -> dict[str, Any]:
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
    from aslseg.sam.embeddings import EmbeddingCache
    from aslseg.sam.interactive import Clicks
    from aslseg.sam.store import EmbeddingStore

    places, started = Places(settings, studies), time.monotonic()
    require_free_disk(places.home, settings.min_free_gb)
    model, pictures = Models(settings, places).get("sam"), Pictures(settings)
    limit = settings.embedding_disk_gb * 1e9
    store = EmbeddingStore(places.cache / "embeddings", limit)
    cache = EmbeddingCache(0, store)
    a = model.architecture
    room = int(FULL * limit / (2 * a.out_chans * a.grid**2 + 128))
    done: dict[str, Any] = {"cases": [], "slices": 0, "encoded": 0, "skipped": {}, "full": False}
    for case, path in _waiting(studies, places)[:cases]:
        try:
            opened = pictures.open(path)
        except BadImageError as error:
            logger.warning("passed over %s: %s", case, error)
            done["skipped"][case] = str(error)
            continue
        clicks = Clicks(model, opened.picture, settings, cache=cache)
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


def _waiting(studies: Path, places: Places) -> list[tuple[str, Path]]:
    """Scans without a human label in the order in which the strategy ``agreement`` hands them out."""
    found = read_studies(studies)
    scores = {s.case: s.agreement for s in Ledger(places.ledger).scores()} if places.ledger.exists() else {}
    waiting = [c for c in found.images if c not in found.final]
    return [(c, found.images[c]) for c in sorted(waiting, key=lambda c: (c not in scores, scores.get(c, 0.0), c))]


def _slices(studies: Path, case: str, turn: Turn) -> list[int]:
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
