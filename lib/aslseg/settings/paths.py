"""Where the files of one studies folder lie."""

from __future__ import annotations

import hashlib
import re
import tempfile
from pathlib import Path

from aslseg.errors import BadSettingsError
from aslseg.resources import app_dir
from aslseg.settings.model import Settings


class Paths:
    """Where the files of one studies folder (or DICOMweb address) lie.

    Args:
        settings: ``home`` and ``model_dir``.
        studies: Studies folder or DICOMweb address.

    Attributes:
        studies: The studies folder, or None for a DICOMweb address.
        home: Ledger, rounds and caches.
        models: Published models.
    """

    def __init__(self, settings: Settings, studies: str | Path) -> None:
        text = str(studies)
        address = re.match(r"(https?):/+", text)
        remote = address is not None
        if address:  # pathlib leaves one slash of two
            text = f"{address[1]}://{text[address.end() :]}"
        self.studies = None if remote else Path(text).resolve()
        name = text.split("//")[-1].split("/")[0].replace(":", "-") if remote else Path(text).resolve().name
        key = f"{name}-{hashlib.sha256((text if remote else str(self.studies)).encode()).hexdigest()[:8]}"
        own = (Path(settings.model_dir) if settings.model_dir else app_dir() / "model") / key
        self.models = Path(settings.model_dir) if settings.model_dir else own
        if settings.home:
            self.home = Path(settings.home)
        else:
            self.home = own / "home" if self.studies is None else self.studies / ".aslseg"
        self.ledger = self.home / "ledger.sqlite"
        self.rounds = self.home / "rounds"
        self.cache = self.home / "cache"


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
