"""Checkpoints that try to run code when read: nothing runs, whatever the answer."""

from __future__ import annotations

import builtins
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aslseg.errors import BadWeightsError
from aslseg.sam.modeling.architecture import Architecture, build
from aslseg.sam.modeling.checkpoints import describe, read

TINY = Architecture(64, 8, 32, 2, 2, 4, (1,), 32, 64)


class Call:
    """Unpickling it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.function, self.arguments


def payload(name: str, marker: Path) -> Call:
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "eval": Call(builtins.eval, f"open({str(marker)!r}, 'w')"),
        "exec": Call(builtins.exec, f"open({str(marker)!r}, 'w')"),
        "subprocess": Call(subprocess.check_call, ["touch", str(marker)]),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "open": Call(open, str(marker), "w"),
        "torch.load": Call(torch.load, Call(open, str(marker), "w")),
    }[name]


class Optimiser:
    """An object whose state holds the call, as an optimizer's would."""

    def __init__(self, call: Call) -> None:
        self.state = {"exp_avg": [call]}


def nested(place: str, call: Call, state: dict[str, torch.Tensor]) -> object:
    return {
        "the whole file": call,
        "beside the weights": {"model": state, "optimizer": call},
        "in an object": {"model": state, "optimizer": Optimiser(call)},
        "as a weight": {"model": state | {"mask_decoder.iou_token.weight": call}},
        "deep": {"model": state, "epoch": ({"a": [1, (2, {"b": call})]},)},
    }[place]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build(TINY).state_dict()


PAYLOADS = ["os.system", "eval", "exec", "subprocess", "getattr", "open", "torch.load"]
PLACES = ["the whole file", "beside the weights", "in an object", "as a weight", "deep"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 2020"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", PAYLOADS)
def test_nothing_in_a_checkpoint_runs(
    name: str, place: str, zipped: bool, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    marker, path = tmp_path / "ran", tmp_path / "bad.pth"
    allowed = set(torch.serialization.get_safe_globals())
    torch.save(nested(place, payload(name, marker), state), path, _use_new_zipfile_serialization=zipped)
    try:
        found = read(path)
    except BadWeightsError as error:
        refused = str(error)
        assert "nothing in it was executed" in refused or "expected a state dict" in refused
    else:
        assert zipped
        assert name != "os.system"
        assert place in ("beside the weights", "in an object", "deep")
        assert found.objects
        assert all(torch.equal(found.state[k], v) for k, v in state.items())
    assert not marker.exists()
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_the_names_of_what_was_left_out_are_shown(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "bad.pth"
    torch.save({"model": state, "optimizer": payload("torch.load", tmp_path / "ran")}, path)
    assert "torch.serialization.load" in describe(path)["objects"]


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_pickle_protocols_run_nothing(protocol: int, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "bad.pth"
    torch.save({"model": state, "optimizer": payload("open", marker)}, path, pickle_protocol=protocol)
    if protocol == 3:
        assert read(path).objects
    else:
        with pytest.raises(BadWeightsError, match="nothing in it was executed"):
            read(path)
    assert not marker.exists()
