"""What can be promised of the masks that are promoted, from pairs of agreement and true Dice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """How far the two networks agreed on one label of one scan, and how good the mask turned out to be.

    Attributes:
        case: The scan.
        agreement: Dice between the two networks' masks.
        dice: Dice between the mask that is (or would be) promoted and the human label.
        audited: Whether the scan was drawn at random from the promoted ones; otherwise it is a human label that the
            predicting network was not trained on.
    """

    case: str
    agreement: float
    dice: float
    audited: bool
