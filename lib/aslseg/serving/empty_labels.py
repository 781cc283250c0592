"""Empty human labels: saved only by those who say that there is nothing to draw in the scan.

An empty label is a statement that networks learn from. It is also what comes when somebody presses *Submit Label* too
early or draws in a segment that is not exported.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from aslseg.serving.http_errors import RefusedError
from aslseg.types import Labels

AGAIN_SECONDS = 30 * 60
PARAMETER = "empty"


class EmptyLabels:
    """Which empty labels were refused, and from whom.

    Args:
        labels: Configured labels, for the message.
        clock: Monotonic seconds.
    """

    def __init__(self, labels: Labels, clock: Callable[[], float] = time.monotonic) -> None:
        self.labels, self.clock = labels, clock
        self._refused: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()

    def require_meant(self, case: str, class_map: np.ndarray, info: Mapping[str, Any]) -> None:
        """Let a label pass that is not empty, or that is meant to be.

        Args:
            case: Id of the scan.
            class_map: (i, j, k) uint8.
            info: What came with the label: ``empty`` says that it is meant; Slicer cannot send that, but can submit
                again within half an hour.

        Raises:
            RefusedError: 409, it is empty and nobody has said that this is meant.
        """
        key = case, str(info.get("user") or info.get("client_id") or "")
        with self._lock:
            now = self.clock()
            self._refused = {k: at for k, at in self._refused.items() if at > now - AGAIN_SECONDS}
            again = self._refused.pop(key, None) is not None
            if class_map.any() or again or info.get(PARAMETER) is True:
                return
            self._refused[key] = now
        raise RefusedError(
            f"the label of {case} is empty, so nothing was saved. Draw first; or, if the scan shows no "
            f"{' and no '.join(self.labels.names)}, submit it once more",
            409,
        )
