"""The model files of a round, or of the published models, that work together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from aslseg.cases.prepare import Spacing
from aslseg.compute.weights import read_metadata
from aslseg.files import sha256
from aslseg.models.kinds import ModelKind


class ModelSet(Mapping[ModelKind, Path]):
    """Kind to model file; never changed after it is made.

    Args:
        files: Model files by kind.
        known: SHA-256 of some of them, so that they are not read again.
    """

    def __init__(self, files: Mapping[ModelKind, Path], known: Mapping[ModelKind, str] | None = None) -> None:
        self._files, self._known = dict(files), dict(known or {})

    def __getitem__(self, kind: ModelKind) -> Path:
        return self._files[kind]

    def __iter__(self) -> Iterator[ModelKind]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def with_file(self, kind: ModelKind, path: Path) -> ModelSet:
        """The same files except for one kind."""
        if self._files.get(kind) == path:
            return self
        return ModelSet({**self._files, kind: path}, {k: h for k, h in self._known.items() if k != kind})

    def sha256(self, kind: ModelKind) -> str:
        """Hex SHA-256 of a file, read once."""
        if kind not in self._known:
            self._known[kind] = sha256(self._files[kind])
        return self._known[kind]

    @property
    def hashes(self) -> dict[str, str]:
        """Kind to SHA-256 of the file."""
        return {kind.value: self.sha256(kind) for kind in self._files}

    @property
    def spacing(self) -> Spacing:
        """Working spacing of the SSL model in mm along x, y, z; None for that of the scans.

        Raises:
            BadWeightsError: The file is damaged.
        """
        kept = read_metadata(self[ModelKind.SSL])["spacing"]
        return None if kept is None else tuple(kept)
