"""The real scans: read, split, put on the working grid and back, and answered by the SAM that ships."""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from aslseg.agreement.evaluate import evaluate_folders
from aslseg.cases.prepare import prepare, working_spacing
from aslseg.cases.split import split
from aslseg.cases.studies import read_studies
from aslseg.compute.overlap import dice
from aslseg.prompts.frame import SlicePrompt
from aslseg.sam.modeling import build
from aslseg.sam.predictor.embeddings import encode_slices
from aslseg.sam.predictor.slice_predictor import predict_masks
from aslseg.settings import load_settings
from aslseg.volume.io import read_image, read_label

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

pytestmark = pytest.mark.realdata

ATRIUM = {"labels": "atrium", "modality": "mr", "spacing": "native"}


def test_every_lits_label_belongs_to_its_scan_and_survives_the_working_grid(data):
    settings = load_settings({}, env={})[0]
    labels = settings.label_set
    for path in sorted((data / "lits" / "labels").iterdir()):
        volume = read_image(data / "lits" / "images" / path.name)
        label = read_label(path, volume, labels)
        image, grid = prepare(volume, settings, working_spacing([volume], settings))
        assert image.size < 5e6
        assert 0 <= image.min() < image.max() <= 1
        there_and_back = grid.regions_to_native(labels.regions(grid.label_to_working(label, labels)), labels)
        assert dice(labels.regions(label)[0], labels.regions(there_and_back)[0]) > 0.97, path.name


def test_the_atrium_experiment_keeps_patients_and_truth_apart(data, tmp_path):
    import realdata_la

    names = (data / "la" / "train.txt").read_text().split()
    small = tmp_path / "la"
    for folder in ("images", "labels"):
        (small / folder).mkdir(parents=True)
        for name in [*names[:48], *names[-16:]]:
            (small / folder / f"{name}.nii.gz").symlink_to(data / "la" / folder / f"{name}.nii.gz")
    (small / "train.txt").symlink_to(data / "la" / "train.txt")
    realdata_la.build(small, tmp_path / "out")
    studies = read_studies(tmp_path / "out" / "studies")
    assert sorted(studies.final) == sorted(names[:8])
    assert len(studies.images) == 48
    cases = split(studies, 0.2)
    learned = {c.id for c in cases if c.label}
    truth = {p.name.removesuffix(".nii.gz") for p in (tmp_path / "out" / "truth").iterdir()}
    held_out = {p.name.removesuffix(".nii.gz") for p in (tmp_path / "out" / "heldout").iterdir()}
    assert held_out == set(names[-16:])
    assert not held_out & set(studies.images)
    assert not truth & learned
    assert len(truth) == 56


def test_halving_keeps_the_scan_where_it_is(data, tmp_path):
    import realdata_la

    name = (data / "la" / "train.txt").read_text().split()[0]
    whole = nib.load(data / "la" / "labels" / f"{name}.nii.gz")
    array = np.asarray(whole.dataobj, np.float32)
    small = realdata_la.half(array) >= 0.5
    affine = realdata_la.half_affine(whole.affine)

    def centre(mask: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        return nib.affines.apply_affine(matrix, np.argwhere(mask).mean(0))

    assert np.linalg.norm(centre(array > 0, whole.affine) - centre(small, affine)) < 0.2


@pytest.mark.parametrize(("folder", "conf", "least"), [("la", ATRIUM, 0.75), ("lits", {}, 0.8)])
def test_the_shipped_sam_answers_a_box_on_organs_it_never_saw(data, folder, conf, least):
    settings = load_settings(conf, env={})[0]
    model = build.load(build.base_path(settings), settings)
    model.sam.eval()
    found = []
    for path in sorted((data / folder / "labels").iterdir())[:4]:
        volume = read_image(data / folder / "images" / path.name)
        label = read_label(path, volume, settings.label_set)
        image, grid = prepare(volume, settings, None)
        region = settings.label_set.regions(grid.label_to_working(label, settings.label_set))[0]
        k = int(region.sum((0, 1)).argmax())
        truth = region[..., k]
        i, j = (np.flatnonzero(truth.any(axis)) for axis in (1, 0))
        box = (float(j[0]), float(i[0]), float(j[-1] + 1), float(i[-1] + 1))
        prompt = SlicePrompt(box, np.zeros((0, 2)), np.zeros(0, int), None)
        embedding = encode_slices(model, image[..., k : k + 1])
        logits, _, _ = predict_masks(model, embedding, [prompt], truth.shape, ("box",))
        found.append(dice(logits[0].detach().numpy() > 0, truth))
    assert np.mean(found) > least, found


def test_truth_against_itself_is_perfect(data):
    labels = load_settings({}, env={})[0].label_set
    folder = data / "lits" / "labels"
    result = evaluate_folders(folder, folder, labels, regions=True)
    assert len(result["cases"]) == 9
    for name in labels.names:
        assert result["summary"][name]["dice"]["mean"] == 1
        assert result["summary"][name]["hd95"]["mean"] == 0
