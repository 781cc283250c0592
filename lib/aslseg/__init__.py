"""Semi-supervised segmentation with SAM in the loop. Research use only.

The public names are imported when they are first used, so that ``import aslseg`` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aslseg.api import Clicks, evaluate, load_model, read_image, run_round, write_label
    from aslseg.settings import Settings
    from aslseg.types import Volume

    __version__: str

__all__ = ["Clicks", "Settings", "Volume", "evaluate", "load_model", "read_image", "run_round", "write_label"]

_MODULES = dict.fromkeys(__all__, "aslseg.api") | {"Settings": "aslseg.settings", "Volume": "aslseg.types"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
