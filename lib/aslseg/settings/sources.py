"""Reading settings from ``--conf``, the environment and ``.env``, with the names that earlier versions had."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from dotenv import dotenv_values
from pydantic import ValidationError

from aslseg.errors import BadSettingsError
from aslseg.files import read_text
from aslseg.registry import suggest
from aslseg.settings.model import Settings

logger = logging.getLogger(__name__)

PREFIX = "ASLSEG_"
# Keys that MONAI Label itself or its sample apps put into --conf; not ours to refuse.
PLATFORM_KEYS = {"models", "preload", "auto_update_scoring"}
# names of version 0.1, and what they are called now
RENAMED = {"memory_gb": "training_memory_gb"}
RENAMED_VALUES = {("sam_train", "adapter"): "med2d_adapter"}
# settings of version 0.1 whose values are fixed now, and to what
REMOVED = {
    "positive_points": "1",
    "negative_points": "0",
    "run_seconds": "5",
    "grow_iou": "0.5",
    "grow_overlap": "0.3",
    "grow_area": "2",
    "grow_intensity": "2",
    "grow_agreement": "0.98",
}


def load_settings(
    conf: Mapping[str, str] | None = None, env: Mapping[str, str] | None = None, dotenv: Path | None = None
) -> tuple[Settings, dict[str, str]]:
    """Read the settings from their three sources.

    Args:
        conf: ``--conf`` pairs, the strongest source. MONAI Label's own keys are passed over.
        env: Environment; ``os.environ`` by default. Only ``ASLSEG_*`` is looked at.
        dotenv: A ``.env`` file; the one in the working folder by default.

    Returns:
        The settings, and for every setting where its value came from:
        ``conf``, ``environment``, ``.env`` or ``default``.

    Raises:
        BadSettingsError: Unknown key (with the nearest valid name) or unusable value.
    """
    sources = (
        (".env", _prefixed(_dotenv(dotenv or Path(".env")))),
        ("environment", _prefixed(os.environ if env is None else env)),
        ("conf", {k: v for k, v in (conf or {}).items() if k not in PLATFORM_KEYS}),
    )
    values: dict[str, Any] = {}
    origin = dict.fromkeys(Settings.model_fields, "default")
    for source, pairs in sources:
        for key, value in _current(pairs, source).items():
            values[key], origin[key] = value, source
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise BadSettingsError(_mistakes(error)) from None
    for name, label in settings.misspelt_defaults.items():
        logger.warning(
            "labels has %r, not the %r for which nested and promote_threshold have defaults; set these two if "
            "they are meant for %r",
            label,
            name,
            label,
        )
    return settings, origin


def _dotenv(path: Path) -> dict[str, str | None]:
    """Pairs of a ``.env`` file in whatever encoding an editor saved it."""
    return dotenv_values(stream=StringIO(read_text(path))) if path.is_file() else {}


def _prefixed(pairs: Mapping[str, str | None]) -> dict[str, str]:
    found = {k[len(PREFIX) :].lower(): v for k, v in pairs.items() if k.startswith(PREFIX) and v is not None}
    found.pop("app_dir", None)
    return found


def _current(pairs: Mapping[str, str], source: str) -> dict[str, str]:
    """The pairs under the names and with the words of this version; a name of this version wins over an old one."""
    found = {}
    for key, value in sorted(pairs.items(), key=lambda pair: pair[0] not in RENAMED):
        name = RENAMED.get(key, key)
        if name != key:
            logger.warning("setting %s in %s has a new name: %s", key, source, name)
        if name in REMOVED:
            logger.warning("setting %s in %s has no effect: its value is always %s now", name, source, REMOVED[name])
            continue
        if name not in Settings.model_fields:
            raise BadSettingsError(f"unknown setting {key!r} in {source}; {suggest(key, list(Settings.model_fields))}")
        new = RENAMED_VALUES.get((name, value))
        if new is not None:
            logger.warning("%s = %s in %s has a new name: %s = %s", name, value, source, name, new)
        found[name] = value if new is None else new
    return found


def _mistakes(error: ValidationError) -> str:
    """Every mistake, by setting, without what pydantic puts before our own messages."""
    reasons: dict[str, list[str]] = {}
    for mistake in error.errors():
        reason = str(mistake["ctx"]["error"]) if mistake["type"] == "value_error" else mistake["msg"]
        name = str(mistake["loc"][0]) if mistake["loc"] else ""
        reasons.setdefault(name, []).append(reason.removeprefix(f"{name}: "))
        if mistake["type"] != "value_error":
            reasons[name][-1] += f", got {mistake['input']!r}"
    joined = {name: _alternatives(found) for name, found in reasons.items()}
    return "; ".join(f"{name}: {reason}" if name else reason for name, reason in joined.items())


def _alternatives(reasons: list[str]) -> str:
    """The reason, or one for each type that a setting may have: ``Input should be 'auto', or a valid integer``."""
    first, *others = reasons
    if others:
        first = first.rsplit(", got ", 1)[0]
    return ", or ".join([first, *(reason.removeprefix("Input should be ") for reason in others)])
