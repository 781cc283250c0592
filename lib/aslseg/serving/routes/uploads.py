"""Files that come with a request."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from fastapi import UploadFile

from aslseg.files import write_errors
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.labels import RAW
from aslseg.volume.io import IMAGE_EXTENSIONS, extension

logger = logging.getLogger(__name__)

PREFIX = "aslseg-upload-"
STALE_SECONDS = 3600.0


def upload_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for the files of a request, which is gone after its context."""
    return tempfile.TemporaryDirectory(prefix=PREFIX)


def remove_stale_uploads() -> None:
    """Delete what requests left that ended with their server; younger folders may belong to a server that runs."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(FileNotFoundError):
            about = folder.lstat()
            ours = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid()
            if ours and time.time() - about.st_mtime > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
                logger.info("%s was left by a server that was stopped; it has been deleted", folder)


def upload_extension(upload: UploadFile) -> str:
    """The image extension of an upload; one without a name is taken for NIfTI.

    Raises:
        RefusedError: Another kind of file.
    """
    name = Path(upload.filename or "upload.nii.gz").name
    found = extension(Path(f"x{name}"))  # a name that is an extension only, or begins with a dot, is one too
    if found is None:
        raise RefusedError(f"{name[:80]!r}: expected {', '.join(IMAGE_EXTENSIONS)}", 422)
    return found


def save_upload(upload: UploadFile, folder: Path, stem: str) -> Path:
    """Write an uploaded image into a folder under a name of our own.

    Raises:
        RefusedError: As :func:`upload_extension`.
    """
    return _write(upload, folder / f"{stem}{upload_extension(upload)}")


def label_extension(upload: UploadFile) -> str:
    """As :func:`upload_extension`, but OHIF's raw voxels (``.bin``) are accepted too."""
    return RAW if (upload.filename or "").endswith(RAW) else upload_extension(upload)


def save_label_upload(upload: UploadFile, folder: Path) -> Path:
    """Write an uploaded label into a folder under a name of our own.

    Raises:
        RefusedError: As :func:`label_extension`.
    """
    return _write(upload, folder / f"label{label_extension(upload)}")


def save_unjudged(upload: UploadFile, folder: Path) -> Path:
    """As :func:`save_label_upload`, whatever kind of file it says it is."""
    try:
        return save_label_upload(upload, folder)
    except RefusedError:
        return _write(upload, folder / "label.part")


def _write(upload: UploadFile, path: Path) -> Path:
    with write_errors(path), path.open("wb") as target:
        shutil.copyfileobj(upload.file, target)
    return path
