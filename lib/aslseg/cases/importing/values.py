"""What the voxel values and names of other people's labels mean among the configured labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from aslseg.errors import BadLabelError, BadSettingsError
from aslseg.types import Labels
from aslseg.volume.io import read_image
from aslseg.volume.segments import same_name

ROUNDING = 0.02  # a label scaled by 255/256 in its header is 0.9961 for 1
MOST_VALUES = 65536


@dataclass(frozen=True)
class Question:
    """Something that only the user can decide.

    Attributes:
        text: What is in doubt.
        option: The option of the command that answers it.
        answer: Beginning of the answer, as ``255=``.
        example: An answer, complete.
    """

    text: str
    option: str
    answer: str
    example: str

    def __str__(self) -> str:
        return f"{self.text}; write {self.option} {self.example}"


@dataclass(frozen=True)
class Meaning:
    """What values and names stand for.

    Attributes:
        values: Value in the files to configured value, 0 for what is left out.
        names: Name of a file that holds one label to configured value.
    """

    values: Mapping[int, int] = field(default_factory=dict)
    names: Mapping[str, int] = field(default_factory=dict)


def parse_map(items: Iterable[str], labels: Labels) -> dict[str, int]:
    """``255=1``, ``255=liver`` and ``cancer=tumour`` to the value that each stands for.

    Raises:
        BadSettingsError: No ``=``, or the right side is neither a label, nor its value, nor 0.
    """
    known = {same_name(n): v for n, v in labels.values.items()} | {str(v): v for v in (0, *labels.values.values())}
    found = {}
    for item in items:
        left, equals, right = item.rpartition("=")
        if not equals or not left.strip() or same_name(right) not in known:
            wanted = ", ".join(f"{v} or {n}" for n, v in labels.values.items())
            raise BadSettingsError(
                f"--map {item}: expected VALUE=LABEL or NAME=LABEL, where LABEL is {wanted}, or 0 to leave it out"
            )
        found[same_name(left)] = known[same_name(right)]
    return found


def understand(
    values: Mapping[int, int],
    files: Iterable[str],
    names: Mapping[int, str],
    mapping: Mapping[str, int],
    labels: Labels,
) -> tuple[Meaning, list[Question]]:
    """Give every value and every named file its label, or ask.

    Args:
        values: Value to the number of label files that hold it; 0 is background.
        files: Names of files that hold one label each.
        names: Value to name, where the data set says so.
        mapping: Answers of the user, from :func:`parse_map`.
        labels: Configured labels.
    """
    own = {same_name(n): v for n, v in labels.values.items()}
    known, questions = {0: 0}, []
    for value, count in sorted(values.items()):
        name = names.get(value, "")
        chosen = [mapping[key] for key in (str(value), same_name(name)) if key in mapping]
        if chosen:
            known[value] = chosen[0]
        elif same_name(name) in own:
            known[value] = own[same_name(name)]
        elif not names and value in own.values():
            known[value] = value
        elif value:
            questions.append(_about_value(value, name, count, labels))
    by_name = {}
    for name in sorted(set(files) - {""}):
        found = mapping.get(same_name(name), own.get(same_name(name)))
        if found is None:
            questions.append(_about_name(name, labels))
        else:
            by_name[name] = found
    return Meaning(known, by_name), questions


def label_values(path: Path) -> np.ndarray:
    """The whole numbers that a label file holds, sorted.

    Raises:
        BadLabelError: Values between them, which come from interpolation.
        BadImageError: The file cannot be read.
    """
    array = read_image(path).array
    return np.unique(whole_numbers(path.name, array)) if array.size < MOST_VALUES else _distinct(path.name, array)


def whole_numbers(name: str, array: np.ndarray) -> np.ndarray:
    """The values of a label rounded to whole numbers, int32.

    Raises:
        BadLabelError: They are further from whole numbers than rounding puts them.
    """
    rounded = np.rint(array)
    if float(np.abs(array - rounded).max(initial=0)) > ROUNDING or float(np.abs(rounded).max(initial=0)) >= 2**31:
        raise BadLabelError(
            f"label {name}: values that are no whole numbers, as interpolation makes them; expected a number for each "
            "label. Resample it by nearest neighbour from the original"
        )
    return rounded.astype(np.int32)


def _distinct(name: str, array: np.ndarray) -> np.ndarray:
    whole = whole_numbers(name, array)
    if whole.min() < 0 or whole.max() >= MOST_VALUES:
        return np.unique(whole)
    return np.flatnonzero(np.bincount(whole.ravel()))  # sorting a whole volume takes many times as long


def _about_value(value: int, name: str, count: int, labels: Labels) -> Question:
    called = f", called {name!r}," if name else ""
    files = "1 label file" if count == 1 else f"{count} label files"
    key = name if name and "=" not in name else str(value)
    return _question(f"value {value}{called} in {files}", key, name, labels)


def _about_name(name: str, labels: Labels) -> Question:
    return _question(f"{name!r}, by which a label file is called,", name, name, labels)


def _question(subject: str, key: str, name: str, labels: Labels) -> Question:
    wanted = ", ".join(f"{v} {n}" for n, v in labels.values.items())
    close = get_close_matches(same_name(name), labels.names, n=1, cutoff=0.5) if name else []
    target = close[0] if close else labels.names[0]
    example = f"'{key}={target}' if it is the {target}, '{key}=0' to leave it out"
    return Question(f"{subject} is none of the labels ({wanted})", "--map", f"{key}=", example)
