"""Training of the published SSL model: one network, or two stages where labels are nested."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.cases.prepare import Spacing, save_array
from aslseg.cases.prepared_case import Prepared, arrays, backing_file, human_labelled
from aslseg.compute.hardware import resolved
from aslseg.compute.weights import load_weights, read_metadata, save_weights
from aslseg.files import sha256
from aslseg.settings import Settings
from aslseg.ssl import engine, nested
from aslseg.ssl.class_watch import not_learned
from aslseg.ssl.nested import Branch, Geometry, Scale
from aslseg.ssl.predict import ScaledModel, load, scale_of
from aslseg.types import Labels, ProgressCallback, no_progress

logger = logging.getLogger(__name__)

# a scan on a stage's own grid costs time and disk before the first step, and a training draws a few thousand patches
MOST_UNLABELLED = 100


def train(
    labelled: Sequence[Prepared],
    unlabelled: Sequence[Prepared],
    settings: Settings,
    out: Path,
    *,
    iterations: int,
    spacing: Spacing,
    init: Path | None = None,
    logs: Path | None = None,
    report: ProgressCallback = no_progress,
) -> dict[str, Any]:
    """Train the SSL model. Arguments, result and errors are those of :func:`aslseg.ssl.engine.train`.

    Labels with a parent get a network of their own (:mod:`aslseg.ssl.nested`), for the part ``nested_fraction`` of
    the steps. It learns inside the parents that humans drew and, in unlabelled scans, that the first stage finds. One
    file holds both. What is done of the stages lies beside ``out`` until then, so that a killed training goes on.

    Returns:
        As the engine, over both stages; ``loss``, ``patch`` and ``seconds_per_step`` are the last stage's.
    """
    settings = resolved(settings)
    run = _Run(labelled, unlabelled, settings, out, spacing, init, logs, report)
    branches = _learnable(labelled, settings)
    if not branches:
        return run.stage(out, labelled, unlabelled, settings, iterations)
    return _train_stages(run, branches, iterations)


def _learnable(labelled: Sequence[Prepared], settings: Settings) -> list[Branch]:
    """The parents with nested labels that get a second stage: those that some human label shows.

    Promoted masks decide nothing of stages and grids, so that a training that learns them has those of the model that
    it goes on from.
    """
    found = []
    for branch in nested.branches(settings.label_set) if settings.nested_fraction else ():
        there = [np.unique(c.label) for c in human_labelled(labelled) if c.label is not None]
        names = branch.labels.names
        if not any(branch.values[0] in values for values in there):
            logger.warning("no labelled scan shows %s: no second stage for %s", names[0], ", ".join(names[1:]))
            continue
        for name, value in zip(names[1:], branch.values[1:], strict=True):
            with_it = sum(value in values for values in there)
            logger.info("%s is labelled in %d of %d scans", name, with_it, len(there))
        found.append(branch)
    return found


@dataclass(frozen=True)
class _Run:
    """Inputs of a training that its stages share."""

    labelled: Sequence[Prepared]
    unlabelled: Sequence[Prepared]
    settings: Settings
    out: Path
    spacing: Spacing
    init: Path | None
    logs: Path | None
    report: ProgressCallback

    def stage(
        self,
        out: Path,
        labelled: Sequence[Prepared],
        unlabelled: Sequence[Prepared],
        settings: Settings,
        iterations: int,
        **changed: Any,
    ) -> dict[str, Any]:
        """Train one network."""
        kept = {"init": self.init, "report": self.report, "reuse": False} | changed
        return engine.train(
            labelled,
            unlabelled,
            settings,
            out,
            iterations=iterations,
            spacing=self.spacing,
            logs=self.logs or self.out.parent / "tracking",
            **kept,
        )

    def beside(self, name: str) -> Path:
        """A file of a stage."""
        return self.out.with_name(f"{self.out.stem}.{name}.safetensors")

    def init_of(self, prefix: str, name: str) -> Path | None:
        """The file that a stage starts from, cut out of the one that the training starts from."""
        if self.init is None:
            return None
        state, metadata = load_weights(self.init, "ssl")
        stages = metadata.get("stages")
        if stages is None:
            # of one stage only: the engine says that it does not fit
            return self.init
        path = self.beside(f"{name}-init")
        save_weights(path, nested.split(state, prefix), {"kind": "ssl"})
        return path

    def report_from(self, done: int, total: int) -> ProgressCallback:
        """The report of a stage that begins at step ``done`` of ``total``."""
        return lambda step, _, **shown: self.report(done + step, total, **shown)


def _train_stages(run: _Run, branches: Sequence[Branch], iterations: int) -> dict[str, Any]:
    """Both stages, and the file that holds them."""
    run = replace(run, labelled=_without_orphans(run.labelled, branches, run.settings.label_set))
    each = max(1, round(iterations * run.settings.nested_fraction / len(branches)))
    steps = max(1, iterations - each * len(branches))
    results, files = [], [run.beside("first")]
    scale = _first_scale(run)
    results.append(_train_first(run, files[0], scale, steps, iterations))
    first = ScaledModel(load(files[0], nested.first_settings(run.settings)), scale)  # type: ignore[arg-type]
    stored: dict[str, Any] = {}
    # promoted cases that leave nested labels open teach the first stage only
    inner = replace(run, labelled=[c for c in run.labelled if _says_all(c, len(run.settings.label_set))])
    for branch in branches:
        name = branch.labels.names[0]
        geometry = nested.geometry(human_labelled(inner.labelled), branch, run.settings, run.spacing)
        files.append(run.beside(f"second-{branch.parent}"))
        report = run.report_from(iterations - each * (len(branches) - len(stored)), iterations)
        results.append(_train_second(inner, files[-1], branch, geometry, first, each, report))
        stored[name] = {"geometry": geometry.stored(), "model": load_weights(files[-1], "ssl")[1]}
    _join(run, files, branches, {"scale": scale.stored(), "second": stored}, iterations)
    for path in run.out.parent.glob(f"{run.out.stem}.*-init.safetensors"):
        path.unlink()
    return _summary(results) | {"sha256": sha256(run.out)}


def _says_all(case: Prepared, classes: int) -> bool:
    """Whether the label says of every voxel which class it has; see :meth:`aslseg.types.Labels.mark_unknown`."""
    return case.label is not None and int(np.max(case.label, initial=0)) <= classes


def _first_scale(run: _Run) -> Scale:
    """The first stage's grid: that of the model that the training goes on from, if there is one."""
    if run.init is not None:
        metadata = read_metadata(run.init)
        if "stages" in metadata:
            return scale_of(metadata)
    return nested.first_scale(human_labelled(run.labelled), run.settings, run.spacing)


