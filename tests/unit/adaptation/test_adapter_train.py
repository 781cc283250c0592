"""Training the adaptation network: the data it sees, its loss, that it learns, what it stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aslseg.adaptation import train as module
from aslseg.adaptation.faults import Faults
from aslseg.adaptation.predict import load
from aslseg.adaptation.synthetic import corrupt, soften
from aslseg.adaptation.train import Redraw, Samples, adaptation_loss, adapter_patch, crop, redraw_bank, train
from aslseg.cases.prepared_case import Prepared
from aslseg.compute.overlap import dice
from aslseg.compute.weights import load_weights, read_metadata
from aslseg.errors import NotEnoughCasesError, TrainingDivergedError
from aslseg.sam.modeling.architecture import Architecture, build
from aslseg.sam.modeling.build import SAMModel
from aslseg.settings import Settings

Maker = Callable[[int], Prepared]


def test_crop_pads_with_zeros_outside() -> None:
    array = np.arange(24).reshape(2, 3, 4)
    out = crop(array, np.array([-1, 1, 2]), (3, 3, 4))
    assert out.shape == (3, 3, 4)
    assert not out[0].any()
    assert np.array_equal(out[1:, :2, :2], array[:, 1:, 2:])
    assert not out[:, 2].any()
    regions = crop(np.stack([array, array]), np.array([0, 0, 0]), (2, 2, 2))
    assert regions.shape == (2, 2, 2, 2)
    assert not np.shares_memory(regions, array)
    assert not crop(array, np.array([9, 0, 0]), (2, 2, 2)).any()


def test_samples_are_reproducible_and_nested(scan: Maker, settings: Settings) -> None:
    samples = Samples([scan(0), scan(1)], settings, (24, 24, 16), None)
    for seed in range(8):
        one, two = (samples.draw(np.random.default_rng(seed)) for _ in range(2))
        assert one.images.shape == (2, 24, 24, 16)
        assert one.truth.shape == one.sam.shape == one.ssl.shape == (2, 24, 24, 16)
        assert np.array_equal(one.ssl, two.ssl)
        assert (one.truth[0] >= one.truth[1]).all()
        assert np.isfinite(one.sam).all()


def test_a_scan_smaller_than_the_patch_is_padded(scan: Maker, settings: Settings) -> None:
    sample = Samples([scan(0)], settings, (48, 48, 32), None).draw(np.random.default_rng(0))
    assert sample.images.shape == (2, 48, 48, 32)
    assert sample.truth[0].sum() == (scan(0).label > 0).sum()


def test_half_of_the_samples_come_from_the_bank(scan: Maker, settings: Settings) -> None:
    case = scan(0)
    marked = Redraw(np.full((2, *case.image.shape), 51, np.uint8), np.full((2, *case.image.shape), 102, np.uint8))
    samples = Samples([case], settings, (24, 24, 16), [[marked]])
    real = 0
    for seed in range(30):
        sample = samples.draw(np.random.default_rng(seed))
        if np.allclose(sample.ssl, 0.2):
            assert np.allclose(sample.sam, 0.4)
            real += 1
    assert 8 <= real <= 22


def test_loss_is_small_for_the_truth_and_counts_the_border_twice() -> None:
    truth = torch.zeros(1, 1, 16, 16, 16)
    truth[..., 4:12, 4:12, 4:12] = 1
    assert adaptation_loss(20 * (2 * truth - 1), truth) < 0.01
    wrong = [truth.clone(), truth.clone()]
    wrong[0][..., 3, 6:10, 6:10] = 1  # at the border
    wrong[1][..., 0, 6:10, 6:10] = 1  # as many voxels, far from it
    near, far = (adaptation_loss(4 * (2 * w - 1), truth) for w in wrong)
    assert near > far


def test_loss_of_an_absent_region_is_finite_and_pushes_it_down() -> None:
    truth = torch.zeros(2, 1, 16, 16, 16)
    logits = torch.zeros_like(truth, requires_grad=True)
    loss = adaptation_loss(logits, truth)
    loss.backward()
    assert torch.isfinite(loss)
    assert (logits.grad > 0).all()


@pytest.fixture
def tiny_sam(settings: Settings) -> SAMModel:
    """The real model with random weights, 64 pixels wide: it draws badly, but it draws."""
    torch.manual_seed(0)
    architecture = Architecture(
        image_size=64,
        embed_dim=32,
        depth=1,
        heads=2,
        global_blocks=(0,),
        out_chans=32,
        mlp_dim=32,
        decoder_heads=2,
    )
    return SAMModel(build(architecture), architecture)


@pytest.fixture(scope="module")
def _once() -> dict[str, object]:
    return {}


@pytest.fixture
def trained(_once: dict[str, object], scan: Maker, settings: Settings, tmp_path_factory: pytest.TempPathFactory):
    """A network trained for 50 steps on four scans, once for this file."""
    if not _once:
        out = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
        chosen = settings.model_copy(update={"adapter_iterations": 50, "adapter_learning_rate": 1e-2})
        losses: list[float] = []
        result = train(
            [scan(n) for n in range(4)],
            None,
            chosen,
            out,
            report=lambda done, total, **shown: losses.append(shown["loss"]),
        )
        _once.update(out=out, result=result, losses=losses)
    return _once


def test_training_reduces_the_loss_and_improves_its_patches(trained: dict[str, object]) -> None:
    losses, result = trained["losses"], trained["result"]
    assert len(losses) == 50
    assert losses[-1] < losses[4]
    assert result["dice_after"] > result["dice_before"]
    assert np.shape(result["kappa"]) == (2, 2)
    assert result["steps"] == 50
    assert result["redraws"] == 0


def test_faulty_masks_of_other_scans_become_better(trained: dict[str, object], scan: Maker, settings: Settings) -> None:
    model = load(trained["out"], settings)
    before, after = [], []
    for seed in range(10, 16):
        case, rng = scan(seed), np.random.default_rng(seed)
        truth = settings.label_set.regions(case.label)
        faulty = corrupt(truth, case.image, settings.label_set, case.grid.spacing, rng, 0.9)
        given = np.stack([soften(m, case.grid.spacing, rng) for m in faulty])
        out = model.predict(case.image, given, given)
        before.append(dice(given[0] > 0.5, truth[0]))
        after.append(dice(out[0] >= 0.5, truth[0]))
    assert np.mean(after) > np.mean(before) + 0.02


def test_the_file_says_what_is_in_it(trained: dict[str, object], settings: Settings) -> None:
    metadata = read_metadata(trained["out"])
    assert metadata["kind"] == "adapter"
    assert metadata["labels"] == ["liver", "tumour"]
    assert metadata["channels"] == [
        "image",
        "image relative to liver",
        "sam liver",
        "sam tumour",
        "ssl liver",
        "ssl tumour",
    ]
    assert metadata["patch"] == [32, 32, 16]
    assert metadata["strides"] == [[2, 2, 1], [2, 2, 2], [2, 2, 2]]
    assert metadata["iterations"] == 50


def test_the_bank_holds_what_sam_makes_of_faulty_masks(
    tiny_sam: SAMModel, scan: Maker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_REDRAWS", 4)
    cases = [scan(0), scan(1)]
    reports: list[int] = []
    bank = redraw_bank(
        cases,
        tiny_sam,
        settings,
        np.random.default_rng(0),
        lambda done, total, **shown: reports.append(shown["redraws"]),
        Faults(settings.label_set),
    )
    assert [len(b) for b in bank] == [2, 2]
    assert reports == [1, 2, 3, 4]
    for case, redraws in zip(cases, bank, strict=True):
        for one in redraws:
            assert one.sam.shape == one.ssl.shape == (2, *case.image.shape)
            assert one.sam.dtype == np.uint8
            # without a prompt SAM draws nothing
            unprompted = ~(one.ssl >= 128).any((0, 1, 2))
            assert not one.sam[..., unprompted].any()
            faulty, truth = one.ssl[0] >= 128, case.label > 0
            assert not faulty.any() or dice(faulty, truth) > 0
    assert any(not np.array_equal(one.sam, one.ssl) for redraws in bank for one in redraws)


def test_training_with_a_real_sam(tiny_sam: SAMModel, scan: Maker, settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    result = train([scan(0)], tiny_sam, settings, out)
    assert result["redraws"] == module.REDRAWS_PER_CASE
    assert np.isfinite(result["loss"])
    assert read_metadata(out)["sam"] is True


def test_the_same_seed_gives_the_same_weights(scan: Maker, settings: Settings, tmp_path: Path) -> None:
    states = []
    for n, seed in enumerate((1, 1, 2)):
        out = tmp_path / f"{n}.safetensors"
        train([scan(0)], None, settings.model_copy(update={"seed": seed}), out)
        states.append(load_weights(out, "adapter")[0])
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_training_leaves_the_global_generator_alone(scan: Maker, settings: Settings, tmp_path: Path) -> None:
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    train([scan(0)], None, settings, tmp_path / "a.safetensors")
    assert torch.equal(torch.rand(3), wanted)


def test_zero_iterations_give_the_untrained_network(scan: Maker, settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    result = train([scan(0)], None, settings.model_copy(update={"adapter_iterations": 0}), out)
    assert result["loss"] is None
    case = scan(1)
    given = settings.label_set.regions(case.label).astype(np.float32)
    refined = load(out, settings).predict(case.image, given, given)
    assert np.array_equal(refined >= 0.5, given >= 0.5)


def test_a_class_that_is_nowhere_is_trained_to_background(scan: Maker, settings: Settings, tmp_path: Path) -> None:
    case = scan(0)
    without = replace(case, label=np.minimum(case.label, 1))
    result = train([without], None, settings, tmp_path / "a.safetensors")
    assert np.isfinite(result["loss"])


def test_errors_that_a_user_can_meet(
    scan: Maker, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.safetensors"
    with pytest.raises(NotEnoughCasesError, match="labelled"):
        train([replace(scan(0), label=None)], None, settings, out)
    hot = settings.model_copy(update={"adapter_learning_rate": float("inf"), "adapter_iterations": 5})
    with pytest.raises(TrainingDivergedError, match="adapter_learning_rate"):
        train([scan(0)], None, hot, out)
    assert not out.exists()

    class StopError(Exception):
        pass

    def stop(done: int, total: int, **shown: float) -> None:
        raise StopError

    with pytest.raises(StopError):
        train([scan(0)], None, settings, out, report=stop)
    assert not out.exists()


def test_patch_is_limited_and_fits_the_network(scan: Maker, settings: Settings) -> None:
    assert adapter_patch([scan(0)], settings) == (32, 32, 16)
    automatic = settings.model_copy(update={"patch": "auto"})
    assert np.prod(adapter_patch([scan(0)], automatic)) <= module.PATCH_VOXELS
    assert all(n % 8 == 0 for n in adapter_patch([scan(0)], automatic))


def test_nested_labels_are_shown_relative_to_the_parent_as_well(
    scan: Maker, settings: Settings, tmp_path: Path
) -> None:
    """Scans of other brightness have the same second image, in training and in prediction."""
    case = scan(0)
    dark = replace(case, image=0.5 * np.asarray(case.image))
    bright = replace(dark, image=np.asarray(dark.image) + np.float32(0.2))
    for seed in range(4):
        one, two = (
            Samples([c], settings, (24, 24, 16), None).draw(np.random.default_rng(seed)) for c in (dark, bright)
        )
        assert np.allclose(two.images[0] - one.images[0], 0.2, atol=1e-5)
        assert np.allclose(one.images[1], two.images[1], atol=1e-4)
        assert one.images[1].std() > one.images[0].std()
    out = tmp_path / "adapter.safetensors"
    train([dark], None, settings, out)
    model = load(out, settings)
    seen = []
    model.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))  # type: ignore[attr-defined]
    regions = settings.label_set.regions(np.asarray(case.label)).astype(np.float32)
    for shown in (dark, bright):
        model.predict(np.asarray(shown.image), regions, regions)
    half = len(seen) // 2
    for a, b in zip(seen[:half], seen[half:], strict=True):
        assert a.shape[1] == 2 + 4
        assert torch.allclose(a[:, 1:], b[:, 1:], atol=1e-3)
        assert not torch.allclose(a[:, 0], b[:, 0], atol=1e-3)


@pytest.mark.parametrize("changed", [{"nested": ()}, {"nested_fraction": 0.0}])
def test_labels_without_a_parent_and_one_network_for_all_see_the_scan_alone(
    scan: Maker, settings: Settings, tmp_path: Path, changed: dict[str, object]
) -> None:
    settings = settings.model_copy(update=changed)
    assert Samples([scan(0)], settings, (24, 24, 16), None).draw(np.random.default_rng(0)).images.shape[0] == 1
    out = tmp_path / "adapter.safetensors"
    train([scan(0)], None, settings, out)
    metadata = read_metadata(out)
    assert metadata["channels"] == ["image", "sam liver", "sam tumour", "ssl liver", "ssl tumour"]
    assert "relative" not in metadata
    assert load(out, settings).network.images == 1


def test_without_a_parent_the_scan_itself_is_shown(scan: Maker, settings: Settings, tmp_path: Path) -> None:
    case = scan(0)
    alone = replace(case, label=np.where(np.asarray(case.label) == 2, 2, 0).astype(np.uint8))
    empty = replace(case, label=np.zeros_like(case.label))
    out = tmp_path / "adapter.safetensors"
    train([alone, empty], None, settings, out)
    drawn = Samples([empty], settings, (24, 24, 16), None).draw(np.random.default_rng(0))
    assert np.array_equal(drawn.images[0], drawn.images[1])
    regions = np.zeros((2, *case.image.shape), np.float32)
    regions[1] = np.asarray(case.label) == 2
    refined = load(out, settings).predict(np.asarray(case.image), regions, regions)
    assert np.isfinite(refined).all()
