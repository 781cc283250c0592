"""The model files of a round or of the published models that work together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from aslseg.cases.prepare import Spacing
from aslseg.compute.weights import read_metadata
from aslseg.files import sha256


@dataclass(frozen=True)
class ModelSet:
    """The model files that work together."""

    ssl: Path
    sam: Path
    adapter: Path

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Kind to SHA-256."""
        return {"ssl": sha256(self.ssl), "sam": sha256(self.sam), "adapter": sha256(self.adapter)}

    @property
    def spacing(self) -> Spacing:
        """Working spacing of its SSL model."""
        kept = read_metadata(self.ssl)["spacing"]
        return None if kept is None else tuple(kept)
