"""ASLseg as a MONAI Label app: the models, trainers, strategies and scoring methods that it offers."""

from __future__ import annotations

import numpy as np
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask

from aslseg.models.kinds import ModelKind
from aslseg.models.loaded import Models
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.serving import app, trainers
from aslseg.serving.cascade_cache import CascadeCache
from aslseg.serving.clicks import ClickSessions, ClickTask
from aslseg.serving.infer_tasks import AdapterTask, CascadeTask, MaskTask
from aslseg.serving.scoring import AgreementScoring
from aslseg.serving.strategies import ByAgreement, ByAudit, Random


class Aslseg(app.ServedApp, MONAILabelApp):
    """The app that MONAI Label finds here: the first name of this file that has MONAILabelApp as a direct base."""

    def init_infers(self) -> dict[str, InferTask]:
        """Slicer runs the first one by itself on the next sample, in place of the mask that it has loaded."""
        # CFR publishes no adaptation network
        last = ModelKind.SSL if self.settings.recipe == "cfr" else ModelKind.ADAPTER
        scans = CascadeCache(Models(self.settings, self.paths))
        clicks = ClickSessions(scans.models)
        self._watch(scans, clicks)
        return {
            "aslseg": CascadeTask(
                scans,
                last,
                (ModelKind.SSL, last),
                "The best automatic mask: the one that the last round stored, or redrawn by SAM and refined now",
            ),
            "ssl": MaskTask(scans, ModelKind.SSL, (ModelKind.SSL,), "Automatic mask of the semi-supervised network"),
            "adapter": AdapterTask(
                scans,
                ModelKind.ADAPTER,
                (ModelKind.SSL, ModelKind.ADAPTER),
                "Adaptation network on SAM's mask, or on the mask sent along",
            ),
            "sam": ClickTask(
                scans,
                clicks,
                "Click in and outside a structure, or draw a box around it; whole object. A large one grows on after "
                "the reply: press Update to see more of it, and before you submit it",
            ),
            "sam_2d": ClickTask(scans, clicks, "The same on the slice that is shown, and only there", dimension=2),
        }

    def _watch(self, scans: CascadeCache, clicks: ClickSessions) -> None:
        """Caches and work ahead, for Prometheus."""
        caches = {
            "cascade": lambda: scans.bytes,
            "click_scans": lambda: clicks.scans.bytes,
            "click_sessions": lambda: clicks.bytes,
            "embeddings": lambda: clicks.cache.bytes,
        }
        self.metrics.watch("aslseg_cache_bytes", "Memory of a cache", caches, "cache")
        jobs = {"clicks": lambda: len(clicks.background)}
        self.metrics.watch("aslseg_background_jobs", "Jobs that are done ahead of a request", jobs, "kind")

    def init_trainers(self) -> dict[str, TrainTask]:
        """Both clients show the progress of the first one."""
        entries = {
            "round": (trainers.full_round, "A whole round: train all, rank, promote, retrain, publish if better"),
            "ssl": (trainers.train_ssl, "The semi-supervised network only"),
            "sam": (trainers.train_sam, "SAM only"),
            "adapter": (trainers.train_adapter, "The adaptation network only"),
        }
        return {k: trainers.Trainer(self.settings, self.paths, do, text) for k, (do, text) in entries.items()}

    def init_strategies(self) -> dict[str, Strategy]:
        """OHIF asks for ``random`` unless the annotator chooses another one."""
        ledger = Ledger(self.paths.ledger)
        lowest = "Lowest agreement first: where a human helps most"
        highest = "Highest agreement first: quick confirmations"
        audits = "Promoted masks drawn at random, so that their quality is known; then the lowest agreement first"
        return {
            "agreement": ByAgreement(ledger, self.leases, self.scan_checks, False, lowest),
            "confirm": ByAgreement(ledger, self.leases, self.scan_checks, True, highest),
            "audit": ByAudit(ledger, self.leases, self.scan_checks, audits),
            "random": Random(self.leases, self.scan_checks, np.random.default_rng()),
        }

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """Agreement between the masks, as the last round found it."""
        return {"agreement": AgreementScoring(Ledger(self.paths.ledger))}
