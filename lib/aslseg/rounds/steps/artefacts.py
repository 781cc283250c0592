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
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from aslseg.cases.prepared_case import Prepared
from aslseg.errors import TrainingDivergedError
from aslseg.files import DAMAGED, atomic_file, write_json
from aslseg.models.cascade import StageOutput
from aslseg.ssl.side_by_side import Outcome
from aslseg.types import Labels

logger = logging.getLogger(__name__)

NEIGHBOURHOOD = np.ones((3, 3, 3), bool)


def folder_name(name: str, inputs: dict[str, Any]) -> str:
    """The name of the folder of a step with these inputs."""
    text = json.dumps([name, inputs], sort_keys=True)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


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
        folder = self.root / folder_name(name, inputs)
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
        out, there = self._file(name, inputs)
        if not there:
            _note(out, train(out))
        return out

    def models(
        self, name: str, inputs: Sequence[dict[str, Any]], train: Callable[[dict[int, Path]], Sequence[Outcome]]
    ) -> list[Path | TrainingDivergedError]:
        """The model files of several training steps, those trained together that do not exist.

        Args:
            name: Of the steps.
            inputs: Of each, as for :meth:`folder`.
            train: Is given number and file of those that are missing; writes each file atomically and last; returns
                numbers for each ``result.json``, or why a training diverged.
        """
        files = [self._file(name, one) for one in inputs]
        missing = {number: out for number, (out, there) in enumerate(files) if not there}
        found: list[Path | TrainingDivergedError] = [out for out, _ in files]
        for (number, out), outcome in zip(missing.items(), train(missing) if missing else (), strict=True):
            if isinstance(outcome, TrainingDivergedError):
                found[number] = outcome
            else:
                _note(out, outcome)
        return found

    def _file(self, name: str, inputs: dict[str, Any]) -> tuple[Path, bool]:
        """The model file of a step, and whether it exists."""
        out = self.folder(name, inputs) / f"{name}.safetensors"
        if out.exists():
            logger.info("%s: same inputs as before, reused", out.parent.name)
        return out, out.exists()

    @staticmethod
    def result(model: Path) -> dict[str, Any]:
        """The numbers that the training of a model file gave; none where it was killed before it wrote them."""
        path = model.with_name("result.json")
        return json.loads(path.read_text()) if path.exists() else {}

    def prune(self, keep: Iterable[str]) -> None:
        """Delete the folders that are not among ``keep``."""
        kept = set(keep)
        for folder in self.root.iterdir() if self.root.is_dir() else ():
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)


class CachedProbabilities:
    """Region probabilities of cases, each computed when first asked for and kept on disk with its notes.

    They are stored as 8-bit numbers; 0.5 lies between two of these, so that masks do not change.

    Args:
        folder: From :meth:`ArtefactStore.folder`.
        make: Case to region probabilities (R, i, j, k) float32 on its working grid. Another scan under the same id,
            which has another hash, is another entry.
        heard: Called with the id of a case and each note, whenever its probabilities are asked for.
    """

    def __init__(
        self, folder: Path, make: Callable[[Prepared], StageOutput], heard: Callable[[str, str], None] | None = None
    ) -> None:
        self.folder, self.make, self.heard = folder, make, heard

    def __call__(self, case: Prepared) -> np.ndarray:
        return self.output(case).regions

    def output(self, case: Prepared) -> StageOutput:
        """The probabilities of a case with their notes."""
        kept = read_probabilities(self.folder, case.id, case.image_hash)
        if kept is None:
            made = self.make(case)
            stored = np.rint(np.clip(made.regions, 0, 1) * 255).astype(np.uint8)
            with atomic_file(self._path(case)) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, regions=stored, notes=np.array(made.notes, dtype=np.str_))
            kept = StageOutput(_probabilities(stored), made.notes)
        for note in kept.notes if self.heard else ():
            self.heard(case.id, note)
        return kept

    def has(self, case: Prepared) -> bool:
        """Whether it is on disk already."""
        return self._path(case).exists()

    def _path(self, case: Prepared) -> Path:
        return _path(self.folder, case.id, case.image_hash)


