"""Results of steps on disk, found again by the step's inputs, so that the same step is not computed twice.

A folder is named by its step and the hash of all inputs of the step, and holds these as ``inputs.json``. Its files
appear atomically when they are complete, so that the files that exist after a kill are right and only the missing ones
are computed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.cases.prepared import Prepared
from aslseg.files import atomic_file, write_json

logger = logging.getLogger(__name__)


class ArtefactStore:
    """The artefact folders of a studies folder.

    Args:
        root: Where the folders are made.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.used: set[str] = set()

    def folder(self, name: str, inputs: dict[str, Any]) -> Path:
        """The folder of a step with these inputs, made if new."""
        text = json.dumps([name, inputs], sort_keys=True)
        folder = self.root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"
        if not (folder / "inputs.json").exists():
            write_json(folder / "inputs.json", inputs)
        self.used.add(folder.name)
        return folder

    def model(self, name: str, inputs: dict[str, Any], train: Callable[[Path], dict[str, Any]]) -> Path:
        """The model file of a training step, trained if it does not exist.

        Args:
            name, inputs: As for :meth:`folder`.
            train: Writes the file it is given, atomically and last; returns numbers for ``result.json``.
        """
        out = self.folder(name, inputs) / f"{name}.safetensors"
        if out.exists():
            logger.info("%s: same inputs as before, reused", out.parent.name)
        else:
            result = train(out)
            write_json(out.with_name("result.json"), result)
        return out

    def prune(self, keep: Iterable[str]) -> None:
        """Delete the folders that are not among ``keep``."""
        kept = set(keep)
        for folder in self.root.iterdir() if self.root.is_dir() else ():
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)


class CachedProbabilities:
    """Region probabilities of cases, each computed when first asked for and kept on disk.

    They are stored as 8-bit numbers; 0.5 lies between two of these, so that masks do not change.

    Args:
        folder: From :meth:`ArtefactStore.folder`.
        make: Case to region probabilities (R, i, j, k) float32 on its working grid. Another scan under the same id,
            which has another hash, is another entry.
    """

    def __init__(self, folder: Path, make: Callable[[Prepared], np.ndarray]) -> None:
        self.folder, self.make = folder, make

    def __call__(self, case: Prepared) -> np.ndarray:
        path = self._path(case)
        kept = self._read(path)
        if kept is None:
            kept = np.rint(np.clip(self.make(case), 0, 1) * 255).astype(np.uint8)
            with atomic_file(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, regions=kept)
        return kept.astype(np.float32) / np.float32(255)

    def has(self, case: Prepared) -> bool:
        """Whether it is on disk already."""
        return self._path(case).exists()

    def _path(self, case: Prepared) -> Path:
        return self.folder / f"{case.id}-{case.image_hash[:12]}.npz"

    @staticmethod
    def _read(path: Path) -> np.ndarray | None:
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                return np.asarray(file["regions"])
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("%s is damaged (%s); computed again", path.name, type(error).__name__)
            return None
