"""Encodes the slices of the scans that the strategies hand out next, before anybody clicks (`aslseg embed`)."""

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
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.serving.open_scans import ScanCache, SliceOrientation
from aslseg.settings import Paths, Settings
from aslseg.types import ProgressCallback, no_progress
from aslseg.volume.io import read_image, require_free_disk

logger = logging.getLogger(__name__)

MARGIN = 5  # slices beyond the automatic mask
FULL_FRACTION = 0.9  # of the disk limit; beyond it new embeddings would push out those just written


def embed_studies(
    studies: Path, settings: Settings, cases: int, report: ProgressCallback = no_progress
) -> dict[str, Any]:
    """Encode scans without a human label, lowest agreement first, unscored ones last.

    Slices within the automatic mask (tag ``original``) and a few beyond are encoded, without a mask all slices. Those
    on disk are not encoded again; a scan that cannot be read is skipped.

    Args:
        studies: Studies folder.
        settings: Those of the server: the window and SAM decide whether it finds the embeddings.
        cases: How many scans at most.
        report: Progress in slices of the current scan.

    Returns:
        ``cases`` (ids), ``slices``, ``encoded``, ``skipped`` (id to reason), ``full`` (limit reached), ``seconds``.

    Raises:
        BadWeightsError: SAM cannot be loaded.
        NotEnoughCasesError: The folder holds no scans.
        DiskFullError: Less free disk than ``min_free_gb``.
    """
    from aslseg.sam.predictor.embedding_store import EmbeddingStore
    from aslseg.sam.predictor.embeddings import EmbeddingCache
    from aslseg.sam.predictor.slice_predictor import SlicePredictor

    paths, started = Paths(settings, studies), time.monotonic()
    require_free_disk(paths.home, settings.min_free_gb)
    model, scans = Models(settings, paths).get(ModelKind.SAM), ScanCache(settings)
    limit = settings.embedding_disk_gb * 1e9
    store = EmbeddingStore(paths.cache / "embeddings", limit)
    cache = EmbeddingCache(0, store)
    a = model.architecture
    room = int(FULL_FRACTION * limit / (2 * a.out_chans * a.grid**2 + 128))
    done: dict[str, Any] = {"cases": [], "slices": 0, "encoded": 0, "skipped": {}, "full": False}
    for case, path in _without_label(studies, paths)[:cases]:
        try:
            opened = scans.open(path)
        except BadImageError as error:
            logger.warning("skipped %s: %s", case, error)
            done["skipped"][case] = str(error)
            continue
        predictor = SlicePredictor(model, opened.source, settings, cache)
        wanted = _slices(studies, case, opened.orientation)
        if done["slices"] + len(wanted) > room:
            done["full"] = True
            break
        for n, k in enumerate(wanted):
            if not predictor.is_embedded(k):
                predictor.embed([k])
                done["encoded"] += 1
            report(n + 1, len(wanted), stage=f"encode {case}")
        done["cases"].append(case)
        done["slices"] += len(wanted)
    return {**done, "seconds": round(time.monotonic() - started, 1)}


def _without_label(studies: Path, paths: Paths) -> list[tuple[str, Path]]:
    """Scans without a human label in the order in which the strategy ``agreement`` hands them out."""
    found = read_studies(studies)
    scores = {s.case: s.agreement for s in Ledger(paths.ledger).scores()} if paths.ledger.exists() else {}
    unlabelled = [c for c in found.images if c not in found.final]
    return [(c, found.images[c]) for c in sorted(unlabelled, key=lambda c: (c not in scores, scores.get(c, 0.0), c))]


def _slices(studies: Path, case: str, orientation: SliceOrientation) -> list[int]:
    """Slices around the automatic mask, middle first; all where there is none."""
    count = orientation.shape[orientation.axes[2]]
    low, high = 0, count - 1
    try:
        mask = read_image(studies / "labels" / ORIGINAL / f"{case}.nii.gz").array
        filled = np.flatnonzero(orientation.view(mask).any((0, 1))) if mask.shape == orientation.shape else np.zeros(0)
        if len(filled):
            low, high = max(int(filled[0]) - MARGIN, 0), min(int(filled[-1]) + MARGIN, count - 1)
    except AslsegError:
        pass
    return sorted(range(low, high + 1), key=lambda k: (abs(2 * k - low - high), k))
