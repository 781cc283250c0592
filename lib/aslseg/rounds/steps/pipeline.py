"""Training and prediction over the cases of a round, each step found again by its inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.adaptation import train as adapter_train
from aslseg.adaptation.faults import Faults
from aslseg.agreement.plausibility import Reference, reference
from aslseg.cases.prepare import PreparedStore, Spacing
from aslseg.cases.prepared_case import Prepared
from aslseg.cases.studies import PSEUDO
from aslseg.compute.hardware import resolved
from aslseg.compute.overlap import dice
from aslseg.errors import BadWeightsError, TrainingDivergedError
from aslseg.files import require_disk_budget
from aslseg.models.cascade import NEEDS, CascadeInput, StageOutput, compute
from aslseg.models.kinds import ModelKind
from aslseg.models.loaded import load_model
from aslseg.models.model_set import ModelSet
from aslseg.rounds.label_files.masks import MaskStore
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.scheduling.progress import Progress
from aslseg.rounds.steps.artefacts import ArtefactStore, CachedProbabilities, joined
from aslseg.rounds.steps.cases import RoundCases
from aslseg.rounds.steps.predictions import PREDICTION_STEPS, prediction_inputs
from aslseg.rounds.steps.promoted import Promoted, promoted_case
from aslseg.sam.cfr import canvas
from aslseg.sam.modeling import build as sam_build
from aslseg.sam.training import finetune
from aslseg.settings import Paths, Settings, relevant
from aslseg.ssl.class_watch import warnings_of
from aslseg.ssl.side_by_side import Training, places, train_all
from aslseg.ssl.synthetic_lesions import with_synthetic
from aslseg.types import ProgressCallback
from aslseg.volume.io import read_image, require_free_disk


class RoundPipeline:
    """Everything a recipe can do with the cases of a round.

    Args:
        paths: Where ledger, models and artefacts are.
        settings: Frozen for the round.
        ledger: Of the studies folder.
        cases: The round's cases.
        progress: Shows how far each stage is.
        number: The round; None for a single training or a ranking.
        opened: The ledger's event that opened the round; None where there is no round.

    Attributes:
        notes: What the predictions that this run used say of themselves, and of which scans.
        dropped: Cases that could not stay promoted, with the reason (:mod:`aslseg.rounds.feedback.late`).
    """

    def __init__(
        self,
        paths: Paths,
        settings: Settings,
        ledger: Ledger,
        cases: RoundCases,
        progress: Progress,
        number: int | None = None,
        opened: int | None = None,
    ) -> None:
        self.paths, self.settings, self.ledger = paths, resolved(settings), ledger
        self.cases, self.progress, self.number, self.opened = cases, progress, number, opened
        self.labels = settings.label_set
        self.artefacts = ArtefactStore(paths.rounds / "steps")
        self.masks = MaskStore(paths.home)
        self.not_learned: list[str] = []  # about the SSL model of all labels that was trained last
        self.dropped: dict[str, str] = {}
        self.notes: dict[str, set[str]] = {}

    @property
    def noted(self) -> list[str]:
        """The notes, each with the scans that it is about."""
        return [f"{', '.join(sorted(scans))}: {note}" for note, scans in self.notes.items()]

    # training

    def train_ssl(
        self, promoted: Sequence[Promoted], report: ProgressCallback, without: Collection[str] = (), part: float = 1.0
    ) -> Path:
        """The SSL model for a set of promoted cases.

        Training starts from random weights or, with promoted cases and ``retrain_from ssl``, from the model that was
        trained without any; never from an earlier retrained one, so that a bad promotion has no effect once it is
        withdrawn.

        Args:
            promoted: Machine masks to learn beside the human labels.
            report: Called with (step, steps).
            without: Ids of labelled cases that are left out.
            part: Part of the training's steps that are done.
        """
        init = self.train_ssl([], report, without, part) if promoted and self.settings.retrain_from == "ssl" else None
        inputs, training = self._ssl_step(promoted, init, without, part)
        path = self._model("ssl", inputs, lambda out: replace(training, out=out).run(report))
        if not without:
            self.not_learned = warnings_of(self.artefacts.result(path).get("classes", {}))
        return path

    def train_folds(
        self,
        parts: Sequence[Collection[str]],
        report: ProgressCallback,
        part: float,
        promoted: Sequence[Sequence[Promoted]] = (),
    ) -> list[Path | TrainingDivergedError]:
        """Models as :meth:`train_ssl` makes them, each without some labelled cases, several trained at a time.

        Args:
            parts: Ids of the labelled cases that are left out of each.
            report: Called with (step, steps) of all that are trained.
            part: Part of the training's steps that each does.
            promoted: Machine masks that each learns beside the human labels; none learns any by default. With
                ``retrain_from ssl`` those go on from the models that are there without any.

        Returns:
            Their files, and for each training that diverged why.
        """
        self._require_disk()
        steps = []
        for number, without in enumerate(parts):
            own = promoted[number] if promoted else ()
            init = self.train_ssl([], report, without, part) if own and self.settings.retrain_from == "ssl" else None
            steps.append(self._ssl_step(own, init, without, part))
        return self.artefacts.models(
            "ssl",
            [inputs for inputs, _ in steps],
            lambda outs: train_all(
                [replace(steps[number][1], out=out) for number, out in outs.items()],
                places(self.settings, len(outs)),
                report,
            ),
        )

    def _ssl_step(
        self, promoted: Sequence[Promoted], init: Path | None, without: Collection[str], part: float
    ) -> tuple[dict[str, Any], Training]:
        """What a training of the SSL model depends on, and the training, whose file is set later.

        It learns from no scan of the patients of the cases that are left out.
        """
        s, cases = self.settings, self.cases
        iterations = max(1, round(part * (s.retrain_iterations if promoted else s.ssl_iterations)))
        # other scans of those patients would show it what it is judged on
        unseen = {c.patient for c in cases.train if c.id in without}
        promoted = [p for p in promoted if p.case.patient not in unseen]
        unlabelled = [c for c in cases.unlabelled if c.patient not in unseen]
        inputs = {
            "human": [key for key in self._human() if key[0] not in without],
            "promoted": [p.key for p in promoted],
            "weights": self._weights(promoted),
            "unlabelled": [[c.id, c.image_hash] for c in unlabelled],
            "spacing": cases.spacing,
            "iterations": iterations,
            "init": self.cases.hashes(init) if init else None,
            "settings": relevant(s, "ssl"),
        }
        labelled = [*(c for c in cases.train if c.id not in without), *(p.case for p in promoted)]
        logs = self.paths.home / "tracking"
        return inputs, Training(labelled, unlabelled, s, Path(), iterations, cases.spacing, init, logs)

    def train_sam(self, report: ProgressCallback, faults: Faults | None = None) -> Path:
        """SAM, fine-tuned on the human labels with prompts from masks with errors, by default synthetic ones."""
        s, init, errors = self.settings, self._base_sam(), faults or Faults(self.labels)
        inputs = self._sam_inputs(init, "sam", "prompts") | ({"faults": errors.key} if errors.key else {})

        def train(out: Path) -> dict[str, Any]:
            return finetune.train(with_synthetic(self.cases.train, s), s, out, init=init, errors=errors, report=report)

        return self._model("sam", inputs, train)

    def train_canvas(self, report: ProgressCallback) -> Path:
        """SAM for stitched canvases (CFR), fine-tuned on the human labels."""
        s, init = self.settings, self._base_sam()
        inputs = self._sam_inputs(init, "sam")
        return self._model(
            "canvas", inputs, lambda out: canvas.train(self.cases.train, s, out, init=init, report=report)
        )

    def train_adapter(self, sam: Path, report: ProgressCallback, faults: Faults | None = None) -> Path:
        """The adaptation network for a fine-tuned SAM, trained to correct masks of labelled cases with errors."""
        s = self.settings
        inputs = {
            "human": self._human(),
            "spacing": self.cases.spacing,
            "sam": self.cases.hashes(sam),
            "settings": relevant(s, "adapter", "prompts"),
            **({"faults": faults.key} if faults and faults.key else {}),
        }

        def train(out: Path) -> dict[str, Any]:
            cases = with_synthetic(self.cases.train, s)
            return adapter_train.train(cases, sam_build.load(sam, s), s, out, faults=faults, report=report)

        return self._model("adapter", inputs, train)

    def _sam_inputs(self, init: Path, *groups: str) -> dict[str, Any]:
        """What a fine-tuned SAM depends on; ``sam_base`` is the SAM that CFR's files are added to."""
        base = self.settings.sam_base
        return {
            "human": self._human(),
            "spacing": self.cases.spacing,
            "init": self.cases.hashes(init),
            "base": self.cases.hashes(Path(base)) if base else None,
            "settings": relevant(self.settings, *groups),
        }

    def _base_sam(self) -> Path:
        path = sam_build.base_path(self.settings)
        if not path.is_file():
            raise BadWeightsError(f"{path}: no such SAM file; set sam_checkpoint to one, or leave it empty")
        return path

    def _model(self, name: str, inputs: dict[str, Any], train: Callable[[Path], dict[str, Any]]) -> Path:
        self._require_disk()
        return self.artefacts.model(name, inputs, train)

    def _require_disk(self) -> None:
        require_free_disk(self.paths.home, self.settings.min_free_gb)
        require_disk_budget(self.paths.home, self.settings.round_disk_gb)

    def _weights(self, promoted: Sequence[Promoted]) -> list[float]:
        """The settings that weigh the voxels of promoted cases."""
        if not promoted:
            return []
        s = self.settings
        certainty = [s.uncertainty_weight] if any(p.confidence for p in promoted) else []
        return [s.promote_weight, s.disagreement_weight, *certainty]

    def _human(self) -> list[list[str]]:
        return [[c.id, c.image_hash, c.label_hash] for c in self.cases.train]

    # prediction

    def predict(self, kind: ModelKind, models: ModelSet, *, noted: bool = False) -> CachedProbabilities:
        """Region probabilities of a model, given those of the models before it.

        Args:
            kind: The last model.
            models: It, and those that it needs.
            noted: Whether the round's summary says what they say of themselves; not for models that judge others.
        """
        settings = self.settings
        before = {need: self.predict(need, models, noted=noted) for need in NEEDS[kind]}
        inputs = prediction_inputs(kind, models, settings)
        get_model = lru_cache(maxsize=1)(partial(load_model, kind, models[kind], settings))

        def make(case: Prepared) -> StageOutput:
            given = {need: maps.output(case) for need, maps in before.items()}
            regions = {need: output.regions for need, output in given.items()}
            found = compute(kind, get_model(), self._input(case), regions, settings)
            notes = dict.fromkeys(note for output in (*given.values(), found) for note in output.notes)
            return replace(found, notes=tuple(notes))

        def heard(case: str, note: str) -> None:
            self.notes.setdefault(note, set()).add(case)

        folder = self.artefacts.folder(PREDICTION_STEPS[kind].name, inputs)
        return CachedProbabilities(folder, make, heard if noted else None)

    def consensus(self, first: CachedProbabilities, second: CachedProbabilities) -> CachedProbabilities:
        """The mean of the SSL model's and the adaptation network's probabilities."""
        inputs = {"regions": first.folder.name, "refined": second.folder.name}
        return joined(self.artefacts.folder("consensus", inputs), [first, second], lambda maps: (maps[0] + maps[1]) / 2)

    def ensemble(self, members: Sequence[CachedProbabilities]) -> CachedProbabilities:
        """The mean of several models' probabilities."""
        folder = self.artefacts.folder("ensemble", {"members": [m.folder.name for m in members]})
        return joined(folder, members, lambda maps: np.mean(maps, axis=0), most=True)

    def fill(
        self, maps: CachedProbabilities, cases: Sequence[Prepared], report: ProgressCallback
    ) -> CachedProbabilities:
        """Compute what is missing of the maps of some cases."""
        self._require_disk()
        missing = [c for c in cases if not maps.has(c)]
        for done, case in enumerate(missing, 1):
            maps(case)
            report(done, len(missing))
        return maps

    def _input(self, case: Prepared) -> CascadeInput:
        source = self.cases.sources[case.id]
        return CascadeInput(case.image, case.grid, partial(read_image, source.image, self.settings.max_voxels))

    # scores

    def decode(self, regions: np.ndarray) -> np.ndarray:
        """Region probabilities (R, i, j, k) to a class map (i, j, k)."""
        return self.labels.decode(regions)

    def dice(self, maps: CachedProbabilities, cases: Iterable[Prepared] | None = None) -> float | None:
        """Mean over the labels of :meth:`dice_by_label`; None without cases."""
        means = [mean for mean, _ in self.dice_by_label(maps, cases).values() if mean is not None]
        return float(np.mean(means)) if means else None

    def dice_by_label(
        self, maps: CachedProbabilities, cases: Iterable[Prepared] | None = None
    ) -> dict[str, tuple[float | None, int]]:
        """Dice of each label, with all that is nested in it, against the human labels, on the working grid.

        Args:
            maps: Region probabilities.
            cases: Those that are scored; None takes the validation cases.

        Returns:
            Label to its mean over the cases, None without any, and their number. A case in which both masks of a
            label are empty does not count for it.
        """
        found: list[list[float]] = [[] for _ in self.labels.names]
        for case in self.cases.validation if cases is None else cases:
            predicted = self.labels.regions(self.decode(maps(case)))
            true = self.labels.regions(np.asarray(case.label))
            for values, a, b in zip(found, predicted, true, strict=True):
                value = dice(a, b)
                if value is not None:
                    values.append(value)
        names = self.labels.names
        return {n: (float(np.mean(v)) if v else None, len(v)) for n, v in zip(names, found, strict=True)}

    def at_spacing(self, cases: Sequence[Prepared], spacing: Spacing) -> list[Prepared]:
        """Cases of this round on another model's working grid."""
        known = self.cases
        if spacing == known.spacing:
            return list(cases)
        store = PreparedStore(self.paths.cache, self.settings, spacing, known.hashes)
        return store.load_all([known.sources[c.id] for c in cases])[0]

    # promoted cases

    def promoted_before(self) -> list[Promoted]:
        """What was promoted when the round was opened, as far as its scans are unchanged and still unlabelled.

        A resumed round has promotions of its own in the ledger already; it must not start from these.
        """
        cases = {c.id: c for c in self.cases.unlabelled}
        events = self.ledger.masks(PSEUDO, before=self.opened)
        return [
            self.promoted(cases[case], event.details)
            for case, event in sorted(events.items())
            if event.kind == "mask" and case in cases and event.details.get("image") == cases[case].image_hash
        ]

    def still_promoted(self) -> dict[str, dict[str, Any]]:
        """Case id to the details of its promotion, for what was promoted on the same basis as there is now."""
        cases = {c.id: c.image_hash for c in self.cases.unlabelled}
        return {
            case: {key: value for key, value in event.details.items() if key != "restored"}
            for case, event in self.ledger.masks(PSEUDO, before=self.opened).items()
            if event.kind == "mask"
            and event.details.get("basis") == self.basis
            and event.details.get("image") == cases.get(case)
        }

    @cached_property
    def basis(self) -> str:
        """Hash of what people decide of a round's models: human labels, their scans, and settings."""
        text = json.dumps([self._human(), *self.training_settings()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def training_settings(self) -> list[Any]:
        """Working spacing and settings on which models and their masks depend."""
        s = self.settings
        steps = [s.ssl_iterations, s.retrain_iterations, s.sam_iterations, s.adapter_iterations]
        return [self.cases.spacing, steps, relevant(s, "ssl", "predict", "sam", "prompts", "adapter")]

    def promoted(self, case: Prepared, details: dict[str, Any]) -> Promoted:
        """A promoted case from its kept files; see :func:`aslseg.rounds.steps.promoted.promoted_case`."""
        return promoted_case(case, details, self.settings, self.cases.spacing, self.artefacts, self.kept)

    def kept(self, digest: str) -> np.ndarray:
        """A map from the store of masks, (i, j, k) on its scan's own grid."""
        return read_image(self.masks.path(digest), self.settings.max_voxels).array

    @cached_property
    def reference(self) -> Reference:
        """What the human labels look like, for the verdict."""
        return reference(self.cases.train, self.labels)
