"""``patients.csv``: which scans are of one patient, as a person or a spreadsheet program wrote it.

Columns ``case,patient[,role][,intensities]`` in any order, separated by commas, semicolons or tabs. A line that
cannot be understood stops the round: to ignore it would let one patient train a model and judge it.
"""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from aslseg.errors import BadSettingsError
from aslseg.files import read_text
from aslseg.volume.container import case_id, extension

ROLES = ("train", "validation")
CONFIRMED = "confirmed"
COLUMNS = ("case", "patient", "role", "intensities")


@dataclass
class Patients:
    """What the table says.

    Attributes:
        patients: Case to patient.
        roles: Patient to ``train`` or ``validation``.
        confirmed: Cases whose intensities a person has confirmed.
        problems: Lines about scans that are not there.
    """

    patients: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    confirmed: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def read_patients(path: Path, known: Collection[str]) -> Patients:
    """Read the table, if there is one.

    Args:
        path: ``patients.csv`` as Excel, LibreOffice or an editor saved it: any separator, encoding and line end.
        known: Ids of the scans.

    Raises:
        BadSettingsError: A line that cannot be understood, or that contradicts another; the message names it.
    """
    return parse_patients(path.name, read_text(path), known) if path.is_file() else Patients()


def parse_patients(name: str, text: str, known: Collection[str]) -> Patients:
    """The table from its text.

    Args:
        name: Of its file, for messages.
        text: Any separator and line end.
        known: Ids of the scans.

    Raises:
        BadSettingsError: As :func:`read_patients`.
    """
    table = Patients()
    spelled = {normal(c).casefold(): c for c in known}
    for number, row in _rows(name, text):
        where = f"{name}: line {number}"
        case = spelled.get(normal(_without_extension(row["case"])).casefold())
        if case is None:
            table.problems.append(f"{where}: no scan {row['case']!r} in the folder")
            continue
        _add(table, where, case, row)
    return table


def _add(table: Patients, where: str, case: str, row: dict[str, str]) -> None:
    patient, role, intensities = row["patient"], row["role"].lower(), row["intensities"].lower()
    if not patient:
        raise BadSettingsError(
            f"{where}: no patient for {case!r}; give one, or the name of the case if nothing else is of that patient"
        )
    if table.patients.setdefault(case, patient) != patient:
        raise BadSettingsError(f"{where}: {case!r} is also given to patient {table.patients[case]!r}; keep one line")
    if role and role not in ROLES:
        raise BadSettingsError(f"{where}: role {role!r}; expected train, validation or nothing")
    if role and table.roles.setdefault(patient, role) != role:
        raise BadSettingsError(f"{where}: patient {patient!r} has two roles; all scans of a patient have one")
    if intensities and intensities != CONFIRMED:
        raise BadSettingsError(f"{where}: intensities {intensities!r}; expected {CONFIRMED} or nothing")
    if intensities:
        table.confirmed.add(case)


def find_header(name: str, text: str) -> tuple[list[str], int, str]:
    """Lines of a table, the place of its header among them, and what separates its cells.

    Args:
        name: Of its file, for messages.
        text: Any separator and line end.

    Raises:
        BadSettingsError: Nothing is in it.
    """
    # an old Macintosh program ends lines with \r alone
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    first = next((n for n, line in enumerate(lines) if line.strip() and not line.lower().startswith("sep=")), None)
    if first is None:
        raise BadSettingsError(f"{name}: empty; expected the columns case,patient[,role], or no such file")
    return lines, first, max(",;\t", key=lines[first].count)


def _rows(name: str, text: str) -> Iterable[tuple[int, dict[str, str]]]:
    """Line number and the four cells of each line that holds anything."""
    lines, first, separator = find_header(name, text)
    reader = csv.reader(lines[first:], delimiter=separator, strict=True, skipinitialspace=True)
    columns: list[str] = []
    try:
        for cells in reader:
            number = first + reader.line_num
            values = [normal(c) for c in cells]
            if any("\ufffd" in v for v in values):
                raise BadSettingsError(f"{name}: line {number}: characters of no known encoding; save it as UTF-8")
            if not columns:
                columns = _columns(name, number, values)
            elif any(values):
                found = dict(zip(columns, values, strict=False))
                yield number, {column: found.get(column, "") for column in COLUMNS}
    except csv.Error as error:
        raise BadSettingsError(f"{name}: line {first + reader.line_num}: {error}; correct its quotes") from None


def _columns(name: str, number: int, values: list[str]) -> list[str]:
    columns = [v.casefold() for v in values]
    if not {"case", "patient"} <= set(columns):
        raise BadSettingsError(
            f"{name}: line {number}: columns {', '.join(map(repr, values[:6]))}; expected case,patient[,role]"
        )
    return columns


def normal(text: str) -> str:
    """Text in one form of Unicode, without space around it."""
    return unicodedata.normalize("NFC", text).strip().strip("\u200b")


def _without_extension(name: str) -> str:
    path = Path(name)
    return case_id(path) if extension(path) else name
