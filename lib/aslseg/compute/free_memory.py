"""Memory that this process may still take: what the machine has, or what is left of its control group's limit.

Containers, services and batch jobs are limited by control groups, of which the machine's own figures say nothing. Both
versions are read (Linux, Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

MEMBERSHIP = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Files:
    """Files of a control group, and the line of its ``memory.stat`` with the file cache that is given up on demand."""

    limit: str
    used: str
    cache: str


V1 = Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = Files("memory.max", "memory.current", "inactive_file")


def free_memory() -> int:
    """Bytes of memory that this process may still take before something is swapped out or killed."""
    return min([psutil.virtual_memory().available, *_left_of_limits()])


def _left_of_limits() -> Iterator[int]:
    """What is left of the limit of each control group that this process is in, as far as they can be read."""
    for files, group in _groups():
        try:
            limit = (group / files.limit).read_text().strip()
            if limit == "max":
                continue
            used = int((group / files.used).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield max(0, int(limit) - used + int(stat.get(files.cache, 0)))
        except (OSError, ValueError):  # not there, or not ours to read: no limit is known
            continue


def _groups() -> Iterator[tuple[Files, Path]]:
    """The folders of this process's control group and of all above it; a container sees its own as the topmost."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:  # not Linux
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        inner = PurePosixPath(path.lstrip("/"))
        if not controllers:
            yield from ((V2, MOUNT / above) for above in (inner, *inner.parents))
        elif "memory" in controllers.split(","):
            yield from ((V1, MOUNT / "memory" / above) for above in (inner, *inner.parents))
