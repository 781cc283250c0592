"""The stages of a round over its frozen cases: training and prediction steps, each found again by its inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.adaptation import predict as adapter_predict
from aslseg.adaptation import train as adapter_train
from aslseg.agreement import measures
from aslseg.agreement.verdict import Reference, reference
from aslseg.cases.prepare import PreparedStore, Spacing, save_array
from aslseg.cases.prepared import Prepared
from aslseg.cases.studies import PSEUDO
from aslseg.errors import AslsegError, BadWeightsError
from aslseg.files import sha256
from aslseg.rounds.artefacts import ArtefactStore, CachedProbabilities
from aslseg.rounds.cases import RoundCases
from aslseg.rounds.ledger import Ledger
from aslseg.rounds.masks import MaskStore
from aslseg.rounds.progress import Progress
from aslseg.sam.cfr import canvas
from aslseg.sam.modeling import build as sam_build
from aslseg.sam.predictor.redraw import redraw
from aslseg.sam.training import finetune
from aslseg.settings import Paths, Settings, relevant
from aslseg.ssl import engine
from aslseg.ssl import predict as ssl_predict
from aslseg.types import ProgressCallback
from aslseg.volume.io import read_image, require_free_disk

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Promoted:
    """A promoted case: on the working grid, and the hashes that say what it is."""

    case: Prepared
    image: str
    mask: str
    disagreement: str

    @property
    def key(self) -> list[str]:
        """What a training step depends on."""
        return [self.case.id, self.image, self.mask, self.disagreement]


class RoundPipeline:
    """Everything a recipe can do with the cases of a round.

    Args:
        paths: Where things lie.
        settings: Frozen for the round.
        ledger: Of the studies folder.
        team: The round's cases.
        progress: Told how far each stage is.
        opened: The ledger's event that opened the round; None where there is no round.
    """

    def __init__(
        self,
        paths: Paths,
        settings: Settings,
        ledger: Ledger,
        team: RoundCases,
        progress: Progress,
        opened: int | None = None,
    ) -> None:
        self.paths, self.settings, self.ledger = paths, settings, ledger
        self.team, self.progress, self.opened = team, progress, opened
        self.labels = settings.label_set
        self.steps = ArtefactStore(paths.rounds / "steps")
        self.masks = MaskStore(paths.home)

    # training

    def train_ssl(self, promoted: Sequence[Promoted], report: ProgressCallback) -> Path:
        """The SSL model for a set of promoted cases.

        Without any it starts from random weights; with some it goes on from the model without, never from an earlier
        retrained one, so that a bad promotion leaves no trace once it is gone.
        """
        s, team = self.settings, self.team
        init = self.train_ssl([], report) if promoted else None
        iterations = s.retrain_iterations if promoted else s.ssl_iterations
        inputs = {
            "human": self._human(),
            "promoted": [p.key for p in promoted],
            "weights": [s.promote_weight, s.disagreement_weight] if promoted else [],
            "unlabelled": [[c.id, team.content[c.id]] for c in team.unlabelled],
            "spacing": team.spacing,
            "iterations": iterations,
            "init": sha256(init) if init else None,
            "settings": relevant(s, "ssl"),
        }
        labelled = [*team.train, *(p.case for p in promoted)]

        def train(out: Path) -> dict[str, Any]:
            return engine.train(
                labelled,
                team.unlabelled,
                s,
                out,
                iterations=iterations,
                spacing=team.spacing,
                init=init,
                logs=self.paths.home / "tracking",
                report=report,
            )

        return self._model("ssl", inputs, train)

    def train_sam(self, report: ProgressCallback) -> Path:
        """SAM, fine-tuned on the human labels."""
        s, init = self.settings, self._base_sam()
        inputs = self._sam_inputs(init, "sam", "prompts")

        def errors(case: Prepared, rng: np.random.Generator) -> np.ndarray:
            return adapter_train.faulty_regions(case, self.labels, rng)

        def train(out: Path) -> dict[str, Any]:
            return finetune.train(self.team.train, s, out, init=init, errors=errors, report=report)

        return self._model("sam", inputs, train)

    def train_canvas(self, report: ProgressCallback) -> Path:
        """SAM for stitched canvases (CFR), fine-tuned on the human labels."""
        s, init = self.settings, self._base_sam()
        inputs = self._sam_inputs(init, "sam")
        return self._model(
            "canvas", inputs, lambda out: canvas.train(self.team.train, s, out, init=init, report=report)
        )

    def train_adapter(self, sam: Path, report: ProgressCallback) -> Path:
        """The adaptation network for a fine-tuned SAM, trained on the human labels."""
        s = self.settings
        inputs = {
            "human": self._human(),
            "spacing": self.team.spacing,
            "sam": sha256(sam),
            "settings": relevant(s, "adapter", "prompts"),
        }

        def train(out: Path) -> dict[str, Any]:
            return adapter_train.train(self.team.train, sam_build.load(sam, s), s, out, report=report)

        return self._model("adapter", inputs, train)

    def _sam_inputs(self, init: Path, *groups: str) -> dict[str, Any]:
        """What a fine-tuned SAM depends on; CFR's files also on the SAM that they are added to."""
        base = self.settings.sam_base
        return {
            "human": self._human(),
            "spacing": self.team.spacing,
            "init": sha256(init),
            "base": sha256(Path(base)) if base else None,
            "settings": relevant(self.settings, *groups),
        }

    def _base_sam(self) -> Path:
        path = sam_build.base_path(self.settings)
        if not path.is_file():
            raise BadWeightsError(f"{path}: no such SAM file; set sam_checkpoint to one, or leave it empty")
        return path

    def _model(self, name: str, inputs: dict[str, Any], train: Callable[[Path], dict[str, Any]]) -> Path:
        require_free_disk(self.paths.home, self.settings.min_free_gb)
        return self.steps.model(name, inputs, train)

    def _human(self) -> list[list[str]]:
        return [[c.id, self.team.content[c.id], self.team.labels[c.id]] for c in self.team.train]

    # prediction

    def predict(self, ssl: Path) -> CachedProbabilities:
        """Region probabilities of an SSL model."""
        inputs = {"ssl": sha256(ssl), "settings": relevant(self.settings, "predict")}
        model = _once(lambda: ssl_predict.load(ssl, self.settings))
        return self._maps("predict", inputs, lambda c: self.labels.region_probabilities(model().predict(c.image)))

    def redraw(self, sam: Path, regions: CachedProbabilities) -> CachedProbabilities:
        """SAM's redrawing of SSL masks."""
        inputs = {
            "sam": sha256(sam),
            "regions": regions.folder.name,
            "settings": relevant(self.settings, "prompts"),
        }
        model = _once(lambda: sam_build.load(sam, self.settings))
        return self._maps("redraw", inputs, lambda c: redraw(model(), c.image, regions(c), self.settings))

    def draw(self, sam: Path) -> CachedProbabilities:
        """Region probabilities of a SAM for canvases, without prompts."""
        inputs = {"canvas": sha256(sam), "sam_canvas": self.settings.sam_canvas, "settings": relevant(self.settings)}
        model = _once(lambda: canvas.load(sam, self.settings))

        def make(case: Prepared) -> np.ndarray:
            return self.labels.region_probabilities(canvas.predict(model(), case.image, self.settings))

        return self._maps("draw", inputs, make)

    def refine(self, adapter: Path, redrawn: CachedProbabilities, regions: CachedProbabilities) -> CachedProbabilities:
        """The adaptation network's refinement of SAM's masks."""
        inputs = {
            "adapter": sha256(adapter),
            "redrawn": redrawn.folder.name,
            "regions": regions.folder.name,
            "settings": relevant(self.settings, "predict"),
        }
        model = _once(lambda: adapter_predict.load(adapter, self.settings))
        return self._maps("refine", inputs, lambda c: model().predict(c.image, redrawn(c), regions(c)))

    def consensus(self, regions: CachedProbabilities, refined: CachedProbabilities) -> CachedProbabilities:
        """The mean of both networks' probabilities."""
        inputs = {"regions": regions.folder.name, "refined": refined.folder.name}
        return self._maps("consensus", inputs, lambda c: (regions(c) + refined(c)) / 2)

    def fill(
        self, maps: CachedProbabilities, cases: Sequence[Prepared], report: ProgressCallback
    ) -> CachedProbabilities:
        """Compute what is missing of the maps of some cases."""
        require_free_disk(self.paths.home, self.settings.min_free_gb)
        missing = [c for c in cases if not maps.has(c)]
        for done, case in enumerate(missing, 1):
            maps(case)
            report(done, len(missing))
        return maps

    def _maps(self, name: str, inputs: dict[str, Any], make: Callable[[Prepared], np.ndarray]) -> CachedProbabilities:
        return CachedProbabilities(self.steps.folder(name, inputs), make, self.team.content.__getitem__)

    # judging

    def decode(self, regions: np.ndarray) -> np.ndarray:
        """Region probabilities (R, i, j, k) to a class map (i, j, k)."""
        return self.labels.decode(regions)

    def dice(self, maps: CachedProbabilities, cases: Iterable[Prepared] | None = None) -> float | None:
        """Mean Dice of regions against the human labels of validation cases, on the working grid.

        The mean over cases for each region, then over regions; a region that neither mask of a case holds says
        nothing about that case. None without cases.
        """
        found: list[list[float]] = [[] for _ in self.labels.names]
        for case in self.team.validation if cases is None else cases:
            predicted = self.labels.regions(self.decode(maps(case)))
            true = self.labels.regions(np.asarray(case.label))
            for values, a, b in zip(found, predicted, true, strict=True):
                value = measures.dice(a, b)
                if value is not None:
                    values.append(value)
        means = [float(np.mean(v)) for v in found if v]
        return float(np.mean(means)) if means else None

    def validation_at(self, spacing: Spacing) -> list[Prepared]:
        """The validation cases on another model's working grid."""
        if spacing == self.team.spacing:
            return self.team.validation
        store = PreparedStore(self.paths.cache, self.settings, spacing)
        return store.load_all([self.team.sources[c.id] for c in self.team.validation])[0]

    # promoted cases

    def promoted_before(self) -> list[Promoted]:
        """What was promoted when the round was opened, as far as its scans are unchanged and still unlabelled.

        A resumed round has promotions of its own in the ledger already; what it starts from must not include them.
        """
        cases = {c.id: c for c in self.team.unlabelled}
        events = self.ledger.masks(PSEUDO, before=self.opened)
        return [
            self.promoted(cases[case], event.details)
            for case, event in sorted(events.items())
            if event.kind == "mask" and case in cases and event.details.get("image") == self.team.content[case]
        ]

    def promoted(self, case: Prepared, details: dict[str, Any]) -> Promoted:
        """A promoted case from its kept files, memory-mapped: how much of it is held in memory, training decides.

        Args:
            case: The unlabelled case.
            details: ``sha256`` of its mask, ``disagreement``: of the map where both networks disagree.
        """
        s = self.settings
        inputs = {
            **{k: details[k] for k in ("image", "sha256", "disagreement")},
            "spacing": self.team.spacing,
            "settings": [s.labels, s.nested, s.disagreement_weight],
        }
        folder = self.steps.folder("promoted", inputs)
        # named by what they were made from, as whole_file's callers expect
        label, weight = (folder / f"{folder.name}.{part}.npy" for part in ("label", "weight"))
        if not (label.exists() and weight.exists()):
            mask, disagreement = (
                read_image(self.masks.path(details[k]), s.max_voxels).array for k in ("sha256", "disagreement")
            )
            doubt = case.grid.to_working(disagreement)
            save_array(weight, (1 - (1 - s.disagreement_weight) * doubt).astype(np.float16))
            save_array(label, case.grid.label_to_working(mask.astype(np.uint8), self.labels))
        learned = replace(
            case,
            label=np.load(label, mmap_mode="r"),
            weight=s.promote_weight,
            voxel_weight=np.load(weight, mmap_mode="r"),
        )
        return Promoted(learned, details["image"], details["sha256"], details["disagreement"])

    @cached_property
    def reference(self) -> Reference:
        """What human labels look like, for the verdict."""
        return reference(self.team.train, self.labels)


def usable(load: Callable[[], Any], what: str) -> bool:
    """Whether a published model can be loaded with the current settings; logs why not."""
    try:
        load()
    except AslsegError as error:
        logger.warning("the published %s model cannot be compared: %s", what, error)
        return False
    return True


def _once(load: Callable[[], Any]) -> Callable[[], Any]:
    return lru_cache(maxsize=1)(load)
