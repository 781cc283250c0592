"""The scoring method `agreement`: the ledger's numbers where clients and exports can see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod

from aslseg.rounds.ledger.ledger import Ledger


class AgreementScoring(ScoringMethod):
    """Copies the agreement of the last round into the info of each scan.

    Args:
        ledger: Where rounds write it.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__("Dice agreement between the SSL and the adaptation mask, as the last round found it")
        self.ledger = ledger

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Number of scans whose info was written."""
        scores = {
            s.case: {"aslseg": {"agreement": round(s.agreement, 4), "round": s.round, "details": s.details}}
            for s in self.ledger.scores()
        }
        if hasattr(datastore, "update_infos"):
            datastore.update_infos(scores)
        else:
            for case, info in scores.items():
                datastore.update_image_info(case, info)
        return {"scored": len(scores)}
