"""Types of settings that are written as text: parsed and checked once, and written back in the same form."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, PlainSerializer

from aslseg.registry import Registry, suggest
from aslseg.settings.windows import Window, check_zone, parse_windows
from aslseg.types import parse_names, parse_nesting

Triple = tuple[float, float, float]
PROMPTS = ("box", "point", "mask")
GENERAL_THRESHOLD = 0.9


@dataclass(frozen=True)
class Thresholds:
    """Least Dice agreement for promotion: one number for all labels, then exceptions by label name."""

    general: float
    exceptions: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Thresholds:
        """From ``0.9,tumour=0.7``; without a number for all labels it is 0.9.

        Raises:
            ValueError: A part is no number or ``label=number`` in 0..1, or stands there twice.
        """
        found: dict[str, float] = {}
        for part in text.split(","):
            name, _, number = (s.strip() for s in part.rpartition("="))
            try:
                value = float(number)
            except ValueError:
                raise ValueError(f"{part.strip()!r} is not a number or label=number") from None
            if not 0 <= value <= 1:
                raise ValueError(f"{number} is outside 0..1")
            if name in found:
                raise ValueError(f"two numbers for {name or 'all labels'}; give one")
            found[name] = value
        general = found.pop("", GENERAL_THRESHOLD)
        return cls(general, tuple(found.items()))

    def by_label(self, names: Iterable[str]) -> dict[str, float]:
        """The threshold of each of these labels."""
        exceptions = dict(self.exceptions)
        return {name: exceptions.get(name, self.general) for name in names}

    def __str__(self) -> str:
        return ",".join([_number(self.general), *(f"{name}={_number(value)}" for name, value in self.exceptions)])


@dataclass(frozen=True)
class AutoThresholds:
    """As :class:`Thresholds`, where the number for all labels may be ``auto``, which is chosen by label."""

    general: float | None = None
    exceptions: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> AutoThresholds:
        """From ``auto``, ``0.8`` or ``auto,tumour=0.6``; without a number for all labels it is ``auto``.

        Raises:
            ValueError: As :meth:`Thresholds.parse`.
        """
        parts = [part.strip() for part in text.split(",")]
        automatic = parts.count("auto")
        if automatic > 1:
            raise ValueError("auto stands there twice; give it once")
        rest = [part for part in parts if part != "auto"]
        given = any("=" not in part for part in rest)
        if automatic and given:
            raise ValueError(f"auto and a number for all labels in {text!r}; give one of them")
        found = Thresholds.parse(",".join(rest)) if rest else Thresholds(0)
        return cls(found.general if given else None, found.exceptions)

    def by_label(self, automatic: Mapping[str, float]) -> dict[str, float]:
        """The number of each label, given those that ``auto`` stands for."""
        exceptions = dict(self.exceptions)
        return {
            name: exceptions.get(name, value if self.general is None else self.general)
            for name, value in automatic.items()
        }

    def __str__(self) -> str:
        general = "auto" if self.general is None else _number(self.general)
        return ",".join([general, *(f"{name}={_number(value)}" for name, value in self.exceptions)])


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def known(value: str, names: Iterable[str], what: str) -> str:
    """The value, if it is one of these names.

    Raises:
        ValueError: It is not; the message has the nearest name.
    """
    names = list(names)
    if value not in names:
        raise ValueError(f"unknown {what} {value!r}; {suggest(value, names)}")
    return value


def _text(parse: Callable[[str], Any]) -> BeforeValidator:
    """Values that are already parsed, as the defaults are, pass through."""
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


def _spacing(text: str) -> str | Triple:
    return text if text in ("auto", "native") else _triple(text, "auto, native or three positive numbers x,y,z")


def _patch(text: str) -> str | tuple[int, int, int]:
    wanted = "auto or three positive whole numbers x,y,z"
    if text == "auto":
        return text
    x, y, z = _triple(text, wanted)
    if not (x.is_integer() and y.is_integer() and z.is_integer()):
        raise ValueError(f"expected {wanted}, got {text!r}")
    return int(x), int(y), int(z)


def _triple(text: str, wanted: str) -> Triple:
    try:
        x, y, z = (float(v) for v in text.split(","))
    except ValueError:
        x = y = z = math.nan
    if not (0 < x < math.inf and 0 < y < math.inf and 0 < z < math.inf):
        raise ValueError(f"expected {wanted}, got {text!r}")
    return x, y, z


def _prompts(text: str) -> tuple[str, ...]:
    parts = [part.strip() for part in text.split("+") if part.strip()]
    if not parts:
        raise ValueError(f"expected one or more of {', '.join(PROMPTS)} joined by +, got {text!r}")
    return tuple(dict.fromkeys(known(part, PROMPTS, "prompt") for part in parts))


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise ValueError(f"expected auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def _folder(text: str) -> str:
    if re.match(r"https?:/", text, re.IGNORECASE):
        raise ValueError(f"expected a folder on this machine, got the address {text}; the studies may be one")
    return text


def registered(registry: Registry, *more: str) -> BeforeValidator:
    """For names of plug-ins, and further words beside them."""
    return _text(lambda value: known(value, [*registry, *more], registry.kind))


def _joined(value: Any) -> str:
    return value if isinstance(value, str) else ",".join(map(_number, value))


def _http_address(text: str) -> str:
    wanted = "an address such as https://chat.hospital.example/hooks/aslseg, or nothing"
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if text and (not valid or re.search(r"[\s\x00-\x1f\x7f]", text)):
        raise ValueError(f"expected {wanted}")
    return text


LabelNames = Annotated[tuple[str, ...], _text(parse_names), PlainSerializer(",".join)]
Nesting = Annotated[
    tuple[tuple[str, str], ...], _text(parse_nesting), PlainSerializer(lambda pairs: ",".join(map(":".join, pairs)))
]
Spacing = Annotated[Literal["auto", "native"] | Triple, _text(_spacing), PlainSerializer(_joined)]
PatchSize = Annotated[Literal["auto"] | tuple[int, int, int], _text(_patch), PlainSerializer(_joined)]
LabelThresholds = Annotated[Thresholds, _text(Thresholds.parse), PlainSerializer(str)]
AutoLabelThresholds = Annotated[AutoThresholds, _text(AutoThresholds.parse), PlainSerializer(str)]
PromptKinds = Annotated[tuple[str, ...], _text(_prompts), PlainSerializer("+".join)]
DeviceName = Annotated[str, _text(_device)]
FolderName = Annotated[str, _text(_folder)]
Windows = Annotated[
    tuple[Window, ...], _text(parse_windows), PlainSerializer(lambda windows: ",".join(map(str, windows)))
]
ZoneName = Annotated[str, _text(check_zone)]
HttpAddress = Annotated[str, _text(_http_address)]
