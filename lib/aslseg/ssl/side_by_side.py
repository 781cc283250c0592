"""Several trainings of the SSL model at a time, each in a process of its own.

A small network keeps neither several threads nor a GPU busy: two trainings with a thread each do more steps a second
than one with two threads. A process, because the random generators of PyTorch are one for all threads of a process.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aslseg.cases.prepare import Spacing
from aslseg.cases.prepared_case import Prepared, arrays, backing_file
from aslseg.compute.device import choose_device
from aslseg.compute.free_memory import free_memory
from aslseg.errors import NoResourcesError, TrainingDivergedError
from aslseg.settings import Settings
from aslseg.ssl import distributed, training
from aslseg.types import ProgressCallback

logger = logging.getLogger(__name__)

GB = 1e9
PROCESS_GB = 3.0
"""Memory of a training beside its scans: Python and its packages, network, patches and what they leave behind."""
BOUND = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Variables that bind the threads of a process to cores: several processes would share the first ones."""
END_SECONDS = 600.0
"""How long a process may take to its next step, and to write its checkpoint, once nobody waits for it."""


@dataclass(frozen=True)
class Training:
    """Arguments of :func:`aslseg.ssl.training.train`."""

    labelled: Sequence[Prepared]
    unlabelled: Sequence[Prepared]
    settings: Settings
    out: Path
    iterations: int
    spacing: Spacing
    init: Path | None = None
    logs: Path | None = None

    def run(self, report: ProgressCallback) -> dict[str, Any]:
        """Train in this process, with the arrays of files memory-mapped."""
        cases = self.unpacked()
        return training.train(
            cases.labelled,
            cases.unlabelled,
            self.settings,
            self.out,
            iterations=self.iterations,
            spacing=self.spacing,
            init=self.init,
            logs=self.logs,
            report=report,
        )

    def packed(self) -> Training:
        """Without the arrays that lie in files: a process that is sent them would have copies of its own."""
        return self._with(packed)

    def unpacked(self) -> Training:
        """With the arrays of these files, memory-mapped."""
        return self._with(_unpacked)

    def _with(self, change: Callable[[Prepared], Prepared]) -> Training:
        return replace(self, labelled=[*map(change, self.labelled)], unlabelled=[*map(change, self.unlabelled)])


Outcome = dict[str, Any] | TrainingDivergedError
"""What a training returns, or why it gave no model."""


def places(settings: Settings, count: int) -> int:
    """How many of so many trainings are done at a time: ``folds_at_once``, or as many as threads and memory allow.

    One where several processes share a training (:mod:`aslseg.ssl.distributed`); ``auto`` is one on a GPU, which other
    trainings may fill.
    """
    if distributed.world() > 1:
        return 1
    if settings.folds_at_once != "auto":
        return min(count, settings.folds_at_once)
    if choose_device(settings).type != "cpu":
        return 1
    room = free_memory() / GB - settings.training_memory_gb
    return max(1, min(count, _threads(settings), int(room / PROCESS_GB)))