def _train_first(run: _Run, out: Path, scale: Scale, steps: int, total: int) -> dict[str, Any]:
    labels, settings = run.settings.label_set, nested.first_settings(run.settings)
    coarse, report = scale.spacing != scale.working, run.report_from(0, total)

    def seen(case: Prepared) -> Prepared:
        if case.label is not None:
            case = replace(case, label=nested.merged(np.asarray(case.label), labels))
        if coarse:
            # a step of the training that takes no step: it may pause or end here
            report(0, steps)
            case = nested.scaled_case(case, settings.label_set, scale)
        return _kept(case, _folder(out))

    unlabelled = map(engine.without_label, _some(run.unlabelled, run.settings) if coarse else run.unlabelled)
    return run.stage(
        out,
        [seen(c) for c in run.labelled],
        [seen(c) for c in unlabelled],
        settings,
        steps,
        init=run.init_of(nested.FIRST, "first"),
        report=report,
        reuse=True,
    )


def _train_second(
    run: _Run, out: Path, branch: Branch, geometry: Geometry, first: Any, steps: int, report: ProgressCallback
) -> dict[str, Any]:
    folder = _folder(out)
    value = nested.top_level(run.settings.label_set).index(branch.parent) + 1
    labelled = [
        _kept(nested.view_case(c, np.isin(np.asarray(c.label), branch.values), branch, geometry), folder)
        for c in _with_parent(run.labelled, branch)
    ]
    unlabelled = []
    for case in map(engine.without_label, _some(run.unlabelled, run.settings)):
        # a step of the training that takes no step: it may pause or end here
        report(0, steps)
        parent = nested.largest(first.predict(case.image).argmax(0) == value)
        if parent.any():
            unlabelled.append(_kept(nested.view_case(case, parent, branch, geometry), folder))
        else:
            logger.warning("%s is not found in %s: the second stage learns without it", branch.labels.names[0], case.id)
    name = f"second-{branch.parent}"
    return run.stage(
        out,
        labelled,
        unlabelled,
        nested.settings_of(run.settings, branch.labels),
        steps,
        init=run.init_of(nested.second_prefix(branch.labels.names[0]), name),
        report=report,
        reuse=True,
    )


