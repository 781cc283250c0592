from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aslseg.cases.prepared_case import Prepared
from aslseg.compute.weights import load_weights, read_metadata
from aslseg.errors import BadSettingsError, NotEnoughCasesError, TrainingDivergedError
from aslseg.files import sha256
from aslseg.sam.modeling.architecture import Architecture, build
from aslseg.sam.modeling.build import SAMModel, load
from aslseg.sam.training import finetune
from aslseg.sam.training.finetune import OBJECTS_PER_SLICE, FaultyMasks, LabelledSlices, SampledObjects, train
from aslseg.settings import Settings

TINY = Architecture(64, 8, 32, 2, 2, 4, (1,), 32, 64)
GAUSSIAN = ".positional_encoding_gaussian_matrix"


@pytest.mark.parametrize("part", ["full", "decoder", "med2d_adapter", "lora"])
def test_loss_falls_and_the_file_says_what_it_is(
    part: str, ball_case: Callable[..., Prepared], tiny_file: Path, tmp_path: Path, settings: Settings
) -> None:
    settings = settings.model_copy(update={"sam_iterations": 30, "sam_train": part})
    reports: list[tuple[int, int, dict[str, Any]]] = []
    out = tmp_path / "sam.safetensors"
    result = train(
        [ball_case("a"), ball_case("b")],
        settings,
        out,
        init=tiny_file,
        report=lambda done, total, **shown: reports.append((done, total, shown)),
    )
    assert result["loss"] < 0.9 * result["first_loss"]
    assert result["steps"] == 30
    assert [r[0] for r in reports] == list(range(1, 31))
    assert {"loss", "dice"} <= reports[-1][2].keys()
    metadata = read_metadata(out)
    assert metadata["kind"] == "sam"
    assert metadata["labels"] == ["liver", "tumour"]
    assert metadata["base_sha256"] == sha256(tiny_file)
    assert result["sha256"] == sha256(out)
    assert metadata["trained"] == part
    assert metadata["architecture"]["box_mask"]  # mask prompts were learned, whatever it started from
    before, after = load_weights(tiny_file, "sam")[0], load(out, settings).sam.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    decoder = {k for k in before if not k.startswith("image_encoder.")} - {"prompt_encoder.pe_layer" + GAUSSIAN}
    assert moved - decoder == {
        "full": {k for k in before if k.startswith("image_encoder.")},
        "lora": {f"image_encoder.blocks.{n}.attn.qkv.weight" for n in (0, 1)},
    }.get(part, set())
    assert decoder - moved <= {k for k in decoder if "not_a_point" in k}
    assert {k.split("blocks.")[1][2:9] for k in after if k not in before} == (
        {"Adapter"} if part == "med2d_adapter" else set()
    )


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        ("decoder", ()),
        ("med2d_adapter", (".Adapter.",)),
        ("lora", (".a_q", ".b_q", ".a_v", ".b_v")),
        ("full", ("image_encoder",)),
    ],
)
def test_exactly_the_right_parameters_train(
    part: str, wanted: tuple[str, ...], tiny: SAMModel, settings: Settings
) -> None:
    trained = finetune.trainable(tiny, settings.model_copy(update={"sam_train": part, "sam_lora_rank": 2}))
    named = dict(tiny.sam.named_parameters())
    expected = {k for k in named if k.startswith(("prompt_encoder", "mask_decoder")) or any(w in k for w in wanted)}
    assert {k for k, p in named.items() if p.requires_grad} == expected
    assert {id(p) for p in trained} == {id(named[k]) for k in expected}
    inside = sum(p.numel() for k, p in named.items() if k in expected and k.startswith("image_encoder"))
    if part == "lora":
        assert inside == 2 * 4 * 2 * 32
    if part == "med2d_adapter":
        assert inside == 2 * (2 * 32 + 2 * 32 * 8 + 32 * 32 * 9 + 32 * 32 * 16)


