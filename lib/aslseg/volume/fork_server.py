"""A process that has imported what some work needs, and forks a child for each piece of it.

Starting Python and importing numpy takes longer than reading a label, and competes with the request that waits; a fork
takes a few milliseconds. The process itself never sees what its children read: whatever a file does to the child that
reads it, the next one begins as clean as the first. It has one thread, so that a fork copies no lock in use.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from aslseg.errors import DiskFullError, NoResourcesError
from aslseg.files import FULL

CHILDREN = 4
"""Pieces of work at a time; each may take as much memory as its limit allows, so that more of them wait."""
MOST_WAITING = 8
"""Pieces of work that wait. Each keeps one of the 40 threads that answer requests; more would stop all others."""
WAIT_SECONDS = 30.0
"""How long a piece of work waits for its turn: who sent it, and a thread of the server, wait with it."""
KILL_SECONDS = 5.0
"""How long the process may take to end a child; after these it is ended itself."""


TROUBLES = {os.EX_IOERR: errno.ENOSPC, os.EX_OSERR: errno.EAGAIN}
"""Exit codes of a child that met a trouble of this machine, not of what it read."""


class ForkServer:
    """Has children do pieces of work; safe to use from several threads, each piece has a child of its own.

    The process is started at the first piece of work, again where it has died, and ends with this one.

    Args:
        module: What it runs: a module that calls :func:`serve`.
    """

    _lock: threading.Lock
    _places: threading.Semaphore
    _queue: threading.Semaphore
    _process: subprocess.Popen[bytes] | None
    _control: socket.socket | None

    def __init__(self, module: str) -> None:
        self.module = module
        self._forget()

    def start(self) -> None:
        """Start the process ahead; returns at once."""
        with self._lock:
            self._running()

    @contextmanager
    def work(self, job: dict[str, Any], seconds: float) -> Iterator[tuple[IO[bytes], str]]:
        """Have a child do a piece of work, once fewer than ``CHILDREN`` are at work.

        Args:
            job: What ``serve`` gives to its function; JSON.
            seconds: After these the child is killed.

        Returns:
            A context that gives what the child has written, nothing if it took too long, and how it ended.

        Raises:
            DiskFullError: The folder for temporary files is full.
            NoResourcesError: The operating system gives no process, or no file for the answer; or all children were at
                work for :data:`WAIT_SECONDS`; or :data:`MOST_WAITING` others wait already.
        """
        with ExitStack() as files:
            with _own_troubles(), self._place():
                file = files.enter_context(tempfile.TemporaryFile())
                reason = self._answer(file, job, seconds)
            yield file, reason

    @contextmanager
    def _place(self) -> Iterator[None]:
        """One of the ``CHILDREN`` places."""
        if not self._queue.acquire(blocking=False):
            raise NoResourcesError(
                f"the server reads {CHILDREN} other files, and {MOST_WAITING} more wait; send it again later"
            )
        try:
            if not self._places.acquire(timeout=WAIT_SECONDS):
                raise NoResourcesError(
                    f"the server reads {CHILDREN} other files, and none was done for {WAIT_SECONDS:g} s; send it later"
                )
            try:
                yield
            finally:
                self._places.release()
        finally:
            self._queue.release()

    def _answer(self, file: IO[bytes], job: dict[str, Any], seconds: float) -> str:
        """Fill a file with the answer of a child; how the child ended."""
        for _ in range(2):  # where somebody has killed the process, a new one does it
            _rewrite(file, json.dumps(job).encode())
            status, reason = self._run(file, seconds)
            if status is not None:
                break
        if status in TROUBLES:
            raise OSError(TROUBLES[status], os.strerror(TROUBLES[status]))
        if status != 0:
            _rewrite(file)
        file.seek(0)
        return reason

    def stop(self) -> None:
        """End the process and its children."""
        with self._lock:
            process, control = self._process, self._control
            self._process = self._control = None
        if control is not None:
            control.close()  # it kills its children and ends
        if process is not None:
            try:
                process.wait(KILL_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def forget(self) -> None:
        """To be called in a fork of this process, which needs a process of its own."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.returncode = 0  # not a child of ours
        self._forget()

    def _forget(self) -> None:
        self._lock, self._places = threading.Lock(), threading.Semaphore(CHILDREN)
        self._queue = threading.Semaphore(CHILDREN + MOST_WAITING)
        self._process = self._control = None

    def _run(self, file: IO[bytes], seconds: float) -> tuple[int | None, str]:
        """Exit status of the child, None where the process died with it; and the same in words."""
        mine, theirs = socket.socketpair()
        with mine:
            with theirs, self._lock:
                process, control = self._running()
                with suppress(OSError):  # it has just died, which the end of `mine` shows
                    socket.send_fds(control, [b"+"], [theirs.fileno(), file.fileno()])
            mine.settimeout(seconds)
            try:
                answer = mine.recv(32)
            except TimeoutError:
                if not _killed(mine):
                    process.kill()  # it hangs
                return -signal.SIGKILL, f"more than {seconds:g} s"
        if not answer:
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILL_SECONDS)
            return None, f"exit code {process.returncode}"
        return int(answer), f"exit code {int(answer)}"

    def _running(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """The process and the socket over which it gets its work. The caller holds the lock."""
        if self._process is None or self._control is None or self._process.poll() is not None:
            if self._control is not None:
                self._control.close()
            ours, theirs = socket.socketpair()
            ours.settimeout(KILL_SECONDS)
            with theirs:
                self._control, self._process = ours, self._start(theirs)
        return self._process, self._control

    def _start(self, control: socket.socket) -> subprocess.Popen[bytes]:
        library = str(Path(__file__).resolve().parents[2])
        # a thread pool of the linear algebra library would take address space for each core, and survive no fork
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        return subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-P", "-m", self.module],
            stdin=control.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **single, "PYTHONPATH": library},
        )