def _some(unlabelled: Sequence[Prepared], settings: Settings) -> Sequence[Prepared]:
    """The unlabelled scans that a stage on a grid of its own learns from: MOST_UNLABELLED at random, in their order."""
    if settings.ssl_method == "supervised":
        return ()
    chosen = np.random.default_rng([settings.seed, 11]).permutation(len(unlabelled))[:MOST_UNLABELLED]
    return [unlabelled[n] for n in sorted(chosen)]


def _without_orphans(cases: Sequence[Prepared], branches: Sequence[Branch], labels: Labels) -> list[Prepared]:
    """The labelled cases that show a parent wherever they show what is nested in it."""
    found = []
    for case in cases:
        reasons = [reason for branch in branches if (reason := nested.without_parent(case, branch, labels))]
        for reason in reasons:
            logger.warning("%s", reason)
        found += [] if reasons else [case]
    return found


def _with_parent(cases: Sequence[Prepared], branch: Branch) -> list[Prepared]:
    """The labelled cases that show the parent."""
    return [c for c in cases if c.label is not None and (np.asarray(c.label) == branch.values[0]).any()]


def _folder(out: Path) -> Path:
    """Where the arrays lie that a stage is trained on."""
    return out.with_name(f"{out.stem}.cases")


def _kept(case: Prepared, folder: Path) -> Prepared:
    """A case with what is in memory of it on disk, mapped as other prepared cases are; named by its content."""
    mapped = {}
    for name, array in arrays(case).items():
        if backing_file(array) is not None:
            continue
        digest = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:16]
        path = folder / f"{case.id}-{digest}.{name}.npy"
        if not path.exists():
            save_array(path, array)
        mapped[name] = np.load(path, mmap_mode="r")
    return replace(case, **mapped)


def _join(
    run: _Run, files: Sequence[Path], branches: Sequence[Branch], stored: dict[str, Any], iterations: int
) -> None:
    """Write the file of all stages, and delete theirs."""
    prefixes = [nested.FIRST, *(nested.second_prefix(b.labels.names[0]) for b in branches)]
    state: dict[str, Any] = {}
    about = []
    for prefix, path in zip(prefixes, files, strict=True):
        tensors, metadata = load_weights(path, "ssl")
        state |= {prefix + name: tensor for name, tensor in tensors.items()}
        about.append(metadata)
    whole = about[0] | {
        "labels": list(run.settings.label_set.names),
        "iterations": iterations,
        "init": sha256(run.init) if run.init else None,
        "stages": {"first": about[0], **stored},
    }
    save_weights(run.out, state, whole)
    for path in files:
        path.unlink()
        shutil.rmtree(_folder(path), ignore_errors=True)


def _summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers of the whole training."""
    summed = {k: sum(r[k] for r in results) for k in ("seconds", "steps", "skipped_steps")}
    classes: dict[str, Any] = {}
    for result in results:
        # the parent as the first stage knows it: where it is not found, nothing in it is
        classes = result["classes"] | classes
    return results[-1] | summed | {"classes": classes, "not_learned": not_learned(classes)}
