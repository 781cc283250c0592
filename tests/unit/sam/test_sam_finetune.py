from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aslseg.errors import NotEnoughCasesError, TrainingDivergedError
from aslseg.sam import finetune
from aslseg.sam.build import load
from aslseg.sam.finetune import OBJECTS_PER_SLICE, LabelledSlices, train
from aslseg.settings import Settings
from aslseg.types import Prepared
from aslseg.weights import load_weights, read_metadata, sha256


@pytest.mark.parametrize("part", ["full", "decoder"])
def test_loss_falls_and_the_file_says_what_it_is(
    part: str, ball_case: Callable[..., Prepared], tiny_file: Path, tmp_path: Path, settings: Settings
) -> None:
    settings = settings.model_copy(update={"sam_iterations": 40, "sam_train": part})
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
    assert result["steps"] == 40
    assert [r[0] for r in reports] == list(range(1, 41))
    assert {"loss", "dice"} <= reports[-1][2].keys()
    metadata = read_metadata(out)
    assert metadata["kind"] == "sam"
    assert metadata["labels"] == ["liver", "tumour"]
    assert metadata["base_sha256"] == sha256(tiny_file)
    assert result["sha256"] == sha256(out)
    before, after = load_weights(tiny_file, "sam")[0], load(out, settings).sam.state_dict()
    moved = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert moved == ({"mask_decoder", "prompt_encoder"} | ({"image_encoder"} if part == "full" else set()))


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
    monkeypatch.setattr(finetune, "interaction_loss", lambda *_: (torch.tensor(float("nan")), 0.0))
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
        n, k, objects = data.draw(rng)
        assert n == 0
        assert objects.shape == (OBJECTS_PER_SLICE, 40, 32)
        assert objects.any((1, 2)).all()
        for one in objects:
            assert not one[30:34, 2:6].any() or one.sum() == 16
            tumours += bool((label[..., k][one] == 2).all())
    assert 50 < tumours < 130
