import json
import os
import pickle
import stat
import struct

import pytest
import torch

from aslseg.compute.weights import load_weights, read_metadata, save_weights
from aslseg.errors import BadWeightsError
from aslseg.files import atomic_file, sha256, write_json

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2]), "half": torch.ones(2).bfloat16()}
METADATA = {"kind": "ssl", "labels": ["liver", "tumour"], "spacing": [1.0, 1.5, 2.0]}


@pytest.fixture
def model(tmp_path):
    save_weights(tmp_path / "m.safetensors", STATE, METADATA)
    return tmp_path / "m.safetensors"


def test_round_trip(model):
    state, metadata = load_weights(model, "ssl")
    assert metadata == METADATA == read_metadata(model)
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[k], STATE[k]) and state[k].dtype == STATE[k].dtype for k in STATE)


def test_same_weights_same_bytes(model, tmp_path):
    save_weights(tmp_path / "again.safetensors", STATE, METADATA)
    assert sha256(model) == sha256(tmp_path / "again.safetensors")
    assert len(sha256(model)) == 64


def test_shared_and_strided_tensors_are_saved(tmp_path):
    one = torch.arange(6.0).reshape(2, 3)
    path = tmp_path / "m.safetensors"
    save_weights(path, {"x": one, "y": one, "z": one.T}, METADATA)
    assert torch.equal(load_weights(path, "ssl")[0]["z"], one.T)


def test_another_kind_of_model(model):
    with pytest.raises(BadWeightsError, match="holds a 'ssl' model, expected 'sam'"):
        load_weights(model, "sam")


@pytest.mark.parametrize("share", [0, 0.01, 0.2, 0.9])
def test_truncated_model(model, share):
    content = model.read_bytes()
    model.write_bytes(content[: int(share * len(content))])
    with pytest.raises(BadWeightsError, match=r"m\.safetensors"):
        load_weights(model, "ssl")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x" * 100,
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 10**12) + b"{}",
        struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe",
        struct.pack("<Q", 25) + b'{"__metadata__":{"a":"b"}}',
    ],
)
def test_what_is_no_model_of_ours(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadWeightsError, match="not an ASLseg model file"):
        read_metadata(path)


def test_absent_model(tmp_path):
    with pytest.raises(BadWeightsError, match="does not exist"):
        load_weights(tmp_path / "m.safetensors", "ssl")


def test_a_pickle_is_never_opened(tmp_path):
    sentinel = tmp_path / "owned"

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(sentinel),))

    path = tmp_path / "m.safetensors"
    path.write_bytes(pickle.dumps({"state": Bomb()}))
    with pytest.raises(BadWeightsError):
        load_weights(path, "ssl")
    torch.save({"state": torch.ones(2)}, path)
    with pytest.raises(BadWeightsError):
        load_weights(path, "ssl")
    assert not sentinel.exists()


def test_atomic_file_replaces_only_on_success(tmp_path):
    path = tmp_path / "new" / "a.b.nii.gz"
    with atomic_file(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.name.startswith(".tmp-")
        assert temporary.name.endswith(".nii.gz")
        temporary.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"

    def interrupted():
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["a.b.nii.gz"]


def test_files_have_the_users_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


def test_json_is_readable_and_stable(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": [1, 2]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"b": 1, "a": [1, 2]}
    assert text.index('"a"') < text.index('"b"')
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"b": object()})
    assert (tmp_path / "a.json").read_text() == text


def test_names_without_extension(tmp_path):
    for name in ("plain", ".hidden"):
        with atomic_file(tmp_path / name) as temporary:
            temporary.write_text("x")
        assert (tmp_path / name).read_text() == "x"