def test_adapters_of_the_file_are_trained_on(
    ball_case: Callable[..., Prepared], tiny_file: Path, tmp_path: Path, settings: Settings
) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    settings = settings.model_copy(update={"sam_train": "med2d_adapter", "sam_iterations": 2})
    train([ball_case()], settings, first, init=tiny_file)
    train([ball_case()], settings, second, init=first)
    before, after = (load_weights(p, "sam")[0] for p in (first, second))
    assert before.keys() == after.keys()
    key = "image_encoder.blocks.1.Adapter.spatial.0.weight"
    assert not torch.equal(before[key], after[key])
    assert torch.equal(before["image_encoder.pos_embed"], after["image_encoder.pos_embed"])


def test_adapters_need_an_even_grid(tiny: SAMModel, settings: Settings) -> None:
    odd = replace(TINY, image_size=72)
    model = SAMModel(build(odd), odd)
    with pytest.raises(BadSettingsError, match=r"72 px make a grid of 9.*multiple of 16"):
        finetune.trainable(model, settings.model_copy(update={"sam_train": "med2d_adapter"}))


def test_with_the_encoder_frozen_each_slice_is_encoded_once(
    ball_case: Callable[..., Prepared], tiny: SAMModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encoder = type(tiny.sam.image_encoder).forward

    def count(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return encoder(self, x)

    monkeypatch.setattr(type(tiny.sam.image_encoder), "forward", count)
    settings = settings.model_copy(update={"sam_train": "decoder", "nested_fraction": 0})
    data = LabelledSlices([ball_case()], settings)
    tuner = finetune._Tuner(tiny, data, None, settings)
    for number in range(8):
        tuner.step(number)
    assert sum(seen) <= len({place for paths in data.paths for place in paths})


def test_faults_are_what_a_network_found_of_each_object(ball_case: Callable[..., Prepared], settings: Settings) -> None:
    case = ball_case()
    drawn = SampledObjects(0, 2, 0, np.zeros((2, 40, 32), bool))
    drawn.objects[0, 10:14, 10:14] = True
    drawn.objects[1, 30:34, 4:8] = True

    def errors(asked: Prepared, rng: np.random.Generator) -> np.ndarray:
        assert asked is case
        found = np.zeros((2, *case.image.shape), np.float32)
        found[0, 12:18, 12:18] = 0.8  # touches the first object
        found[0, 20:24, 20:24] = 0.9  # touches neither
        return found

    faults = FaultyMasks([case], errors, np.random.default_rng(0))
    assert len(faults.made[0]) == 3
    rng = np.random.default_rng(0)
    found = [faults.of(drawn, 2.0, rng) for _ in range(20)]
    used = [f for f in found if f.any()]
    assert 4 < len(used) < 16
    expected = np.zeros((2, 40, 32), np.float32)
    expected[0, 12:18, 12:18] = 0.8
    for one in used:
        np.testing.assert_allclose(one, expected, atol=0.003)


def test_errors_passed_in_become_prompts(
    ball_case: Callable[..., Prepared], tiny_file: Path, tmp_path: Path, settings: Settings
) -> None:
    def errors(case: Prepared, rng: np.random.Generator) -> np.ndarray:
        return np.roll(settings.label_set.regions(np.asarray(case.label)), 2, 1) * rng.uniform(0.6, 1)

    settings = settings.model_copy(update={"sam_iterations": 4})
    results = [
        train([ball_case()], settings, tmp_path / "s.safetensors", init=tiny_file, errors=made)["loss"]
        for made in (None, errors, errors)
    ]
    assert results[1] == results[2] != results[0]


def test_the_same_seed_gives_the_same_weights(
    ball_case: Callable[..., Prepared], tiny_file: Path, tmp_path: Path, settings: Settings
) -> None:
    settings = settings.model_copy(update={"sam_iterations": 3})
    hashes = [
        train(
            [ball_case()],
            settings.model_copy(update={"seed": seed}),
            tmp_path / f"{n}.safetensors",
            init=tiny_file,
        )
        for n, seed in enumerate((1, 1, 2))
    ]
    states = [load_weights(tmp_path / f"{n}.safetensors", "sam")[0] for n in range(3)]
    key = "mask_decoder.iou_token.weight"
    assert torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[0][key], states[2][key])
    assert hashes[0]["loss"] == hashes[1]["loss"]


def test_a_label_that_no_case_holds_is_named(
    ball_case: Callable[..., Prepared], tiny_file: Path, tmp_path: Path, settings: Settings
) -> None:
    settings = settings.model_copy(update={"sam_iterations": 1})
    result = train([ball_case(tumour=False)], settings, tmp_path / "s.safetensors", init=tiny_file)
    assert result["absent"] == ["tumour"]


def test_without_foreground_there_is_nothing_to_learn(
    ball_case: Callable[..., Prepared], tiny_file: Path, tmp_path: Path, settings: Settings
) -> None:
    case = ball_case()
    empty = replace(case, label=np.zeros_like(case.label))
    for cases in ([], [empty], [replace(case, label=None)]):
        with pytest.raises(NotEnoughCasesError, match=r"liver or tumour.*Draw a label"):
            train(cases, settings, tmp_path / "s.safetensors", init=tiny_file)
    assert not (tmp_path / "s.safetensors").exists()


def test_no_steps_keep_the_weights(
    ball_case: Callable[..., Prepared], tiny_file: Path, tmp_path: Path, settings: Settings
) -> None:
    out = tmp_path / "s.safetensors"
    result = train([ball_case()], settings.model_copy(update={"sam_iterations": 0}), out, init=tiny_file)
    assert result["loss"] is None
    before, after = load_weights(tiny_file, "sam")[0], load_weights(out, "sam")[0]
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_divergence_is_noticed_and_nothing_is_written(
    ball_case: Callable[..., Prepared],
    tiny_file: Path,
    tmp_path: Path,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(finetune, "interaction_loss", lambda *_, **__: (torch.tensor(float("nan")), 0.0))
    with pytest.raises(TrainingDivergedError, match=r"nan at step 0; lower sam_learning_rate"):
        train([ball_case()], settings, tmp_path / "s.safetensors", init=tiny_file)
    assert not (tmp_path / "s.safetensors").exists()


def test_regions_come_up_equally_and_components_one_by_one(
    ball_case: Callable[..., Prepared], settings: Settings
) -> None:
    case = ball_case()
    label = np.array(case.label)
    label[30:34, 2:6, 2] = 1  # a second piece of liver
    data = LabelledSlices([replace(case, label=label)], settings)
    rng = np.random.default_rng(0)
    tumours = 0
    for _ in range(60):
        drawn = data.draw(rng)
        k, objects = drawn.k, drawn.objects
        assert drawn.case == 0
        assert objects.shape == (OBJECTS_PER_SLICE, 40, 32)
        assert objects.any((1, 2)).all()
        for one in objects:
            assert not one[30:34, 2:6].any() or one.sum() == 16
            tumours += bool((label[..., k][one] == 2).all())
    assert 50 < tumours < 130


def test_specks_are_asked_for_only_where_there_is_nothing_else(
    ball_case: Callable[..., Prepared], settings: Settings
) -> None:
    case, label = ball_case(), np.zeros((40, 32, 5), np.uint8)
    label[5:15, 5:15, 0] = label[20, 20, 0] = label[30, 5, 1] = 1
    data = LabelledSlices([replace(case, label=label)], settings.model_copy(update={"min_component": 9}))
    drawn = [data.draw(np.random.default_rng(seed)) for seed in range(30)]
    assert {(d.k, int(o.sum())) for d in drawn for o in d.objects} == {(0, 100), (1, 1)}


def test_an_object_that_low_resolution_blurs_away_is_still_asked_for_where_it_is(
    ball_case: Callable[..., Prepared], tiny: SAMModel, settings: Settings
) -> None:
    label = np.zeros((128, 128, 1), np.uint8)
    label[81:84, 21:24] = 1
    case = ball_case(shape=(128, 128, 1))
    case = replace(case, label=label)
    frozen = settings.model_copy(update={"sam_train": "decoder"})
    _, targets, _ = finetune._Tuner(tiny, LabelledSlices([case], frozen), None, frozen)._batch(np.random.default_rng(0))
    assert not (tiny.to_low_res(torch.from_numpy(label[None, ..., 0])) > 0.5).any()
    for target in targets:
        rows, columns = torch.where(target > 0.5)
        assert len(rows)
        assert (rows.min() >= 19, rows.max() <= 21, columns.min() >= 4, columns.max() <= 6) == (True,) * 4


def test_half_of_the_slices_of_nested_labels_are_relative_to_the_parent(
    ball_case: Callable[..., Prepared], tiny_file: Path, tmp_path: Path, settings: Settings
) -> None:
    """Two scans of other brightness look the same then; slices of the parent itself stay as they are."""
    dark = ball_case()
    dark = replace(dark, image=0.5 * np.asarray(dark.image))
    bright = replace(dark, image=np.asarray(dark.image) + np.float32(0.3))
    ours, theirs = (LabelledSlices([case], settings) for case in (dark, bright))
    rng, plain, shifted = np.random.default_rng(0), 0, 0
    for _ in range(200):
        seed = int(rng.integers(1 << 30))
        one, two = (data.draw(np.random.default_rng(seed)) for data in (ours, theirs))
        assert (one.k, one.region) == (two.k, two.region)
        a, b = ours.slice(one), theirs.slice(two)
        if one.centre is None:
            np.testing.assert_allclose(b - a, 0.3, atol=1e-5)
            plain += one.region == 1
        else:
            assert one.region == 1
            np.testing.assert_allclose(a, b, atol=1e-4)
            shifted += 1
    assert shifted / (plain + shifted) == pytest.approx(finetune.RELATIVE_FRACTION, abs=0.15)
    out, brief = tmp_path / "sam.safetensors", settings.model_copy(update={"sam_iterations": 1})
    train([dark], brief, out, init=tiny_file)
    assert read_metadata(out)["relative"] == settings.nested_range
    again = tmp_path / "again.safetensors"
    train([dark], brief.model_copy(update={"nested": ()}), again, init=out)
    assert "relative" not in read_metadata(again)


def test_labels_without_a_parent_are_drawn_as_before(ball_case: Callable[..., Prepared], settings: Settings) -> None:
    flat = settings.model_copy(update={"nested": ()})
    for changed in ({}, {"nested_fraction": 0.0}):
        data = LabelledSlices([ball_case("a"), ball_case("b")], flat.model_copy(update=changed))
        rng = np.random.default_rng(5)
        drawn = [data.draw(rng) for _ in range(30)]
        assert all(one.centre is None for one in drawn)
        assert all(np.array_equal(data.slice(one), data.cases[one.case].image[..., one.k]) for one in drawn)
        # nothing more is taken from the generator than the region, the slice and the objects
        state = rng.bit_generator.state
        rng = np.random.default_rng(5)
        for _ in range(30):
            region = int(rng.choice(data.present))
            rng.integers(len(data.paths[region]))
            one = drawn.pop(0)
            label = np.asarray(data.cases[one.case].label[..., one.k])  # type: ignore[index]
            count = finetune.ndimage.label(np.isin(label, data.labels.members(region)), finetune.EIGHT_NEIGHBOURS)[1]
            rng.choice(count, OBJECTS_PER_SLICE, replace=count < OBJECTS_PER_SLICE)
        assert rng.bit_generator.state == state


def test_a_lesion_without_its_parent_is_shown_as_it_is(ball_case: Callable[..., Prepared], settings: Settings) -> None:
    case = ball_case()
    label = np.where(np.asarray(case.label) == 2, 2, 0).astype(np.uint8)
    data, rng = LabelledSlices([replace(case, label=label)], settings), np.random.default_rng(0)
    assert all(data.draw(rng).centre is None for _ in range(20))
