"""One night's round: none where it would change nothing, and an end when the window closes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from aslseg.cases.studies import read_studies
from aslseg.compute.hardware import resolved
from aslseg.errors import AslsegError, NotEnoughCasesError, OutOfTimeError, RoundRunningError
from aslseg.registry import REPORTS
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.run import run_round
from aslseg.rounds.scheduling import schedule
from aslseg.rounds.scheduling.brake import NO_BRAKE, Brake
from aslseg.rounds.scheduling.nights import Nights, inputs_hash, settled
from aslseg.settings import Paths, Settings
from aslseg.types import ProgressCallback, no_progress

logger = logging.getLogger(__name__)


def run_night(
    studies: Path,
    settings: Settings,
    report: ProgressCallback = no_progress,
    *,
    night: str,
    paths: Paths | None = None,
    brake: Brake = NO_BRAKE,
) -> dict[str, Any]:
    """Run the round of a night, or go on with the one that an earlier night began, and note what became of it.

    Args:
        studies, settings, report, paths: As for :func:`aslseg.rounds.run.run_round`.
        night: :attr:`aslseg.rounds.scheduling.schedule.Night.key`.
        brake: Ends the round when the night is over.

    Returns:
        The round's summary; or ``ended`` alone, with the reason: nothing would change, the time is over and the round
        goes on in the next night, or there is nothing to train on.

    Raises:
        AslsegError: As ``run_round``. It is noted and sent to ``report_webhook``, as every other exception is, and the
            round is not tried again before the next night.
    """
    paths, settings = paths or Paths(settings, studies), resolved(settings)
    ledger = Ledger(paths.ledger)
    nights = Nights(ledger, settings)
    try:
        reason = settled(ledger, inputs_hash(read_studies(studies), settings))
        summary = {"ended": reason} if reason else run_round(studies, settings, report, paths=paths, brake=brake)
    except (OutOfTimeError, NotEnoughCasesError) as error:
        summary = {"ended": str(error)}
    except RoundRunningError:
        raise
    except Exception as error:
        # also what nobody expects, such as a GPU without memory: the schedule starts a night without an end again
        reason = str(error) if isinstance(error, AslsegError) else f"{type(error).__name__}: {error}"
        try:
            nights.note_end(night, f"failed: {reason}", schedule.utc_now())
        finally:  # a full disk, on which nothing can be noted, is what people most need to hear of
            _tell(settings, night, error)
        raise
    outcome = summary.get("ended") or f"round {summary['round']} is done"
    logger.info("night of %s: %s", night, outcome)
    nights.note_end(night, outcome, schedule.utc_now())
    return summary


def _tell(settings: Settings, night: str, error: Exception) -> None:
    """Send that a night failed; another failure must not hide the first one."""
    try:
        REPORTS.get("failure")(settings, night, error)
    except Exception as another:
        logger.warning("that the night of %s failed could not be sent (%s)", night, type(another).__name__)
