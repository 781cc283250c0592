"""Everything that an import will do, and every question that must be answered first. Nothing is written here."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from aslseg.cases.importing.pairs import Found, LabelFile, Layout, Pair
from aslseg.cases.importing.patients import FILE, Pseudonyms, safe_name
from aslseg.cases.importing.values import Meaning, Question, label_values, parse_map, understand
from aslseg.cases.patients import Patients, read_patients
from aslseg.errors import AslsegError, BadSettingsError, NotEnoughCasesError
from aslseg.registry import LAYOUTS
from aslseg.settings import Paths, Settings
from aslseg.types import ProgressCallback, no_progress
from aslseg.volume.dicom_series import Series
from aslseg.volume.io import extension


@dataclass(frozen=True)
class Options:
    """What the user said.

    Attributes:
        layout: Name of a layout; empty: the first that recognises the folder.
        only: Glob of the scans to take, on their path below the source or their series description.
        labels: Glob of the label files to take.
        mapping: ``VALUE=LABEL`` or ``NAME=LABEL``.
        keep_ids: Use the PatientID of DICOM as it is.
        link: Link to scans that need no conversion, instead of copying them.
    """

    layout: str = ""
    only: str = ""
    labels: str = ""
    mapping: tuple[str, ...] = ()
    keep_ids: bool = False
    link: bool = False

    def answered(self, question: Question, answer: str) -> Options:
        """The options with a question answered."""
        if question.option == "--map":
            return replace(self, mapping=(*self.mapping, question.answer + answer))
        answered: dict[str, Any] = {question.option.strip("-"): answer}
        return replace(self, **answered)


@dataclass(frozen=True)
class Plan:
    """What an import will do.

    Attributes:
        source: Folder that is imported.
        layout: Title of its layout.
        pairs: Every case, with an id that is allowed in a studies folder.
        meaning: What values and names of labels stand for.
        passed_over: Files that are not imported, with the reason.
        questions: What must be answered first.
        pseudonyms: Kept when the import begins.
    """

    source: Path
    layout: str
    pairs: list[Pair]
    meaning: Meaning
    passed_over: list[str]
    questions: list[Question]
    pseudonyms: Pseudonyms


def make_plan(
    source: Path, paths: Paths, options: Options, settings: Settings, report: ProgressCallback = no_progress
) -> Plan:
    """Look at a folder, and decide what is imported and how.

    Raises:
        NotEnoughCasesError: The folder is missing, or no layout finds a scan in it.
        BadSettingsError: An option that cannot be used.
    """
    if not source.is_dir():
        raise NotEnoughCasesError(f"{source}: no such folder; give the folder that holds the scans")
    if paths.studies is None:
        raise BadSettingsError("the second argument is a DICOMweb address; expected the folder to import into")
    if source.resolve() == paths.studies:
        raise BadSettingsError(f"{source}: this is the studies folder itself; import from another folder")
    mapping = parse_map(options.mapping, settings.label_set)
    layout = choose_layout(source, options.layout)
    found = layout.pairs(source)
    table = read_patients(source / FILE, [pair.case for pair in found.pairs if pair.case])
    passed_over = found.passed_over + table.problems
    chosen = Found(list(_chosen(found.pairs, source, options)), found.names, passed_over)
    pseudonyms = Pseudonyms(paths.home, options.keep_ids)
    pairs = _named(chosen, table, pseudonyms, settings)
    if not pairs:
        reasons = "".join(f"\n  {reason}" for reason in chosen.passed_over[:10])
        raise NotEnoughCasesError(f"{source}: no scan to import (layout: {layout.title}){reasons}")
    questions = list(_ambiguous(pairs, source))
    values = _survey(pairs, chosen.passed_over, report) if not questions else Counter()
    files = {label.name for pair in pairs for label in pair.labels}
    meaning, open_questions = understand(values, files, found.names, mapping, settings.label_set)
    return Plan(source, layout.title, pairs, meaning, chosen.passed_over, questions + open_questions, pseudonyms)


def choose_layout(source: Path, name: str) -> Layout:
    """The layout of a folder: the one asked for, or the first of the registry that recognises it.

    Raises:
        NotEnoughCasesError: None recognises it.
        BadSettingsError: No layout has that name.
    """
    if name:
        layout: Layout = LAYOUTS.get(name)()
        return layout
    for each in LAYOUTS:
        layout = LAYOUTS.get(each)()
        if layout.recognise(source):
            return layout
    titles = "; ".join(LAYOUTS.get(each).title for each in LAYOUTS)
    raise NotEnoughCasesError(
        f"{source}: scans in a known layout were expected here, and none was found. Known: {titles}"
    )


def _chosen(pairs: Iterable[Pair], source: Path, options: Options) -> Iterator[Pair]:
    for pair in pairs:
        if options.only and not any(_matches(f, source, options.only) for f in pair.files):
            described = isinstance(pair.scan, Series) and fnmatchcase(pair.scan.description, options.only)
            if not described:
                continue
        if options.labels:
            pair = replace(pair, labels=tuple(x for x in pair.labels if _matches(x.path, source, options.labels)))
        yield pair


def _matches(path: Path, source: Path, pattern: str) -> bool:
    return fnmatchcase(path.name, pattern) or fnmatchcase(path.relative_to(source).as_posix(), pattern)


def _named(found: Found, table: Patients, pseudonyms: Pseudonyms, settings: Settings) -> list[Pair]:
    """Pairs with ids and patients that may stand in a studies folder, and what the table of the source says of them."""
    pairs = []
    for pair in found.pairs:
        if isinstance(pair.scan, Series):
            if pair.scan.modality != settings.modality.upper():
                found.passed_over.append(
                    f"series {pair.scan.description or 'without description'}: {pair.scan.modality or 'no modality'}, "
                    f"but modality = {settings.modality}"
                )
                continue
            patient = pseudonyms.patient(pair.patient)
            pairs.append(replace(pair, case=pseudonyms.case(patient, pair.scan.uid), patient=patient))
        else:
            patient = table.patients.get(pair.case, "")
            pairs.append(
                replace(
                    pair,
                    case=safe_name(pair.case),
                    patient=pair.patient or patient,
                    role=table.roles.get(patient, ""),
                    confirmed=pair.case in table.confirmed,
                )
            )
    return pairs


def _ambiguous(pairs: Iterable[Pair], source: Path) -> Iterator[Question]:
    """Cases with several scans, labels that may be of several scans, and scans with several label maps."""
    by_case: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_case.setdefault(pair.case, []).append(pair)
    several = {case: found for case, found in by_case.items() if len(found) > 1}
    if several:
        case, found = next(iter(several.items()))
        files = [pair.files[0] for pair in found]
        yield Question(
            f"{len(several)} cases have several scans each, as {case!r}: {_listed(files, source)}",
            "--only",
            "",
            _pattern(files, source),
        )
    else:  # the same option would answer both
        yield from _shared(pairs, source)
    for pair in pairs:
        maps = [label for label in pair.labels if not label.name]
        if len(maps) > 1:
            files = [label.path for label in maps]
            yield Question(
                f"{pair.case} has {len(maps)} label maps: {_listed(files, source)}",
                "--labels",
                "",
                _pattern(files, source),
            )
            return


def _shared(pairs: Iterable[Pair], source: Path) -> Iterator[Question]:
    """The first label that may be of several cases, if any: to guess would give one of them the label of another."""
    owners: dict[Path, dict[str, Path]] = {}
    for pair in pairs:
        for label in pair.labels:
            owners.setdefault(label.path, {}).setdefault(pair.case, pair.files[0])
    several = {path: list(files.values()) for path, files in owners.items() if len(files) > 1}
    if several:
        path, files = next(iter(several.items()))
        labels = "1 label" if len(several) == 1 else f"{len(several)} labels"
        yield Question(
            f"{labels} may be of several scans, as {_listed([path], source)} of {_listed(files, source)}; name it "
            "after its scan, or choose scans",
            "--only",
            "",
            _pattern(files, source),
        )


def _listed(files: list[Path], source: Path) -> str:
    shown = ", ".join(p.relative_to(source).as_posix() for p in files[:4])
    return shown + (", ..." if len(files) > 4 else "")


def _pattern(files: list[Path], source: Path) -> str:
    """A glob that takes the first of the files and leaves the others."""
    names = [p.relative_to(source).as_posix() for p in files]
    shared = os.path.commonprefix(names)  # noqa: RUF071 - of the text, not of the folders
    start = max(shared.rfind(c) for c in "_-/") if shared else -1
    return f"'*{names[0][start:]}'" if start > 0 else f"'{names[0]}'"


def _survey(pairs: Iterable[Pair], passed_over: list[str], report: ProgressCallback) -> Counter[int]:
    """How many label files hold each value; a file that cannot be read is said again when its case is imported."""
    files = [label for pair in pairs for label in pair.labels if counts_values(label)]
    values: Counter[int] = Counter()
    for n, label in enumerate(files):
        report(n, len(files), stage="label values", file=label.path.name)
        try:
            values.update(int(v) for v in label_values(label.path))
        except AslsegError:
            continue
    return values


def counts_values(label: LabelFile) -> bool:
    """Whether the voxel values of a file say what they are; a ``.seg.nrrd`` names its segments."""
    return not label.name and extension(label.path) != ".seg.nrrd"
