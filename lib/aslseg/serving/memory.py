"""How the C library hands out memory in the server."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT, SMALL = 64 << 20, 32 << 20


def reuse_freed_memory() -> bool:
    """Let glibc keep freed blocks of up to 32 MB for the next ones, 64 MB at most.

    Otherwise it gives activations of a network back to the kernel after every layer, which then clears the pages of the
    next ones: thousands of page faults in a pass of SAM's encoder (docs/results.md). Volumes are larger and go back at
    once, as before.

    Returns:
        Whether there is a glibc that does it.
    """
    if not sys.platform.startswith("linux"):
        return False
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(M_MMAP_THRESHOLD, SMALL) and mallopt(M_TRIM_THRESHOLD, KEPT))
    return False
