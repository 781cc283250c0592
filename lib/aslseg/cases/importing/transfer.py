"""Writing what was planned: one case at a time, each file whole or not at all, nothing overwritten."""

from __future__ import annotations

import filecmp
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aslseg.cases.importing.pairs import Pair
from aslseg.cases.importing.patients import add_patient
from aslseg.cases.importing.plan import Plan, counts_values
from aslseg.cases.importing.values import Meaning, whole_numbers
from aslseg.cases.studies import FINAL
from aslseg.errors import AslsegError, BadImageError, BadLabelError, DiskFullError
from aslseg.files import atomic_file, write_errors
from aslseg.settings import Settings
from aslseg.types import Labels, ProgressCallback, Volume, no_progress
from aslseg.volume.dicom_series import Series, read_stack, stack, write_volume
from aslseg.volume.io import case_id, extension, read_image, read_label, require_free_disk, write_label

SAME_PLACE_MM = 1e-3


@dataclass
class Done:
    """What became of a case.

    Attributes:
        case: Its id.
        scan: ``written``, ``unchanged`` or ``failed``.
        label: The same, ``none``, or ``kept`` where another label was there.
        notes: What the user should know, and why something failed.
    """

    case: str
    scan: str = "failed"
    label: str = "none"
    notes: list[str] = field(default_factory=list)


def transfer(
    plan: Plan, studies: Path, settings: Settings, link: bool = False, report: ProgressCallback = no_progress
) -> list[Done]:
    """Bring every case of a plan into a studies folder. A case that fails is said, and the others go on.

    Raises:
        DiskFullError: Nothing is half-written; run the import again.
    """
    if any(isinstance(pair.scan, Series) for pair in plan.pairs):
        plan.pseudonyms.save()
    scans, labels = _present(studies), _present(studies / "labels" / FINAL)
    done = []
    for n, pair in enumerate(plan.pairs):
        report(n, len(plan.pairs), stage="import", case=pair.case)
        require_free_disk(studies, settings.min_free_gb)
        done.append(_Case(pair, studies, settings, link).run(plan.meaning, scans.get(pair.case), labels.get(pair.case)))
    return done


def _present(folder: Path) -> dict[str, Path]:
    """Case id to file."""
    return {case_id(p): p for p in sorted(folder.iterdir()) if extension(p)} if folder.is_dir() else {}


class _Case:
    """One case on its way into the studies folder."""

    def __init__(self, pair: Pair, studies: Path, settings: Settings, link: bool) -> None:
        self._pair, self._studies, self._settings, self._link = pair, studies, settings, link
        self._done = Done(pair.case)

    def run(self, meaning: Meaning, scan: Path | None, label: Path | None) -> Done:
        """Write the scan and its label unless they are there."""
        try:
            volume = self._bring_scan(scan)
        except DiskFullError:
            raise
        except AslsegError as error:
            self._done.notes.append(str(error))
            return self._done
        if self._pair.labels:
            try:
                self._done.label = "failed"
                self._bring_label(meaning, volume, label)
            except DiskFullError:
                raise
            except AslsegError as error:
                self._done.notes.append(str(error))
        return self._done

    def _bring_scan(self, present: Path | None) -> Volume:
        pair, source = self._pair, self._pair.scan
        if isinstance(source, Path) and present is not None and _same_file(source, present):
            self._done.scan = "unchanged"
            volume = read_image(present, self._settings.max_voxels)
        else:
            volume = self._read_scan()
            if present is not None:
                _require_same(volume, read_image(present, self._settings.max_voxels), present)
                self._done.scan = "unchanged"
        if pair.patient:
            # before the scan: a round must not see a scan of a patient as one of nobody's
            lost = add_patient(self._studies, pair.case, pair.patient, pair.role, pair.confirmed)
            self._done.notes += [lost] if lost else []
        if present is None:
            self._write_scan(volume)
            self._done.scan = "written"
        return volume

    def _read_scan(self) -> Volume:
        source, most = self._pair.scan, self._settings.max_voxels
        if isinstance(source, Path):
            return read_image(source, most)
        ordered = stack(source)
        self._done.notes += ordered.notes
        return read_stack(ordered, most)

    def _write_scan(self, volume: Volume) -> None:
        source = self._pair.scan
        if not isinstance(source, Path) or extension(source) == ".mhd":
            write_volume(self._studies / f"{self._pair.case}.nii.gz", volume)
            return
        target = self._studies / f"{self._pair.case}{extension(source)}"
        if self._link:
            _link(source, target)
            return
        with atomic_file(target) as temporary:
            shutil.copyfile(source, temporary)

    def _bring_label(self, meaning: Meaning, volume: Volume, present: Path | None) -> None:
        labels, most = self._settings.label_set, self._settings.max_voxels
        class_map = decode(self._pair, meaning, volume, labels, most)
        if not class_map.any():
            self._done.notes.append("its label is empty")
        if present is None:
            write_label(self._studies / "labels" / FINAL / f"{self._pair.case}.nii.gz", class_map, volume.affine)
            self._done.label = "written"
        elif np.array_equal(read_label(present, volume, labels, most), class_map):
            self._done.label = "unchanged"
        else:
            self._done.label = "kept"
            self._done.notes.append(f"labels/{FINAL}/{present.name} holds another label, which was kept")


