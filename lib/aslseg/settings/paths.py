"""Where the files of one studies folder lie."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from pathlib import Path

from aslseg.errors import BadSettingsError
from aslseg.files import write_json
from aslseg.resources import app_dir
from aslseg.settings.model import Settings

ADDRESS = re.compile(r"(https?):/+", re.IGNORECASE)
FOLDER_NAME = re.compile(r"[^/\\\x00-\x1f]{1,255}")
MODELS_FILE = "models.json"


class Paths:
    """Where the files of one studies folder (or DICOMweb address) lie.

    Published models lie beside the app, in a folder that is called after the studies folder when it is first used. Its
    name is kept in the studies folder's ``home``, so that the models are found again when the studies folder is moved
    or renamed. A copy of a studies folder has models of its own.

    Args:
        settings: ``home`` and ``model_dir``.
        studies: Studies folder or DICOMweb address.

    Attributes:
        studies: The studies folder, or None for a DICOMweb address.
        home: Ledger, rounds and caches.
        models: Published models.
    """

    def __init__(self, settings: Settings, studies: str | Path) -> None:
        text = address_of(studies)
        self.studies = Path(str(studies)).resolve() if text is None else None
        if self.studies is None:
            assert text is not None  # noqa: S101 - one of the two is there
            own = _own_models(settings, text.split("//")[-1].split("/")[0].replace(":", "-"), text)
            self.home = Path(settings.home) if settings.home else own / "home"
        else:
            self.home = Path(settings.home) if settings.home else self.studies / ".aslseg"
            known = _moved(self.home, self.studies)
            own = _own_models(settings, self.studies.name, str(self.studies))
            own = own.with_name(known) if known and not settings.model_dir else own
        self.models = Path(settings.model_dir) if settings.model_dir else own
        self.ledger = self.home / "ledger.sqlite"
        self.rounds = self.home / "rounds"
        self.reports = self.home / "reports"
        self.cache = self.home / "cache"

    def remember_models(self) -> None:
        """Keep the name of the models' folder in ``home``, with the place of the studies folder.

        Raises:
            DiskFullError, FileWriteError: As :func:`aslseg.files.write_json`.
        """
        content = {"folder": self.models.name, "studies": str(self.studies)}
        if self.studies is not None and self.models.parent == app_dir() / "model" and _read(self.home) != content:
            write_json(self.home / MODELS_FILE, content)


def address_of(text: str | Path) -> str | None:
    """A DICOMweb address with both of its slashes, of which pathlib leaves one; None for a folder."""
    found = ADDRESS.match(str(text))
    return f"{found[1]}://{str(text)[found.end() :]}" if found else None


def _own_models(settings: Settings, name: str, key: str) -> Path:
    folder = f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    return (Path(settings.model_dir) if settings.model_dir else app_dir() / "model") / folder


def _moved(home: Path, studies: Path) -> str | None:
    """The models' folder that ``home`` knows; None if it was copied from a studies folder that is still there."""
    kept = _read(home)
    before = Path(kept.get("studies", ""))
    if not kept or before == studies:
        return kept.get("folder")
    inside = home.resolve()
    if inside.is_relative_to(studies):  # it was copied or moved with the studies folder
        still_there = _read(before / inside.relative_to(studies)) == kept
    else:
        still_there = before.is_dir()
    return None if still_there else kept["folder"]


def _read(home: Path) -> dict[str, str]:
    """What :meth:`Paths.remember_models` wrote; nothing if that is no name of a folder."""
    try:
        kept = json.loads((home / MODELS_FILE).read_text())
        found = {key: str(kept[key]) for key in ("folder", "studies")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if FOLDER_NAME.fullmatch(found["folder"]) and found["folder"] not in (".", "..") else {}


def require_writable(settings: Settings, *names: str) -> None:
    """Make the folders that settings name, and try to write into them; an empty setting is passed over.

    Args:
        settings: ``home`` and ``model_dir``.
        names: Which of the two.

    Raises:
        BadSettingsError: A folder cannot be written to.
    """
    for name in names:
        folder: str = getattr(settings, name)
        if not folder:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise BadSettingsError(
                f"{name}: cannot write to {folder} ({error.strerror}); give a folder that this user may write to"
            ) from None
