"""Which process holds a file lock, as far as the operating system says."""

from __future__ import annotations

import re
from pathlib import Path

LOCKS = Path("/proc/locks")
LINE = re.compile(r"\d+: (?:FLOCK|POSIX|OFDLCK)\s+\S+\s+\S+\s+(-?\d+)\s+[0-9a-f]+:[0-9a-f]+:(\d+)\s")


def describe_holder(lock: Path) -> str:
    """The command and process number of who holds a lock, for a message; ``another process`` where that is unknown."""
    try:
        inode, lines = lock.stat().st_ino, LOCKS.read_text().splitlines()
    except OSError:  # no Linux, or the lock has gone
        return "another process"
    found = [match for line in lines if (match := LINE.match(line)) and int(match[2]) == inode]
    pid = int(found[0][1]) if found else -1
    if pid <= 0:
        return "another process, perhaps on another machine"
    return f"process {pid} ({_command(pid)})"


def _command(pid: int) -> str:
    try:
        parts = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "which has ended"
    words = " ".join(part.decode(errors="replace") for part in parts).split()
    return " ".join([Path(words[0]).name, *words[1:]])[:120] if words else "unknown"