def decode(pair: Pair, meaning: Meaning, scan: Volume, labels: Labels, max_voxels: float) -> np.ndarray:
    """The label files of a case as one class map on the grid of its scan.

    Where files of one label each overlap, the label that comes later in ``labels`` wins, as an inner one does.

    Returns:
        uint8 (i, j, k).

    Raises:
        BadLabelError: A file that lies elsewhere than the scan, or a value without a meaning.
    """
    out = np.zeros(scan.array.shape, np.uint8)
    for label in sorted(pair.labels, key=lambda x: meaning.names.get(x.name, 0)):
        if label.name:
            stored = read_image(label.path, max_voxels)
            array = (stored.array > 0).astype(np.uint8) * np.uint8(meaning.names[label.name])
            found = _on_grid(label.path, array, stored.affine, scan, labels)
        elif counts_values(label):
            stored = read_image(label.path, max_voxels)
            array = _mapped(whole_numbers(label.path.name, stored.array), meaning.values, label.path.name)
            found = _on_grid(label.path, array, stored.affine, scan, labels)
        else:
            found = read_label(label.path, scan, labels, max_voxels)
        out[found > 0] = found[found > 0]
    return out


def _mapped(array: np.ndarray, values: Mapping[int, int], name: str) -> np.ndarray:
    present = np.unique(array)
    unknown = [int(v) for v in present if int(v) not in values]
    if unknown:
        raise BadLabelError(f"label {name}: no meaning for the values {unknown[:5]}; write --map {unknown[0]}=LABEL")
    table = np.array([values[int(v)] for v in present], np.uint8)
    return table[np.searchsorted(present, array)]


def _on_grid(path: Path, array: np.ndarray, affine: np.ndarray, scan: Volume, labels: Labels) -> np.ndarray:
    """A class map read as any label is, with the same checks of where it lies."""
    with tempfile.TemporaryDirectory(prefix="aslseg-") as folder:
        mapped = Path(folder) / f"{case_id(path)}.nii.gz"
        write_label(mapped, array, affine)
        return read_label(mapped, scan, labels, float(array.size))


def _same_file(source: Path, present: Path) -> bool:
    try:
        return extension(source) == extension(present) and filecmp.cmp(source, present, shallow=False)
    except OSError:  # a link to nothing, or a file that may not be read: reading it says so
        return False


def _require_same(volume: Volume, there: Volume, path: Path) -> None:
    same = volume.array.shape == there.array.shape and np.array_equal(volume.array, there.array)
    if not (same and np.allclose(volume.affine, there.affine, rtol=0, atol=SAME_PLACE_MM)):
        raise BadImageError(
            f"{path.name} is in the studies folder already, and is another scan; rename one of them, and import again"
        )


def _link(source: Path, target: Path) -> None:
    """A symbolic link that appears at once; never written through."""
    temporary = target.with_name(f".tmp-{secrets.token_hex(8)}")
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.symlink(source.resolve(), temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
