"""Worker processes: they take part in every training of process 0."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from aslseg.errors import BadWeightsError, TrainingDivergedError
from aslseg.settings import Settings
from aslseg.ssl import checkpoint, distributed
from aslseg.ssl.engine import Trainer

logger = logging.getLogger(__name__)


def help_train() -> list[Trainer]:
    """Wait for trainings of process 0 and take part in each, until :func:`stop_workers` is called there.

    Returns:
        The trained runs, with the same weights as in process 0.

    Raises:
        BadWeightsError: This process sees another checkpoint than process 0; the folder is not shared.
    """
    done = []
    while job := distributed.broadcast():
        settings = Settings(**job["settings"])
        if settings.threads:
            torch.set_num_threads(settings.threads)
        labelled, unlabelled = ([distributed.unpacked(c) for c in job[s]] for s in ("labelled", "unlabelled"))
        init = Path(job["init"]) if job["init"] else None
        trainer = Trainer(labelled, unlabelled, settings, job["iterations"], init)
        kept = checkpoint.read(Path(job["checkpoint"]), job["owner"], trainer.device) if job["first"] else None
        if kept is not None:
            trainer.load_state(kept)
        if (kept["step"] if kept else 0) != job["first"]:
            raise BadWeightsError(f"{job['checkpoint']} is not at step {job['first']}; is the folder on this machine?")
        try:
            for step in range(job["first"], job["iterations"]):
                trainer.step(step)
        except TrainingDivergedError as error:
            # the same in every process; the leading one says it
            logger.debug("%s", error)
        done.append(trainer)
    distributed.close()
    return done


def stop_workers() -> None:
    """End :func:`help_train` in the other processes."""
    if distributed.world() > 1:
        distributed.broadcast(None)
        distributed.close()
