"""Progress of a round and the time that is left, in a small JSON file that any process may read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aslseg.files import write_json
from aslseg.rounds.scheduling.brake import NO_BRAKE, Brake
from aslseg.types import ProgressCallback, no_progress

EVERY_SECONDS = 1.0
ENOUGH_UNITS = 3
"""Units of the running stage after which its own pace says more than that of earlier rounds."""


@dataclass(frozen=True)
class Work:
    """What a stage has to do.

    Attributes:
        units: Steps or scans, if nothing of it was done before.
        rate: Expected seconds for each.
    """

    units: float
    rate: float

    @property
    def seconds(self) -> float:
        """Expected seconds for all of it."""
        return self.units * self.rate


class Pace:
    """Units that a stage has really worked on, and the seconds they took.

    What a stage finds done (a checkpoint, predictions on disk) shows in its first report of any unit, which then counts
    more than one; neither these units nor the seconds before that report count.

    Attributes:
        units, seconds: With the time before the first unit, in which models are loaded and scans read.
        steady_units, steady_seconds: From the first unit on.
        left: Units that are left; None before the first report.
    """

    def __init__(self) -> None:
        self.units, self.seconds = 0.0, 0.0
        self.steady_units, self.steady_seconds = 0.0, 0.0
        self.left: float | None = None
        self._last, self._done, self._total, self._begun = 0.0, 0.0, 0.0, False

    def start(self) -> None:
        """The stage begins."""
        self._last = time.monotonic()

    def advance(self, done: float, total: float) -> None:
        """The stage has done so many of its units."""
        now = time.monotonic()
        again = total != self._total or done < self._done
        before = 0.0 if again else self._done
        if (again or not self._done) and done > 1:
            before, self._last, self._begun = done, now, True
        gained, passed = done - before, now - self._last
        self.units, self.seconds = self.units + gained, self.seconds + passed
        if self._begun:
            self.steady_units, self.steady_seconds = self.steady_units + gained, self.steady_seconds + passed
        self._begun = self._begun or gained > 0
        self._last, self._done, self._total, self.left = now, done, total, max(total - done, 0)

    def skip(self, seconds: float) -> None:
        """So many seconds passed without work."""
        self._last += seconds

    @property
    def steady_rate(self) -> float | None:
        """Seconds for a unit once the work has begun; None while too few are done to say."""
        return self.steady_seconds / self.steady_units if self.steady_units >= ENOUGH_UNITS else None

    @property
    def rate(self) -> float | None:
        """Seconds for a unit, what comes before the first one included where all units were worked on; None without."""
        whole = self.seconds / self.units if self.units else None
        return whole if self.units >= self._total else self.steady_rate or whole


class Progress:
    """Stages that are done and that follow, with an estimate of the time left.

    A stage that follows is expected to take its units times the seconds that a unit took in earlier rounds, scaled by
    how much slower or faster this round is than they were. The running stage goes by its own pace.

    Args:
        path: The JSON file, written atomically and at most once a second.
        work: Stages in their order.
        report: Called with (done, total, stage=..., eta=..., **numbers); done and total count expected seconds.
        round_number: Shown with the rest.
        found: Stages whose results are expected on disk, from the same inputs.
        brake: Pauses or ends the work between its units.
        before: What :func:`read_progress` gave of a run that this one continues; its times count too.
    """

    def __init__(
        self,
        path: Path,
        work: Mapping[str, Work],
        report: ProgressCallback = no_progress,
        round_number: int | None = None,
        found: Collection[str] = (),
        brake: Brake = NO_BRAKE,
        before: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.work, self.report, self.brake = path, dict(work), report, brake
        self.found = set(found)
        self.seconds: dict[str, float] = {}
        self._paces: dict[str, Pace] = {}
        self._started = datetime.now(UTC).isoformat("T", "seconds")
        self._before: dict[str, float] = dict((before or {}).get("spent", {}))
        self._computed: set[str] = set((before or {}).get("computed", ()))
        self._stage, self._fraction, self._part, self._written = "", 0.0, 0.0, 0.0
        self._since, self._paused = 0.0, 0.0
        self._round = round_number

    @contextmanager
    def stage(self, name: str) -> Iterator[ProgressCallback]:
        """Enter a stage; gives the callback for its own steps."""
        self.brake(name, begins=True)
        self._since, self._paused = time.monotonic(), 0.0
        self._stage, self._fraction, pace = name, 0.0, self._paces.setdefault(name, Pace())
        pace.start()

        def report(done: int, total: int, **shown: Any) -> None:
            self._computed.add(name)
            if name in self.found:
                self.found.clear()  # the inputs are not those of before, so that nothing later is found either
            pace.advance(done, total)
            # a stage may train twice or write after it has predicted; progress never goes back
            self._fraction = max(self._fraction, done / max(total, 1))
            self._show(done, total, shown)
            waited = self.brake(name)
            pace.skip(waited)
            self._paused += waited

        self._show(0, 1, {}, force=True)
        yield report
        self.seconds[name] = self._elapsed()
        self._stage = ""

    def _elapsed(self) -> float:
        """Seconds of the running stage, without pauses."""
        return round(time.monotonic() - self._since - self._paused, 2)

    @property
    def spent(self) -> dict[str, float]:
        """Seconds of each stage, with those of the runs that this one continues."""
        now = self.seconds | ({self._stage: self._elapsed()} if self._stage else {})
        names = [*self._before, *(s for s in now if s not in self._before)]
        return {s: round(self._before.get(s, 0.0) + now.get(s, 0.0), 2) for s in names}

    @property
    def measured(self) -> dict[str, float]:
        """:attr:`spent` of the stages that computed something."""
        return {s: t for s, t in self.spent.items() if s in self._computed}

    @property
    def rates(self) -> dict[str, float]:
        """Seconds for a unit of each stage that computed something; later rounds expect these."""
        return {s: round(p.rate, 5) for s, p in self._paces.items() if p.rate is not None}

    def finish(self) -> None:
        """All stages are done."""
        self._write({"state": "done", "eta": 0, "done": 1, "total": 1})

    def fail(self, message: str) -> None:
        """The work stopped with an error.

        Args:
            message: For a person.
        """
        self._write({"state": "failed", "error": message})

    def pause(self, message: str) -> None:
        """The work was ended before it was complete, and goes on another time.

        Args:
            message: For a person.
        """
        self._write({"state": "paused", "message": message, "part": self._part})

    def eta(self) -> float:
        """Seconds that are left."""
        spent, usual = 0.0, 0.0
        for stage in self._paces.keys() & self.work.keys():
            pace = self._paces[stage]
            units, seconds = pace.units, pace.seconds
            if stage == self._stage:
                units, seconds = pace.steady_units, pace.steady_seconds
            spent, usual = spent + seconds, usual + units * self.work[stage].rate
        speed = spent / usual if usual else 1.0
        open_stages = [s for s in self.work if s not in self.seconds and s != self._stage and s not in self.found]
        return speed * sum(self.work[s].seconds for s in open_stages) + self._left_now(speed)

    def _left_now(self, speed: float) -> float:
        """Seconds that the running stage still takes."""
        work, pace = self.work.get(self._stage), self._paces.get(self._stage)
        if work is None or pace is None:
            return 0.0
        if pace.left is None:
            return 0.0 if self._stage in self.found else speed * work.seconds
        return pace.left * (pace.steady_rate or speed * work.rate)

    def _show(self, done: int, total: int, shown: dict[str, Any], force: bool = False) -> None:
        eta = self.eta()
        whole = sum(work.seconds for work in self.work.values())
        now = self.work[self._stage].seconds * self._fraction if self._stage in self.work else 0.0
        past = sum(self.work[s].seconds for s in self.seconds if s in self.work) + now
        self._part = round(past / whole, 4) if whole else 1.0
        self.report(min(past, whole), whole, stage=self._stage, eta=eta, **shown)
        if force or time.monotonic() - self._written >= EVERY_SECONDS:
            content = {"state": "running", "done": done, "total": total, "numbers": shown, "part": self._part}
            finish = datetime.now(UTC) + timedelta(seconds=eta)
            self._write(content | {"eta": round(eta), "finish": finish.isoformat("T", "seconds")})

    def _write(self, content: dict[str, Any]) -> None:
        self._written = time.monotonic()
        names = list(self.work)
        common = {
            "pid": os.getpid(),
            "started": self._started,
            "updated": datetime.now(UTC).isoformat("T", "seconds"),
            "round": self._round,
            "stage": self._stage,
            "stage_index": names.index(self._stage) + 1 if self._stage in names else len(self.seconds),
            "stages": len(names),
            "seconds": self.seconds,
            "spent": self.spent,
            "computed": sorted(self._computed),
        }
        write_json(self.path, common | content)


def read_progress(path: Path) -> dict[str, Any]:
    """The progress file; ``state`` is ``none``, ``running``, ``done``, ``paused``, ``failed`` or ``interrupted``."""
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
