"""Both stages of nested labels in one model file: training, going on after a kill, prediction, bad input."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aslseg.cases.prepared_case import Prepared
from aslseg.compute.weights import load_weights, read_metadata, save_weights
from aslseg.errors import BadWeightsError
from aslseg.files import sha256
from aslseg.ssl import engine, nested, nested_batches, predict, specks, training
from aslseg.ssl.synthetic_lesions import Lesions
from aslseg.types import Labels, Volume
from aslseg.volume.geometry import Grid

SHAPE = (40, 36, 20)
STEPS = 5


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(engine, "STATISTICS_BATCHES", 1)
    monkeypatch.setattr(engine, "CLASS_BATCHES", 1)


@pytest.fixture
def settings(tiny_settings):
    def make(**changes: object):
        nested = {"labels": "liver,tumour", "nested": "tumour:liver", "nested_margin": 4, "network": "unet"}
        nested |= {"nested_fraction": 0.6}
        sizes = {"ssl_method": "supervised", "batch_labelled": 1, "batch_unlabelled": 1, "overlap": 0}
        return tiny_settings(**{**nested, **sizes, **changes})

    return make


def case(name: str, tumour: bool = True, liver: bool = True, labelled: bool = True) -> Prepared:
    """A dark scan with a bright liver, in it a lesion of less contrast."""
    rng = np.random.default_rng(len(name))
    label = np.zeros(SHAPE, np.uint8)
    if liver:
        label[8:32, 8:28, 4:16] = 1
    if tumour:
        label[14:18, 12:16, 8:11] = 2
    image = np.select([label == 1, label == 2], [0.7, 0.55], 0.2) + rng.normal(0, 0.03, SHAPE)
    grid = Grid.of(Volume(image, np.eye(4)), None)
    return Prepared(name, name, np.clip(image, 0, 1).astype(np.float32), grid, label if labelled else None)


def run(out, settings, cases=None, free=(), **options):
    cases = [case("a"), case("bb")] if cases is None else cases
    return training.train(cases, list(free), settings, out, **{"iterations": STEPS, "spacing": None, **options})


def test_two_stages_are_one_file_that_keeps_the_contract(tmp_path, settings):
    out = tmp_path / "ssl.safetensors"
    shown = []
    result = run(out, settings(), report=lambda done, total, **_: shown.append((done, total)))
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["ssl.safetensors"]
    assert shown == [(n + 1, STEPS) for n in range(STEPS)]
    assert result["sha256"] == sha256(out)
    assert result["steps"] == STEPS
    assert set(result["classes"]) == {"liver", "tumour"}
    metadata = read_metadata(out)
    assert metadata["labels"] == ["liver", "tumour"]
    assert metadata["stages"]["first"]["labels"] == ["liver"]
    assert [metadata["stages"][s]["iterations"] for s in ("first",)] == [2]
    assert metadata["stages"]["second"]["liver"]["model"]["iterations"] == 3

    model = predict.load(out, settings())
    image = case("ccc").image
    found = model.run(image, uncertainty=True)
    assert found.values.shape == (3, *SHAPE)
    assert np.allclose(found.values.sum(0), 1, atol=1e-5)
    assert found.uncertainty.shape == SHAPE
    assert 0 <= found.uncertainty.min() <= found.uncertainty.max() <= 1
    regions = model.regions(image)
    expected = settings().label_set.region_probabilities(found.values)
    assert np.array_equal(regions, expected)
    assert np.array_equal(model.predict(image), found.values)
    assert model.spacing is None


def test_a_class_that_either_stage_does_not_learn_is_said():
    numbers = {"seconds": 1.0, "steps": 2, "skipped_steps": 0}
    first = numbers | {"classes": {"liver": [0.1, 0.1]}, "not_learned": ["liver"]}
    second = numbers | {"classes": {"liver": [0.9, 0.1], "tumour": [0.8, 0.01]}, "not_learned": []}
    whole = training._summary([first, second])
    assert whole["classes"] == {"liver": [0.1, 0.1], "tumour": [0.8, 0.01]}
    assert whole["not_learned"] == ["liver"]
    assert (whole["seconds"], whole["steps"]) == (2.0, 4)


def test_labels_without_a_parent_are_trained_as_before(tmp_path, settings):
    flat = settings(nested="")
    run(tmp_path / "one.safetensors", flat)
    engine.train([case("a"), case("bb")], [], flat, tmp_path / "two.safetensors", iterations=STEPS, spacing=None)
    assert sha256(tmp_path / "one.safetensors") == sha256(tmp_path / "two.safetensors")
    assert isinstance(predict.load(tmp_path / "one.safetensors", flat), predict.SSLModel)


def test_one_network_for_all_labels_on_request_and_its_old_files_still_load(tmp_path, settings):
    single = settings(nested_fraction=0)
    run(tmp_path / "ssl.safetensors", single)
    assert "stages" not in read_metadata(tmp_path / "ssl.safetensors")
    state, metadata = load_weights(tmp_path / "ssl.safetensors", "ssl")
    # as files were written before there were two stages
    save_weights(tmp_path / "old.safetensors", state, {k: v for k, v in metadata.items() if k != "options"})
    model = predict.load(tmp_path / "old.safetensors", settings())
    assert model.regions(case("a").image).shape == (2, *SHAPE)


@pytest.mark.parametrize("method", ["bcp_mt", "bcp", "cps", "dtc", "mcnet", "ua_mt"])
def test_methods_with_unlabelled_scans_train_in_both_stages(tmp_path, settings, method, monkeypatch):
    monkeypatch.setattr("aslseg.ssl.predict.largest", lambda mask: case("x").label > 0)
    monkeypatch.setattr("aslseg.ssl.nested.largest", lambda mask: case("x").label > 0)
    out = tmp_path / "ssl.safetensors"
    network = "vnet_small" if method == "mcnet" else "unet"
    result = run(out, settings(ssl_method=method, network=network), free=[case("ccc", labelled=False)])
    assert result["steps"] == STEPS
    assert np.allclose(predict.load(out, settings()).predict(case("a").image).sum(0), 1, atol=1e-5)


@pytest.mark.parametrize("network", ["vnet", "vnet_small", "segresnet", "dynunet"])
def test_every_network_learns_in_both_stages(tmp_path, settings, network):
    out = tmp_path / "ssl.safetensors"
    run(out, settings(network=network), iterations=2)
    options = {"last_relu": False}
    assert read_metadata(out)["stages"]["second"]["liver"]["model"]["options"] == options
    assert predict.load(out, settings()).predict(case("a").image).shape == (3, *SHAPE)


def test_a_file_whose_second_stage_saw_the_parent_too_is_refused_and_says_what_to_do(tmp_path, settings):
    out = tmp_path / "ssl.safetensors"
    run(out, settings(), iterations=2)
    state, metadata = load_weights(out, "ssl")
    metadata["stages"]["second"]["liver"]["model"]["options"]["channels"] = 2
    save_weights(out, state, metadata)
    with pytest.raises(BadWeightsError, match=r"saw the mask of liver as well; the next round trains"):
        predict.load(out, settings())


@pytest.mark.parametrize("killed_at", [1, 4])
def test_a_killed_training_goes_on_in_its_stage(tmp_path, settings, monkeypatch, caplog, killed_at):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(engine, "CHECKPOINT_EVERY", 1)
    run(tmp_path / "whole.safetensors", settings())
    watched = [line for line in caplog.text.splitlines() if "step 1 of" in line]
    assert "liver 0." in watched[0]
    assert "tumour 0." in watched[1]

    def kill(done: int, total: int, **_: float) -> None:
        if done == killed_at:
            raise KeyboardInterrupt

    out, done = tmp_path / "killed.safetensors", []
    with pytest.raises(KeyboardInterrupt):
        run(out, settings(), report=kill)
    assert not out.exists()
    run(out, settings(), report=lambda step, total, **_: done.append(step))
    assert done[0] == killed_at
    whole, resumed = (load_weights(p, "ssl")[0] for p in (tmp_path / "whole.safetensors", out))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_second_training_goes_on_from_both_stages(tmp_path, settings):
    first, again = tmp_path / "first.safetensors", tmp_path / "again.safetensors"
    run(first, settings())
    run(again, settings(learning_rate=1e-9), init=first)
    before, after = (load_weights(p, "ssl")[0] for p in (first, again))
    assert all(torch.allclose(before[k], after[k], atol=1e-5) for k in before if "running" not in k)
    assert read_metadata(again)["init"] == sha256(first)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["again.safetensors", "first.safetensors"]


def test_a_model_of_one_stage_cannot_start_two(tmp_path, settings):
    old = tmp_path / "old.safetensors"
    run(old, settings(nested_fraction=0))
    with pytest.raises(BadWeightsError, match="does not fit"):
        run(tmp_path / "ssl.safetensors", settings(), init=old)


def test_a_parent_that_is_not_found_is_said_and_the_whole_scan_searched(tmp_path, settings, caplog):
    out = tmp_path / "ssl.safetensors"
    run(out, settings())
    model = predict.load(out, settings())
    model.first.run = lambda image, **_: predict.Prediction(np.stack([np.ones(SHAPE), np.zeros(SHAPE)]))
    found = model.run(case("a").image)
    assert found.notes == ("liver was not found; the whole scan was searched for tumour",)
    assert found.values[2].max() > 0
    assert np.allclose(found.values.sum(0), 1, atol=1e-5)


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 2.0)])
def test_the_first_stage_may_see_a_coarser_grid_and_retraining_keeps_it(tmp_path, settings, monkeypatch, spacing):
    seen = []
    real = engine.train

    def watched(labelled, free, *rest, **more):
        seen.append([(c.image.shape, None if c.label is None else c.label.shape) for c in (*labelled, *free)])
        return real(labelled, free, *rest, **more)

    monkeypatch.setattr(engine, "train", watched)
    out, again = tmp_path / "ssl.safetensors", tmp_path / "again.safetensors"
    chosen = settings(nested_first_voxels=4000, ssl_method="mean_teacher")
    promoted = replace(case("bb"), voxel_weight=np.full(SHAPE, 0.25, np.float16))
    run(out, chosen, [case("a"), promoted], free=[case("ccc", labelled=False)], spacing=spacing)
    scale = predict.scale_of(read_metadata(out))
    shape = scale.shape(SHAPE)
    assert np.prod(shape) < 4500
    assert seen[0] == [(shape, shape), (shape, shape), (shape, None)]
    assert all(image != shape for image, _ in seen[1])
    model = predict.load(out, chosen)
    asked = []
    model.first.model.run = lambda image, **_: (
        asked.append(image.shape)
        or predict.Prediction(np.stack([np.full(shape, 0.25, np.float32), np.full(shape, 0.75, np.float32)]))
    )
    found = model.run(case("a").image)
    assert asked == [shape]
    assert found.values.shape == (3, *SHAPE)
    assert np.allclose(found.values.sum(0), 1, atol=1e-5)
    run(again, settings(nested_first_voxels=1e7), init=out, spacing=spacing)
    assert predict.scale_of(read_metadata(again)) == scale


def test_a_file_without_a_scale_has_its_first_stage_on_the_working_grid(tmp_path, settings):
    out, old = tmp_path / "ssl.safetensors", tmp_path / "old.safetensors"
    run(out, settings(), spacing=(1.0, 1.0, 2.0))
    state, metadata = load_weights(out, "ssl")
    stages = {name: value for name, value in metadata["stages"].items() if name != "scale"}
    save_weights(old, state, metadata | {"stages": stages})
    image = case("a").image
    assert np.array_equal(predict.load(old, settings()).predict(image), predict.load(out, settings()).predict(image))
    assert predict.load(old, settings()).first.scale.shape(SHAPE) == SHAPE


def test_scans_without_tumours_without_liver_or_without_any_are_no_obstacle(tmp_path, settings, caplog):
    caplog.set_level(logging.INFO)
    cases = [case("a"), case("bb", tumour=False), case("ccc", liver=False), case("dddd", tumour=False, liver=False)]
    run(tmp_path / "ssl.safetensors", settings(), cases)
    assert "tumour is labelled in 2 of 4 scans" in caplog.text
    assert "ccc is labelled with tumour but without liver around it: nothing is learned from this label" in caplog.text
    assert "dddd is labelled" not in caplog.text


def test_lesions_that_nobody_drew_a_parent_around_give_no_second_stage(tmp_path, settings, caplog):
    run(tmp_path / "ssl.safetensors", settings(), [case("a", liver=False), case("bb", liver=False)])
    assert "no labelled scan shows liver: no second stage for tumour" in caplog.text
    assert "stages" not in read_metadata(tmp_path / "ssl.safetensors")


@pytest.mark.parametrize("voxels", [1e6, 2000])
def test_lesions_of_one_voxel_and_a_liver_cut_by_the_scans_edge_are_no_obstacle(tmp_path, settings, voxels):
    small, cut = case("a", tumour=False), case("bb")
    small.label[20, 20, 10] = 2
    cut.label[8:32, 8:28, :4] = 1
    out, chosen = tmp_path / "ssl.safetensors", settings(nested_voxels=voxels)
    result = run(out, chosen, [small, cut])
    assert result["steps"] == STEPS
    model = predict.load(out, chosen)
    model.first.run = lambda image, **_: predict.Prediction(np.stack([cut.label == 0, cut.label > 0]).astype(float))
    found = model.run(cut.image)
    assert found.notes == ()
    assert np.allclose(found.values.sum(0), 1, atol=1e-5)


def test_without_a_labelled_tumour_synthetic_ones_are_learned_and_one_label_is_enough(tmp_path, settings, caplog):
    result = run(tmp_path / "ssl.safetensors", settings(nested_synthetic=1), [case("a", tumour=False)])
    assert result["classes"]["tumour"][0] is not None
    off = run(tmp_path / "off.safetensors", settings(nested_synthetic=0), [case("a", tumour=False)])
    assert off["classes"]["tumour"][0] is None
    assert "tumour" not in off["not_learned"]


def test_without_a_labelled_parent_there_is_one_network(tmp_path, settings, caplog):
    empty = case("a", tumour=False, liver=False)
    run(tmp_path / "ssl.safetensors", settings(), [empty])
    assert "no labelled scan shows liver: no second stage for tumour" in caplog.text
    assert "stages" not in read_metadata(tmp_path / "ssl.safetensors")


def test_promoted_masks_decide_nothing_of_stages_and_grids(tmp_path, settings):
    """A training that learns them goes on from a model that has not."""
    whole = np.where(case("x").label == 2, 2, 1).astype(np.uint8)
    promoted = [replace(case(name), label=whole, weight=0.5, voxel_weight=np.ones(SHAPE, np.float16)) for name in "cde"]
    alone, again = tmp_path / "alone.safetensors", tmp_path / "again.safetensors"
    chosen = settings(nested_voxels=6000)
    run(alone, chosen)
    run(again, chosen, [case("a"), case("bb"), *promoted], init=alone)
    geometries = [read_metadata(p)["stages"]["second"]["liver"]["geometry"] for p in (alone, again)]
    assert geometries[0] == geometries[1]
    # no human label shows a liver
    bare = [case("a", tumour=False, liver=False), case("bb", tumour=False, liver=False)]
    run(alone, settings(), bare)
    run(again, settings(), [*bare, *promoted], init=alone)
    assert "stages" not in read_metadata(again)


def test_a_stage_with_its_own_grid_takes_few_unlabelled_scans_and_pauses_at_each(tmp_path, settings, monkeypatch):
    monkeypatch.setattr("aslseg.ssl.nested.largest", lambda mask: case("x").label > 0)
    monkeypatch.setattr(training, "MOST_UNLABELLED", 2)
    seen, shown, real = [], [], engine.train
    monkeypatch.setattr(
        engine, "train", lambda a, free, *r, **k: seen.append([c.id for c in free]) or real(a, free, *r, **k)
    )
    free = [case(f"free{n}", labelled=False) for n in range(4)]
    chosen = settings(ssl_method="mean_teacher")
    run(tmp_path / "ssl.safetensors", chosen, free=free, report=lambda done, *_, **__: shown.append(done))
    names = [c.id for c in free]
    assert seen[0] == names
    assert len(seen[1]) == 2
    assert seen[1] == [name for name in names if name in seen[1]]
    assert shown == [1, 2, 2, 2, 3, 4, 5]
    run(tmp_path / "again.safetensors", chosen, free=free)
    assert seen[3] == seen[1]
    # so does a first stage that sees a grid of its own
    shown.clear()
    coarse = settings(ssl_method="mean_teacher", nested_first_voxels=4000)
    run(tmp_path / "coarse.safetensors", coarse, free=free, report=lambda done, *_, **__: shown.append(done))
    assert seen[4] == seen[1]
    assert shown == [0, 0, 0, 0, 1, 2, 2, 2, 3, 4, 5]


def test_promoted_cases_keep_their_weights_in_the_second_stage(tmp_path, settings, monkeypatch):
    seen = []
    real = engine.train
    monkeypatch.setattr(
        engine, "train", lambda labelled, *a, **k: seen.append(list(labelled)) or real(labelled, *a, **k)
    )
    measured = []
    monkeypatch.setattr(
        nested_batches, "Lesions", lambda cases, *rest: measured.append([c.id for c in cases]) or Lesions(cases, *rest)
    )
    promoted = replace(case("bb"), weight=0.5, voxel_weight=np.full(SHAPE, 0.25, np.float16))
    run(tmp_path / "ssl.safetensors", settings(), [case("a"), promoted])
    # synthetic lesions are like those that people drew, not like those that an earlier model took for lesions
    assert measured == [["a"]]
    human, machine = seen[1]
    assert human.voxel_weight is None
    assert machine.weight == 0.5
    assert (np.asarray(machine.voxel_weight) == 0.25).all()


def test_a_model_of_other_nesting_is_refused(tmp_path, settings):
    out = tmp_path / "ssl.safetensors"
    run(out, settings())
    with pytest.raises(BadWeightsError, match="liver as the parents of nested labels"):
        predict.load(out, settings(nested=""))


@pytest.mark.parametrize("other", ["tumour:liver,cyst:liver", "cyst:liver,tumour:kidney"])
def test_a_model_is_refused_whose_second_stage_is_for_other_labels(tmp_path, settings, other):
    """The file loads and has the same parents: what it takes for a tumour would be called a cyst, or nothing fits."""
    known = "tumour:liver,cyst:kidney" if "kidney" in other else "tumour:liver"
    names = "liver,kidney,tumour,cyst" if "kidney" in other else "liver,tumour,cyst"
    kidney = [replace(case(n), label=np.array([0, 2, 4], np.uint8)[case(n).label]) for n in ("cc", "ddd")]
    out = tmp_path / "ssl.safetensors"
    liver = [
        replace(case(n), label=np.array([0, 1, names.split(",").index("tumour") + 1])[case(n).label]) for n in "ab"
    ]
    run(out, settings(labels=names, nested=known), [*liver, *(kidney if "kidney" in other else [])])
    assert predict.load(out, settings(labels=names, nested=known))
    with pytest.raises(BadWeightsError, match="set nested to what the model knows or retrain it"):
        predict.load(out, settings(labels=names, nested=other))


def test_each_batch_of_the_second_stage_holds_the_nested_label(settings):
    """A few voxels of one case: by chance alone most batches would hold none of it."""
    rare = case("a")
    rare.label[rare.label == 2] = 1
    rare.label[16:19, 14:17, 9:11] = 2
    inner = nested.settings_of(settings(patch="16,16,16"), Labels(("liver", "tumour"), (None, 0)))
    batches = nested_batches.NestedBatches(
        [case("bb", tumour=False), rare], [], inner, (16, 16, 16), torch.device("cpu")
    )
    assert all((batches(step).target == 2).any() for step in range(10))


def test_poisoned_labels_of_unlabelled_scans_change_nothing(tmp_path, settings, monkeypatch):
    monkeypatch.setattr("aslseg.ssl.nested.largest", lambda mask: case("x").label > 0)
    clean = case("ccc")
    poisoned = replace(clean, label=np.full(SHAPE, np.nan, np.float32))
    hashes = []
    for n, free in enumerate((clean, poisoned)):
        out = tmp_path / f"{n}.safetensors"
        run(out, settings(ssl_method="mean_teacher"), free=[free])
        hashes.append(sha256(out))
    assert hashes[0] == hashes[1]


def test_a_case_that_leaves_the_nested_label_open_teaches_the_first_stage_only(tmp_path, settings, monkeypatch):
    labels, seen = settings().label_set, []
    train = engine.train

    def watched(labelled, *rest, **more):
        seen.append({c.id: set(np.unique(c.label)) for c in labelled})
        return train(labelled, *rest, **more)

    monkeypatch.setattr(engine, "train", watched)
    whole = case("open")
    left_open = replace(
        whole, label=labels.mark_unknown(whole.label, ("tumour",)), voxel_weight=np.ones(SHAPE, np.float16)
    )
    assert left_open.label.max() == 3
    run(tmp_path / "ssl.safetensors", settings(), cases=[case("a"), case("bb"), left_open])
    first, second = seen
    assert first["open"] == {0, 1}
    assert "open" not in second
    assert all(values <= {0, 1, 2} for values in second.values())


def test_components_below_the_limits_of_the_model_are_taken_away_in_prediction(tmp_path, settings, monkeypatch):
    """One lesion of 4 x 4 x 4 voxels and one voxel beside it: only the limits in the file tell them apart."""
    out, limited = tmp_path / "ssl.safetensors", tmp_path / "limited.safetensors"
    run(out, settings())
    specks.write_limited(out, limited, {"tumour": {"probability": 0.0, "mm3": 2.0}})
    truth = case("a", tumour=False).label
    truth[14:18, 12:16, 8:12] = 2
    truth[24, 20, 8] = 2

    def inside(model, view, blend):
        part = truth[view.where]
        return np.stack([part == n for n in range(3)]).astype(np.float32) * 0.9 + 0.1 / 3, ()

    monkeypatch.setattr("aslseg.ssl.predict.inner_probabilities", inside)
    for path, kept in ((out, True), (limited, False)):
        model = predict.load(path, settings())
        model.first.run = lambda image, **_: predict.Prediction(np.stack([truth == 0, truth > 0]).astype(np.float32))
        found = settings().label_set.decode(model.regions(case("a").image))
        assert (found[24, 20, 8] == 2) is np.bool_(kept)
        assert found[24, 20, 8] > 0
        assert (found[14:18, 12:16, 8:12] == 2).all()
    assert read_metadata(limited)["stages"] == read_metadata(out)["stages"]


def of_truth(labels: Labels, truth: np.ndarray, specks_limits: dict[str, dict[str, float]]) -> predict.NestedModel:
    """A model whose stages say what is true with a probability of 0.9."""
    top, second = nested.top_level(labels), []

    def sure(masks: list[np.ndarray]) -> np.ndarray:
        return np.stack(masks).astype(np.float32) * 0.9 + 0.1 / len(masks)

    for branch in nested.branches(labels):
        geometry = nested.Geometry((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), 6.0, 0.25, 0.5)
        part = branch.inner(truth)[nested.box(np.isin(truth, branch.values), geometry)]
        said = sure([part == n for n in range(len(branch.values) + 1)])
        second.append((branch, geometry, SimpleNamespace(run=lambda _, said=said, **__: predict.Prediction(said))))
    whole = sure([truth == 0, *(np.isin(truth, labels.members(n)) for n in top)])
    first = SimpleNamespace(run=lambda _, **__: predict.Prediction(whole))
    return predict.NestedModel(first, second, {"specks": specks_limits}, SimpleNamespace(label_set=labels))


def test_a_component_that_the_box_of_another_parent_cuts_is_measured_whole():
    labels = Labels.parse("liver,kidney,tumour,cyst", "tumour:liver,cyst:kidney")
    truth = np.zeros((40, 20, 16), np.uint8)
    truth[2:20, 2:18, 2:14], truth[20:36, 2:18, 2:14] = 1, 2
    # the kidney's box begins within it
    truth[10:18, 8:12, 6:10] = 3
    truth[26:32, 8:12, 6:10] = 4
    limits = {name: {"probability": 0.0, "mm3": 90.0} for name in ("tumour", "cyst")}
    found = of_truth(labels, truth, limits).run(np.zeros(truth.shape, np.float32))
    assert np.allclose(found.values.sum(0), 1, atol=1e-5)
    assert (labels.decode(labels.region_probabilities(found.values)) == truth).all()


def test_labels_in_labels_in_labels_are_put_together():
    labels = Labels.parse("liver,spleen,tumour,necrosis", "tumour:liver,necrosis:tumour")
    truth = np.zeros((30, 20, 16), np.uint8)
    truth[2:20, 2:18, 2:14], truth[22:28, 2:18, 2:14] = 1, 2
    truth[6:14, 6:14, 4:12], truth[8:12, 8:12, 6:10] = 3, 4
    for mm3, left in ((0.0, truth), (65.0, np.where(truth == 4, 3, truth))):
        model = of_truth(labels, truth, {"necrosis": {"probability": 0.0, "mm3": mm3}})
        found = model.run(np.zeros(truth.shape, np.float32))
        assert np.allclose(found.values.sum(0), 1, atol=1e-5)
        assert (labels.decode(labels.region_probabilities(found.values)) == left).all()
