"""What ``aslseg doctor`` finds out about the installation: packages, machine, access, folders."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from aslseg.commands.doctor import Finding
from aslseg.errors import AslsegError, BadSettingsError
from aslseg.settings import Settings

PYTHON = (3, 11)
NEEDED_GB = 2.0
"""Free disk below which a round can hardly run."""


def packages() -> Iterator[Finding]:
    """Python and packages that this version of ASLseg was not made for."""
    if sys.version_info[:2] != PYTHON:
        found, wanted = (".".join(map(str, v[:2])) for v in (sys.version_info, PYTHON))
        yield Finding(
            "error",
            "python",
            f"it is Python {found}, and MONAI Label 0.8.5 needs {wanted}",
            f"Install Python {wanted}.",
        )
    try:
        wanted_packages = metadata.requires("aslseg") or []
    except metadata.PackageNotFoundError:
        yield Finding("warning", "packages", "aslseg is not installed as a package", "Run `bash scripts/start.sh`.")
        return
    for text in wanted_packages:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield from _package(requirement)


def _package(requirement: Requirement) -> Iterator[Finding]:
    remedy = f"Run `pip install '{requirement}'`; requirements.txt has the versions that were tested together."
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        yield Finding("error", "packages", f"{requirement.name} is not installed", remedy)
        return
    if not requirement.specifier.contains(version, prereleases=True):
        text = f"{requirement.name} is {version}, and {requirement.specifier} is needed"
        yield Finding("error", "packages", text, remedy)


def machine(settings: Settings) -> Iterator[Finding]:
    """Threads, and space for temporary files."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name, number in (("threads", settings.threads), ("OMP_NUM_THREADS", _number("OMP_NUM_THREADS"))):
        if number > cores:
            text = f"{name} is {number}, and this process may use {cores} cores"
            yield Finding("warning", "threads", text, f"Set it to {cores} or less; more threads wait for each other.")
    temporary = Path(tempfile.gettempdir())
    free, needed = shutil.disk_usage(temporary).free, settings.max_upload_gb * 1e9
    if free < needed:
        text = f"{temporary} has {free / 1e9:.1f} GB free, less than one upload may take ({needed / 1e9:.1f} GB)"
        yield Finding("warning", "disk", text, "Free some space, set TMPDIR to another disk, or lower max_upload_gb.")


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def access(settings: Settings) -> Iterator[Finding]:
    """Who may use the server: its token file, and exposure without a login."""
    from aslseg.serving.network_access import authentication_configured
    from aslseg.serving.tokens import read_token_file

    if settings.insecure and not authentication_configured(settings):
        yield Finding(
            "warning",
            "exposure",
            "insecure is on: everybody on the network may read, change and delete everything",
            "Make a token file (`aslseg token`) and set token_file.",
        )
    if not settings.token_file:
        return
    path = Path(settings.token_file)
    try:
        read_token_file(path)
    except BadSettingsError as error:
        yield Finding("error", "tokens", str(error), "The server lets nobody in until this is mended.")
        return
    rights = stat.S_IMODE(path.stat().st_mode)
    if rights & (stat.S_IWGRP | stat.S_IWOTH):
        text = f"{path} can be written by others ({rights:o}), who could let themselves in"
        yield Finding("error", "tokens", text, f"Run `chmod 600 {path}`.")
    elif rights & (stat.S_IROTH | stat.S_IRGRP):
        text = f"{path} can be read by others ({rights:o})"
        yield Finding("warning", "tokens", text, f"It holds only hashes; `chmod 600 {path}` hides the names too.")


def pretrained(settings: Settings) -> Iterator[Finding]:
    """The SAM file that clicks start from."""
    from aslseg.sam.modeling.build import base_path
    from aslseg.sam.modeling.checkpoints import describe

    try:
        describe(base_path(settings), settings)
    except (AslsegError, OSError) as error:
        yield Finding(
            "error", "sam", str(error), "Correct sam_checkpoint, or leave it empty for the SAM in the package."
        )


def folders(settings: Settings, paths: Iterable[Path]) -> Iterator[Finding]:
    """Rights and space of the folders that are written."""
    for path in dict.fromkeys(paths):
        existing = next(p for p in (path, *path.parents) if p.exists())
        if not existing.is_dir():
            yield Finding(
                "error", "folders", f"{existing} is no folder", "Move that file away, or name another folder."
            )
            continue
        yield from _writable(existing)
        free = shutil.disk_usage(existing).free / 1e9
        if free < settings.min_free_gb:
            text = f"{path} has {free:.1f} GB free, less than min_free_gb ({settings.min_free_gb:g} GB)"
            yield Finding("error", "disk", text, "Nothing is written until there is more; free some space.")
        elif free < NEEDED_GB:
            yield Finding(
                "warning", "disk", f"{path} has {free:.1f} GB free", "A round may need more; free some space."
            )


def _writable(folder: Path) -> Iterator[Finding]:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        text = f"{folder} cannot be written ({error.strerror})"
        yield Finding("error", "folders", text, f"Give user id {os.geteuid()} the right to write there.")
