from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from foreign_folders import Import


@pytest.fixture
def importing(tmp_path: Path) -> Import:
    return Import(tmp_path)


@pytest.fixture
def listing() -> Callable[[Path], dict[str, tuple[int, bytes]]]:
    """Every file below a folder with its time of change and its content."""

    def read(folder: Path) -> dict[str, tuple[int, bytes]]:
        files = (p for p in sorted(folder.rglob("*")) if p.is_file())
        return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}

    return read
