"""The other side of :class:`aslseg.ssl.side_by_side.Process`: one training, and what it says on the way.

python -m aslseg.ssl.own_process FILE_DESCRIPTOR
"""

from __future__ import annotations

import logging
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import torch

from aslseg.errors import AslsegError, OutOfTimeError
from aslseg.ssl.side_by_side import Training

PLAIN = {"args": None, "exc_info": None, "exc_text": None}


class Sender(logging.Handler):
    """Sends records of the log to the process that wanted the training.

    Args:
        connection: To it.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        """Send one, as text: its arguments may be anything."""
        text = self.format(record)
        _send(self.connection, "log", logging.makeLogRecord(record.__dict__ | {"msg": text} | PLAIN))


def main() -> None:
    """Do the training that the connection gives, and send what it returns or raises."""
    # Ctrl-C on a terminal goes to all processes; the one that wanted the training ends this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[Sender(connection)])
    # it is asked for, so that processes start side by side: sending waits until it is read
    _send(connection, "ready", None)
    try:
        training: Training = connection.recv()
    except (EOFError, OSError):
        return  # nobody wants it any more
    torch.set_num_threads(training.settings.threads)

    def report(step: int, _: int, **shown: Any) -> None:
        """Raise OutOfTimeError where nobody waits for the training any more, so that it writes a checkpoint."""
        if not _send(connection, "step", (step, shown)):
            raise OutOfTimeError("ended from outside")
        try:
            connection.recv()
        except (EOFError, OSError) as error:
            raise OutOfTimeError("ended from outside") from error

    try:
        result: Any = training.run(report)
    except (AslsegError, OSError) as error:
        result = error
    except Exception as error:
        # its class may be one that cannot be sent
        logging.getLogger(__name__).exception("the training failed")
        result = RuntimeError(f"{type(error).__name__}: {error}")
    _send(connection, "result", result)


def _send(connection: Connection, kind: str, value: Any) -> bool:
    """Whether there was somebody to send it to."""
    try:
        connection.send((kind, value))
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
