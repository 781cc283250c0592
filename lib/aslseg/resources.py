"""The files that come with the package, and the folder that the server runs from, in a checkout and in a wheel.

A checkout has the app in ``apps/aslseg`` and runs it there. A wheel holds a copy inside the package, in ``aslseg/app``.
MONAI Label writes models and logs beside ``main.py``. They do not belong inside an installed package, so an installed
app runs from a folder in the user's data.
"""

from __future__ import annotations

import os
import tempfile
from importlib.resources import files
from pathlib import Path

from aslseg.errors import BadSettingsError

VARIABLE = "ASLSEG_APP_DIR"
PACKAGE = Path(str(files("aslseg")))
IN_WHEEL = PACKAGE / "app"
IN_CHECKOUT = PACKAGE.parents[1] / "apps" / "aslseg"


def shipped() -> Path:
    """Folder with the app's ``main.py`` and ``pretrained/`` as they were shipped."""
    return IN_WHEEL if IN_WHEEL.is_dir() else IN_CHECKOUT


def small_sam() -> Path:
    """The small SAM that comes with the package; ``manifest.json`` beside it says how it was made."""
    return shipped() / "pretrained" / "sam_small.safetensors"


def app_dir() -> Path:
    """Folder that the server runs from, with models and logs below it.

    Returns:
        The folder that ``ASLSEG_APP_DIR`` names, else ``apps/aslseg`` in a checkout, else ``aslseg`` in the user's data
        folder (``XDG_DATA_HOME``, by default ``~/.local/share``).

    Raises:
        BadSettingsError: The user has no home folder and the environment names none of these.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).resolve()
    if shipped() == IN_CHECKOUT:
        return IN_CHECKOUT
    data = Path(os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share"))
    if not data.is_absolute():
        raise BadSettingsError(
            f"expected a home folder for models and logs, found {data}; set {VARIABLE} to a folder that can be written"
        )
    return data / "aslseg"


def prepare_app_dir() -> Path:
    """:func:`app_dir` with ``main.py`` in it, as ``monailabel start_server --app`` needs it.

    A link to the shipped file is made or renewed; a ``main.py`` that somebody put there is left alone.

    Raises:
        BadSettingsError: The folder cannot be written.
    """
    folder, source = app_dir(), shipped() / "main.py"
    main = folder / "main.py"
    if main.is_symlink() or not main.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # renamed from a name of its own, so that two servers that start at once both find a whole link
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                link = Path(temporary) / "main.py"
                link.symlink_to(source)
                os.replace(link, main)
        except OSError as error:
            raise BadSettingsError(
                f"{folder}: expected a folder for models and logs that can be written ({error.strerror}); "
                f"set {VARIABLE} to another one"
            ) from None
    return folder
