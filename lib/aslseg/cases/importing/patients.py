"""Who a scan belongs to: pseudonyms for DICOM patients, and the lines of ``patients.csv``."""

from __future__ import annotations

import csv
import hashlib
import hmac
import io
import os
import re
import secrets
import unicodedata
from pathlib import Path

from aslseg.cases.patients import CONFIRMED, find_header, normal, parse_patients, read_patients
from aslseg.errors import BadSettingsError
from aslseg.files import atomic_file, read_text
from aslseg.volume.container import case_id, extension

FILE = "patients.csv"
KEY_FILE = "pseudonym.key"
UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
MAX_NAME = 100


class Pseudonyms:
    """Names in place of DICOM identifiers, the same at every import into one studies folder.

    A keyed hash (HMAC-SHA256): without the key, which stays in the studies folder, nobody can find out an identifier
    by trying all of them.

    Args:
        home: Folder of the studies' own files, where the key is kept.
        keep: Use the identifiers themselves.
    """

    def __init__(self, home: Path, keep: bool = False) -> None:
        self._path, self._keep = home / KEY_FILE, keep
        try:
            self._key = bytes.fromhex(self._path.read_text().strip())
        except FileNotFoundError:
            self._key = secrets.token_bytes(32)
        except (OSError, ValueError) as error:
            raise BadSettingsError(
                f"{self._path}: not readable as a key ({error}); bring back the file, or remove it, which gives known "
                "patients new pseudonyms"
            ) from None

    def patient(self, identifier: str) -> str:
        """The name of a patient."""
        return safe_name(identifier) if self._keep else f"p{self._digest('patient', identifier)[:10]}"

    def case(self, patient: str, series: str) -> str:
        """The id of a scan, from the name of its patient and its SeriesInstanceUID."""
        return f"{patient}_{self._digest('series', series)[:8]}"

    def save(self) -> None:
        """Keep the key, readable by its owner only."""
        if not self._path.exists():
            with atomic_file(self._path) as temporary:
                temporary.write_text(self._key.hex() + "\n")
            os.chmod(self._path, 0o600)

    def _digest(self, what: str, identifier: str) -> str:
        return hmac.new(self._key, f"{what}\0{identifier}".encode(), "sha256").hexdigest()


def safe_name(name: str) -> str:
    """A file name that every client takes: letters, digits, ``.``, ``_`` and ``-``, beginning with a letter or digit.

    Returns:
        Never an empty one. Where little of the name is left - it is empty, not in ASCII, or too long - a digest of the
        whole name goes behind, so that two names stay two.
    """
    name = unicodedata.normalize("NFC", name)  # macOS writes é as two characters
    kept = UNSAFE.sub("_", name).strip("._-")
    if kept and name.isascii() and len(kept) <= MAX_NAME:
        return kept
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return f"{kept[: MAX_NAME - len(digest) - 1] or 'name'}_{digest}"


def add_patient(folder: Path, case: str, patient: str, role: str = "", confirmed: bool = False) -> str:
    """Add a line to ``patients.csv`` if the case has none; existing lines are never changed.

    Args:
        folder: Studies folder.
        case: Id of the scan.
        patient: Whose it is.
        role: ``train``, ``validation`` or nothing.
        confirmed: Whether a person has confirmed its intensities.

    Returns:
        What the user should know: what the line that is there does not say. Empty if nothing is lost.

    Raises:
        BadSettingsError: The file cannot be understood, or the line contradicts another.
    """
    path = folder / FILE
    known = [*(case_id(p) for p in folder.glob("*") if extension(p)), case]
    table = read_patients(path, known)
    if case in table.patients:
        lost = [f"role {role}"] if role and table.roles.get(table.patients[case]) != role else []
        lost += [f"intensities {CONFIRMED}"] if confirmed and case not in table.confirmed else []
        return f"{FILE} has its line already, without {' and '.join(lost)} of the source; add it there" if lost else ""
    cells = {"case": case, "patient": patient, "role": role, "intensities": CONFIRMED if confirmed else ""}
    text = _with_line(read_text(path) if path.is_file() else "case,patient", cells)
    try:
        parse_patients(FILE, text, known)
    except BadSettingsError as error:
        raise BadSettingsError(
            f"the line of the source for {case!r} does not fit {path}: {error}; correct one of the two tables"
        ) from None
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return ""


def _with_line(text: str, cells: dict[str, str]) -> str:
    """A table with one line more, and with the columns that it lacks for it."""
    lines, first, separator = find_header(FILE, text.rstrip())
    header = next(csv.reader([lines[first]], delimiter=separator, skipinitialspace=True))
    columns = [normal(c).casefold() for c in header]
    missing = [name for name, cell in cells.items() if cell and name not in columns]
    lines[first] = separator.join([lines[first], *missing])
    line = io.StringIO()
    writer = csv.writer(line, delimiter=separator, lineterminator="\n")
    writer.writerow([cells.get(column, "") for column in columns + missing])
    return "\n".join([*lines, line.getvalue()])
