"""Functions of the standard library, replaced for one thread: threads of servers that earlier tests started go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def for_this_thread(instead: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """What calls ``instead`` in the thread that asked for it, and ``real`` in every other."""
    own = threading.get_ident()

    def called(*args: Any, **kwargs: Any) -> Any:
        return (instead if threading.get_ident() == own else real)(*args, **kwargs)

    return called
