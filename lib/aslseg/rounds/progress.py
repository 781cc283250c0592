"""Progress of a round and the time that is left, in a small JSON file that any process may read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aslseg.files import write_json
from aslseg.types import ProgressCallback, no_progress

EVERY_SECONDS = 1.0


class Progress:
    """Stages that are done and that follow, with an estimate of the time left.

    The expected seconds of the stages (of the last round, or rough guesses) are scaled by the ratio of measured to
    expected seconds so far. A stage whose results were found from an earlier round is left out of this ratio.

    Args:
        path: The JSON file, written atomically and at most once a second.
        expected: Stage to expected seconds, in order.
        report: Called with (done, total, stage=..., eta=..., **numbers); done and total count expected seconds.
        round_number: Shown with the rest.
    """

    def __init__(
        self,
        path: Path,
        expected: Mapping[str, float],
        report: ProgressCallback = no_progress,
        round_number: int | None = None,
    ) -> None:
        self.path, self.expected, self.report = path, dict(expected), report
        self.seconds: dict[str, float] = {}
        self._started = datetime.now(UTC).isoformat("T", "seconds")
        self._skipped: set[str] = set()
        self._stage, self._since, self._fraction, self._written = "", time.monotonic(), 0.0, 0.0
        self._round = round_number

    @contextmanager
    def stage(self, name: str) -> Iterator[ProgressCallback]:
        """Enter a stage; gives the callback for its own steps."""
        self._stage, self._since, self._fraction = name, time.monotonic(), 0.0
        calls = 0

        def report(done: int, total: int, **shown: Any) -> None:
            nonlocal calls
            calls += 1
            # a stage may train twice or write after it has predicted; progress never goes back
            self._fraction = max(self._fraction, done / max(total, 1))
            self._show(done, total, shown)

        self._show(0, 1, {}, force=True)
        yield report
        self.seconds[name] = round(time.monotonic() - self._since, 2)
        if not calls:
            self._skipped.add(name)
        self._stage = ""

    @property
    def measured(self) -> dict[str, float]:
        """Seconds of the stages that computed something; the next round expects these."""
        return {s: t for s, t in self.seconds.items() if s not in self._skipped}

    def finish(self) -> None:
        """All stages are done."""
        self._write({"state": "done", "eta": 0, "done": 1, "total": 1})

    def fail(self, message: str) -> None:
        """The work stopped with an error.

        Args:
            message: For a person.
        """
        self._write({"state": "failed", "error": message})

    def eta(self) -> float:
        """Seconds that are left."""
        usual = sum(self.expected.get(s, 0) for s in self.measured) + self.expected.get(self._stage, 0) * self._fraction
        spent = sum(self.measured.values()) + (time.monotonic() - self._since) * bool(self._fraction)
        rest = sum(e for s, e in self.expected.items() if s not in self.seconds)
        rest -= self.expected.get(self._stage, 0) * self._fraction
        return max(rest, 0) * (spent / usual if usual > 0 and spent > 0 else 1)

    def _show(self, done: int, total: int, shown: dict[str, Any], force: bool = False) -> None:
        eta = self.eta()
        whole = sum(self.expected.values())
        past = sum(self.expected.get(s, 0) for s in self.seconds) + self.expected.get(self._stage, 0) * self._fraction
        self.report(min(past, whole), whole, stage=self._stage, eta=eta, **shown)
        if force or time.monotonic() - self._written >= EVERY_SECONDS:
            content = {"state": "running", "done": done, "total": total, "eta": round(eta), "numbers": shown}
            self._write(content | {"part": round(past / whole, 4) if whole else 1.0})

    def _write(self, content: dict[str, Any]) -> None:
        self._written = time.monotonic()
        names = list(self.expected)
        common = {
            "pid": os.getpid(),
            "started": self._started,
            "updated": datetime.now(UTC).isoformat("T", "seconds"),
            "round": self._round,
            "stage": self._stage,
            "stage_index": names.index(self._stage) + 1 if self._stage in names else len(self.seconds),
            "stages": len(names),
            "seconds": self.seconds,
        }
        write_json(self.path, common | content)


def read_progress(path: Path) -> dict[str, Any]:
    """The progress file; ``state`` is ``none``, ``running``, ``done``, ``failed`` or ``interrupted`` (killed)."""
    try:
        content = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {"state": "none"}
    if content.get("state") == "running" and not _alive(content.get("pid")):
        content["state"] = "interrupted"
    return content


def _alive(pid: object) -> bool:
    try:
        os.kill(int(str(pid)), 0)
    except PermissionError:
        return True
    except (ValueError, OSError):
        return False
    return True
