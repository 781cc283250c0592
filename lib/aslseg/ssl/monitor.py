"""The last steps of a training run, for reports and for noticing collapse."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from aslseg.errors import TrainingDivergedError
from aslseg.types import ProgressCallback

WINDOW = 200
COLLAPSE_PART = 0.1


class TrainingMonitor:
    """Counts steps and keeps the numbers of the last ones; part of a checkpoint.

    Args:
        total: Steps of the whole run.
        report: Called with (step, total, loss=mean of the last 50 steps).

    Attributes:
        done: Steps done.
        recent: [loss, predicted foreground, labelled foreground] of the last 200 steps, foreground as a part of the
            voxels.
    """

    def __init__(self, total: int, report: ProgressCallback) -> None:
        self.total, self._callback = total, report
        self.done = 0
        self.recent: list[list[float]] = []

    def start_at(self, done: int, recent: list[list[float]]) -> None:
        """Go on from a checkpoint."""
        self.done, self.recent = done, recent

    def update(self, logs: Mapping[str, float]) -> None:
        """Take in one more step's numbers."""
        self.done += 1
        self.recent = [*self.recent, [logs["loss"], logs["foreground"], logs["truth"]]][-WINDOW:]

    def report(self) -> None:
        """Call the progress callback with the mean loss of the last 50 steps."""
        self._callback(self.done, self.total, loss=self.loss(50))

    def loss(self, steps: int) -> float | None:
        """Mean loss of the last steps; None before the first."""
        return float(np.mean([row[0] for row in self.recent[-steps:]])) if self.recent else None

    def check_collapse(self, consistency: float) -> None:
        """Consistency alone is smallest for the empty mask; notice when training ends there (docs/science.md §6.3).

        In the second half of the run, over 200 steps, less than a tenth of the labelled foreground is predicted.

        Args:
            consistency: Largest weight of the unlabelled loss, for the message; 0 where no setting changes it.

        Raises:
            TrainingDivergedError: It collapsed.
        """
        if self.done < self.total / 2 or len(self.recent) < WINDOW:
            return
        _, got, expected = np.mean(self.recent, axis=0)
        if expected > 0 and got < COLLAPSE_PART * expected:
            lower = f"lower consistency (now {consistency:g}), " if consistency else ""
            raise TrainingDivergedError(
                f"collapsed to the empty mask: {got:.2%} of the labelled patches predicted as foreground, "
                f"{expected:.2%} labelled; {lower}train longer (ssl_iterations) or label a scan with more of the target"
            )
