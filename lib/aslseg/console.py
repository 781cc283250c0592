"""What the command line says and understands, as plain functions; only :mod:`aslseg.cli` prints."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aslseg.errors import BadSettingsError

PACKAGES = (
    "aslseg",
    "monailabel",
    "monai",
    "torch",
    "torchvision",
    "segment-anything",
    "pytorch-ignite",
    "nibabel",
)


def joined(arguments: list[str]) -> list[str]:
    """``--conf KEY VALUE``, as monailabel has it, to ``--conf KEY=VALUE``; what follows ``--`` stays as it is."""
    out, rest = [], list(arguments)
    while rest:
        item = rest.pop(0)
        out.append(item)
        if item == "--" or not rest:
            return out + rest
        if item == "--conf":
            key = rest.pop(0)
            out.append(f"{key}={rest.pop(0)}" if "=" not in key and rest else key)
    return out


def conf_pairs(conf: list[str] | None) -> dict[str, str]:
    """``--conf`` arguments as setting and value.

    Raises:
        BadSettingsError: An argument without ``=``.
    """
    pairs = {}
    for item in conf or ():
        key, equals, value = item.partition("=")
        if not equals:
            raise BadSettingsError(f"--conf {item}: expected a key and a value")
        pairs[key] = value
    return pairs


def studies_folder(text: str) -> Path:
    """The value of a ``--studies`` that must be a folder.

    Raises:
        BadSettingsError: It is a DICOMweb address.
    """
    if text.startswith(("http://", "https://")):
        raise BadSettingsError(
            f"--studies {text}: a DICOMweb address, but this command reads labelled scans from a folder. Start "
            f"the server on the address (aslseg serve --studies {text}), and train on a folder of exported scans "
            "(docs/dicom.md)"
        )
    return Path(text)


def versions() -> dict[str, str]:
    """Installed versions, read without importing anything."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def short(value: Any) -> str:
    """A value in a line of text."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {short(v)}" for k, v in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def lines(content: Mapping[str, Any]) -> Iterator[str]:
    """A summary as text."""
    for key, value in content.items():
        if value and isinstance(value, dict | list):
            yield f"{key}:"
            for inner in value.items() if isinstance(value, dict) else value:
                yield f"  {inner[0]}: {short(inner[1])}" if isinstance(value, dict) else f"  {short(inner)}"
        else:
            yield f"{key}: {'none' if value in ([], {}) else short(value)}"


def brief(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A round's summary without what only programs read."""
    lowest = sorted(summary["agreement"].items(), key=lambda pair: (pair[1], pair[0]))[:5]
    shown = {k: v for k, v in summary.items() if k not in ("agreement", "measured", "models")}
    return shown | {"lowest agreement": dict(lowest)}


class ProgressLine:
    """Turns reports into a line of text, not too often.

    Args:
        every: Seconds between two lines of one stage; a new stage always gives one.
    """

    def __init__(self, every: float) -> None:
        self.every, self.started = every, time.monotonic()
        self._stage, self._last = "", -every

    def __call__(
        self, done: float, total: float, *, stage: str = "", eta: float | None = None, **numbers: Any
    ) -> str | None:
        now = time.monotonic() - self.started
        finished = not stage and done >= total
        if now - self._last < self.every and stage == self._stage and not finished:
            return None
        self._stage, self._last = stage, now
        if eta is None and done:
            eta = now / done * (total - done)
        parts = [
            f"{done / total:4.0%}" if total else "",
            stage,
            *(f"{k} {short(v)}" for k, v in numbers.items()),
        ]
        if eta is not None:
            parts.append(f"{int(eta) // 60}:{int(eta) % 60:02d} left")
        return "  ".join(p for p in parts if p)
