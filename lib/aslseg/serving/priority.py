"""Who gets the processors first where there are too few: annotators, then rounds, then work done ahead."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

ROUND, AHEAD = 10, 19  # niceness


def lower_priority(niceness: int, whole: bool = False) -> None:
    """Let this thread, or the whole process, have what more urgent ones leave.

    Threads and processes that are started afterwards inherit it. Nothing ever becomes more urgent. Only Linux knows
    the priority of a thread; other POSIX systems lower the process if the whole of it is meant, others do nothing.

    Args:
        niceness: 0 is everybody's, 19 the least urgent; between 0 and 10 lies a factor of nine.
        whole: The process with all its threads, not only the calling one.
    """
    if sys.platform.startswith("linux"):
        own = threading.get_native_id()
        threads = [int(task.name) for task in Path("/proc/self/task").iterdir()] if whole else [own]
    elif whole and os.name == "posix":
        threads = [0]
    else:
        return
    for thread in threads:
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.setpriority(os.PRIO_PROCESS, thread, max(niceness, os.getpriority(os.PRIO_PROCESS, thread)))