def _note(model: Path, result: dict[str, Any]) -> None:
    write_json(model.with_name("result.json"), result)


def joined(
    folder: Path,
    maps: Sequence[CachedProbabilities],
    join: Callable[[list[np.ndarray]], np.ndarray],
    most: bool = False,
) -> CachedProbabilities:
    """Probabilities that are made of several models', with their notes.

    Args:
        folder: From :meth:`ArtefactStore.folder`.
        maps: Of the models.
        join: Region probabilities (R, i, j, k) of a case, one for each model, to one.
        most: Whether more than half of the models must say the same.
    """

    def make(case: Prepared) -> StageOutput:
        found = [one.output(case) for one in maps]
        said = Counter(note for output in found for note in output.notes)
        notes = tuple(note for note, times in said.items() if times > len(maps) / 2 or not most)
        return StageOutput(join([output.regions for output in found]), notes)

    return CachedProbabilities(folder, make)


def mixed(store: ArtefactStore, labels: Labels, maps: Sequence[CachedProbabilities]) -> CachedProbabilities:
    """The probability of each label from maps of its own, put together by :func:`nest`.

    Args:
        store: Where the result is kept.
        labels: With their nesting.
        maps: One for each label.
    """
    folder = store.folder("mixed", {"labels": [m.folder.name for m in maps], "parents": labels.parents})
    return joined(folder, maps, lambda regions: nest(np.stack([one[n] for n, one in enumerate(regions)]), labels))


def nest(regions: np.ndarray, labels: Labels) -> np.ndarray:
    """Probabilities in which no nested label reaches beyond what it lies in.

    A component that touches the parent belongs to it: a tumour at the border of the liver is liver, though another
    source that draws the liver may leave it out. The parent grows by it. Everything else is cut at the parent's
    border, components that lie elsewhere with it.

    Args:
        regions: Region probabilities (R, i, j, k), changed in place.
        labels: With their nesting.
    """
    for n, parent in enumerate(labels.parents):
        # a parent stands before its children
        if parent is None:
            continue
        numbers, _ = ndimage.label(regions[n] >= 0.5, NEIGHBOURHOOD)
        around = ndimage.binary_dilation(regions[parent] >= 0.5, NEIGHBOURHOOD)
        touching = np.isin(numbers, np.setdiff1d(numbers[around], 0))
        for outer in labels.ancestors(n):
            regions[outer][touching] = np.maximum(regions[outer], regions[n])[touching]
        regions[n] = np.minimum(regions[n], regions[parent])
    return regions


def confidence(regions: np.ndarray) -> np.ndarray:
    """How certain region probabilities p (R, i, j, k) are: |2p - 1| of the least certain region, (i, j, k) in 0..1."""
    return np.asarray(np.abs(2 * regions - 1).min(0))


def read_probabilities(folder: Path, case: str, image_hash: str) -> StageOutput | None:
    """Region probabilities (R, i, j, k) float32 of a case, and notes; None if they are not there, or damaged.

    Args:
        folder: Of the step.
        case: Id of the scan.
        image_hash: SHA-256 of its file.
    """
    path = _path(folder, case, image_hash)
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            # files of earlier versions hold no notes
            notes = tuple(map(str, file["notes"])) if "notes" in file.files else ()
            return StageOutput(_probabilities(np.asarray(file["regions"])), notes)
    except DAMAGED as error:
        logger.warning("%s is damaged (%s); computed again", path.name, type(error).__name__)
        return None


def _probabilities(stored: np.ndarray) -> np.ndarray:
    return np.asarray(stored.astype(np.float32) / np.float32(255))


def _path(folder: Path, case: str, image_hash: str) -> Path:
    return folder / f"{case}-{image_hash[:12]}.npz"
