"""Scheduling priorities: annotators before rounds, rounds before work that is done ahead of a request."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

ROUND, AHEAD = 10, 19  # niceness


def lower_priority(niceness: int, whole: bool = False) -> None:
    """Raise the niceness of this thread, or of the whole process.

    Threads and processes that are started afterwards inherit it. The niceness is never lowered. Only Linux has
    priorities of threads; other POSIX systems change the process if ``whole`` is given, others do nothing.

    Args:
        niceness: 0 is the default, 19 the lowest priority; Linux gives a thread of niceness 10 about a ninth of the
            time that one of niceness 0 gets.
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
        with suppress(ProcessLookupError):  # the thread has ended meanwhile
            os.setpriority(os.PRIO_PROCESS, thread, max(niceness, os.getpriority(os.PRIO_PROCESS, thread)))