def train_all(trainings: Sequence[Training], at_once: int, report: ProgressCallback) -> list[Outcome]:
    """Do some trainings, several at a time.

    Threads and memory for scans are shared out among those that run. With one at a time they run in this process.

    Args:
        trainings: Each as :meth:`Training.run`.
        at_once: How many run at a time.
        report: Called with (step, steps) of all trainings, after each step of one. Where it waits, they wait; where it
            raises, each of them writes a checkpoint and ends.

    Returns:
        What each has given, in their order.

    Raises:
        NoResourcesError: A process died, or none could be started.
    """
    steps = Steps([t.iterations for t in trainings], report)
    at_once = min(at_once, len(trainings))
    if at_once < 2:
        return [_here(one, steps, number) for number, one in enumerate(trainings)]
    settings = trainings[0].settings
    share = {
        "threads": max(1, _threads(settings) // at_once),
        "training_memory_gb": settings.training_memory_gb / at_once,
    }
    waiting = [(n, replace(t, settings=t.settings.model_copy(update=share))) for n, t in enumerate(trainings)]
    running: dict[Connection, Process] = {}
    found: dict[int, Outcome] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                process = Process(*waiting.pop(0))
                running[process.connection] = process
            for connection in wait(list(running)):
                process = running[connection]  # type: ignore[index]
                outcome = process.answer(steps)
                if outcome is not None:
                    found[process.number] = outcome
                    steps.finish(process.number)
                    del running[process.connection]
    finally:
        # all of them first, so that they end at the same time
        for process in running.values():
            process.connection.close()
        for process in running.values():
            process.end()
    return [found[n] for n in range(len(trainings))]


class Steps:
    """Steps of several trainings, as those of one.

    Steps that a checkpoint had done, or that are left undone since the training diverged, are taken out of the total:
    they say nothing of how long a step takes. A step is reported by itself, so that what is more was found done.

    Args:
        totals: Steps of each.
        report: Called with (steps done, all steps).
    """

    def __init__(self, totals: Sequence[int], report: ProgressCallback) -> None:
        self.totals, self.report = list(totals), report
        self.done = [0] * len(totals)
        self.last = [0] * len(totals)

    def __call__(self, number: int, step: int, shown: dict[str, Any]) -> None:
        """A training has done so many steps."""
        new = step - self.last[number]
        self.totals[number] -= max(0, new - 1)
        self.done[number] += min(1, max(0, new))
        self.last[number] = step
        self.report(sum(self.done), sum(self.totals), **shown)

    def finish(self, number: int) -> None:
        """A training has ended."""
        self.totals[number] = self.done[number]


class Process:
    """A training in a process of its own, which waits after each step for its answer.

    Args:
        number: Of the training.
        training: What it does.

    Raises:
        NoResourcesError: The system has no room for a process.
    """

    def __init__(self, number: int, training: Training) -> None:
        self.number, self.training = number, training
        # the same code as here, wherever this was imported from
        library = os.pathsep.join(
            filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")])
        )
        given = {"OMP_NUM_THREADS": str(training.settings.threads), "PYTHONPATH": library}
        try:
            self.connection, theirs = Pipe()
        except OSError as error:
            raise NoResourcesError(f"no process for the training of a fold could be started ({error})") from error
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                # -P: Python files of the current folder, which may be the studies folder, are not ours
                [sys.executable, "-P", "-m", "aslseg.ssl.own_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if name not in BOUND} | given,
            )
        except OSError as error:
            self.connection.close()
            raise NoResourcesError(f"no process for the training of a fold could be started ({error})") from error
        finally:
            theirs.close()

    def answer(self, steps: Steps) -> Outcome | None:
        """Take what it says, and let it go on; returns its outcome once there is one.

        Raises:
            NoResourcesError: It has died.
            Exception: What it raised.
        """
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError) as error:
            raise NoResourcesError(self._died()) from error
        if kind == "log":
            log = logging.getLogger(value.name)
            if log.isEnabledFor(value.levelno):
                log.handle(value)
            return None
        if kind in ("ready", "step"):
            if kind == "step":
                steps(self.number, *value)
            # one that has ended meanwhile says so the next time it is read from
            with suppress(OSError):
                self.connection.send(self.training.packed() if kind == "ready" else True)
            return None
        self.end()
        if isinstance(value, BaseException) and not isinstance(value, TrainingDivergedError):
            raise value
        return value

    def end(self) -> None:
        """Tell it to write a checkpoint and to end; it does so after the step in which it is."""
        self.connection.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _died(self) -> str:
        code = self._process.wait(END_SECONDS)
        memory = "the machine may have had no memory left: --conf folds_at_once 1 trains one fold after the other"
        why = memory if code == -signal.SIGKILL else "what it wrote before is in the log"
        ended = f"the training for {self.training.out} ended without a result (exit code {code})"
        return f"{ended}; {why}. What is done is kept"


def _here(one: Training, steps: Steps, number: int) -> Outcome:
    result: Outcome
    try:
        result = one.run(lambda step, _, **shown: steps(number, step, shown))
    except TrainingDivergedError as error:
        result = error
    steps.finish(number)
    return result


def _threads(settings: Settings) -> int:
    return settings.threads or torch.get_num_threads()


def packed(case: Prepared) -> Prepared:
    """A case with the files of its memory-mapped arrays in their place: each mapped file is an open one."""
    files = {name: backing_file(array) for name, array in arrays(case).items()}
    return replace(case, **{name: file for name, file in files.items() if file is not None})  # type: ignore[arg-type]


def _unpacked(case: Prepared) -> Prepared:
    names = ("image", "label", "voxel_weight")
    files = {name: getattr(case, name) for name in names if isinstance(getattr(case, name), Path)}
    return replace(case, **{name: np.load(file, mmap_mode="r") for name, file in files.items()})