def serve(work: Callable[[dict[str, Any], IO[bytes]], None]) -> None:
    """Fork a child for each job that comes over the socket at descriptor 0, until its other end is closed.

    Args:
        work: Called in the child with the job and the file into which it writes its answer.
    """
    gc.freeze()  # a collection in a child would copy what it shares with the others
    awake, wake = os.pipe()
    for end in (awake, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches the whole group; this ends with the server
    control, children = socket.socket(fileno=0), dict[int, socket.socket]()
    try:
        while True:
            watched: list[int | socket.socket] = [control, awake, *children.values()]
            ready, _, _ = select.select(watched, [], [])
            if awake in ready:
                os.read(awake, 4096)
            for pid, asker in list(children.items()):
                if asker in ready:  # waits no longer
                    os.kill(pid, signal.SIGKILL)
                found, status = os.waitpid(pid, 0 if asker in ready else os.WNOHANG)
                if found:
                    with children.pop(pid) as gone, suppress(OSError):
                        gone.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            if control in ready and not _begin(control, children, work):
                return
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


@contextmanager
def _own_troubles() -> Iterator[None]:
    """Errors of the operating system as errors of the server, which no other upload would mend."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise DiskFullError(
                "the server's folder for temporary files (TMPDIR) is full; free some space there and send it again"
            ) from error
        reason = error.strerror or type(error).__name__
        raise NoResourcesError(
            f"the server has no process or file left for this ({reason}); send it again later. If it stays, look at "
            "the memory, the limit of processes and TMPDIR of the server"
        ) from error


def _killed(mine: socket.socket) -> bool:
    """Have the child killed; False if nobody does it."""
    mine.shutdown(socket.SHUT_WR)
    mine.settimeout(KILL_SECONDS)
    try:
        mine.recv(32)
    except TimeoutError:
        return False
    return True


def _begin(
    control: socket.socket, children: dict[int, socket.socket], work: Callable[[dict[str, Any], IO[bytes]], None]
) -> bool:
    """Fork a child for the next job; False if there are no more."""
    data, received, _, _ = socket.recv_fds(control, 1, 2)
    if not data:
        return False
    asker, file = socket.socket(fileno=received[0]), received[1]
    try:
        pid = os.fork()
    except OSError:  # no memory, or too many processes
        with asker, suppress(OSError):
            asker.sendall(str(os.EX_OSERR).encode())
    else:
        if pid == 0:
            for other in (control, asker, *children.values()):
                other.close()
            _child(file, work)
        children[pid] = asker
    os.close(file)
    return True


def _child(descriptor: int, work: Callable[[dict[str, Any], IO[bytes]], None]) -> NoReturn:
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with open(descriptor, "r+b") as file:
            file.seek(0)
            job = json.load(file)
            _rewrite(file)
            work(job, file)
            file.flush()
        code = 0
    except OSError as error:  # what a reader meets in a file is no OSError by now
        code = os.EX_IOERR if error.errno in FULL else os.EX_OSERR
    finally:
        os._exit(code)


def _rewrite(file: IO[bytes], content: bytes = b"") -> None:
    file.seek(0)
    file.truncate()
    file.write(content)
    file.flush()
