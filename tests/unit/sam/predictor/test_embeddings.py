from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from aslseg.sam.modeling.architecture import Architecture, build
from aslseg.sam.modeling.attention import use_fused_attention
from aslseg.sam.modeling.build import SAMModel
from aslseg.sam.predictor.embedding_store import EmbeddingStore
from aslseg.sam.predictor.embeddings import EmbeddingCache, slice_name
from aslseg.sam.predictor.slices import SliceSource


class Counting(SAMModel):
    """Counts the slices it encodes; waits for a sign first if there is one."""

    def __init__(self, base: SAMModel) -> None:
        super().__init__(base.sam, base.architecture, fingerprint="counting")
        self.bf16, self.encoded, self.gate = False, 0, threading.Event()
        self.gate.set()

    def encode(self, slices: Tensor) -> Tensor:
        self.gate.wait(30)
        self.encoded += len(slices)
        return super().encode(slices)


@pytest.fixture
def model(tiny: SAMModel) -> Counting:
    return Counting(tiny)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).random((24, 16, 6)).astype(np.float32)


def embed(cache: EmbeddingCache, model: SAMModel, image: np.ndarray, slices: list[int]) -> Tensor:
    source = SliceSource(image)
    return cache.embed(model, [source.name(k, model) for k in slices], lambda n: source.slice(slices[n]))


def test_embeddings_are_those_of_the_slices(model: Counting, image: np.ndarray) -> None:
    cache = EmbeddingCache()
    embed(cache, model, image, [3])
    got = embed(cache, model, image, [4, 3, 4])
    with torch.inference_mode():
        expected = model.encode(np.ascontiguousarray(image[..., [4, 3, 4]].transpose(2, 0, 1)))
    torch.testing.assert_close(got, expected, atol=5e-3, rtol=5e-3)


def test_forgets_the_least_recently_used(model: Counting, image: np.ndarray) -> None:
    source = SliceSource(image)
    one = embed(EmbeddingCache(), model, image, [0]).nbytes // 2
    cache = EmbeddingCache(limit=2 * one)
    model.encoded = 0
    for k in (0, 1, 0, 2):
        embed(cache, model, image, [k])
    assert [cache.has(source.name(k, model)) for k in range(3)] == [True, False, True]
    assert cache.bytes == 2 * one
    assert model.encoded == 3


def test_sixteen_threads_that_want_the_same_slice_share_one_pass(model: Counting, image: np.ndarray) -> None:
    cache = EmbeddingCache()
    model.gate.clear()
    with ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(embed, cache, model, image, [2]) for _ in range(16)]
        model.gate.set()
        answers = [w.result(60) for w in waiting]
    assert model.encoded == 1
    assert all(torch.equal(a, answers[0]) for a in answers)


def test_threads_that_want_overlapping_slices_encode_each_once(model: Counting, image: np.ndarray) -> None:
    cache = EmbeddingCache()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: embed(cache, model, image, [n % 6, (n + 1) % 6]), range(24)))
    assert model.encoded == 6
    assert torch.equal(answers[0][1], answers[1][0])


def test_an_error_reaches_all_who_wait_and_nothing_is_kept(model: Counting, image: np.ndarray) -> None:
    cache, calls = EmbeddingCache(), []

    def broken(n: int) -> np.ndarray:
        calls.append(n)
        raise ValueError("no such slice")

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(cache.embed, model, ["a"], broken) for _ in range(4)]
        for w in waiting:
            with pytest.raises(ValueError, match="no such slice"):
                w.result(60)
    assert not cache.has("a")
    assert len(embed(cache, model, image, [0])) == 1


def test_a_name_stands_for_pixels_weights_and_size(model: Counting, image: np.ndarray) -> None:
    name = slice_name(model, image[..., 0])
    assert slice_name(model, image[..., 0].copy()) == name
    changed = image[..., 0].copy()
    changed[3, 3] += 0.01
    other = SAMModel(model.sam, model.architecture, fingerprint="other")
    larger = replace(model.architecture, image_size=128)
    resized = SAMModel(build(larger), larger, fingerprint="counting")
    names = [
        slice_name(model, changed),
        slice_name(model, image[..., 1]),
        slice_name(model, image[..., 0].T),
        slice_name(other, image[..., 0]),
        slice_name(resized, image[..., 0]),
    ]
    assert len({name, *names}) == 6
    window = [SliceSource(image * 400 - 160, w).name(0, model) for w in ((-160.0, 240.0), (-100.0, 300.0))]
    assert window[0] != window[1]


def test_disk_serves_another_process(model: Counting, image: np.ndarray, tmp_path: Path) -> None:
    first = embed(EmbeddingCache(store=EmbeddingStore(tmp_path, 1e9)), model, image, [1, 2])
    assert model.encoded == 2
    later = EmbeddingCache(store=EmbeddingStore(tmp_path, 1e9))
    assert later.has(SliceSource(image).name(2, model))
    assert torch.equal(embed(later, model, image, [1, 2]), first)
    assert model.encoded == 2
    files = list(tmp_path.rglob("*.npy"))
    assert len(files) == 2
    assert np.load(files[0], allow_pickle=False).dtype == np.float16


def test_a_damaged_file_is_made_again(model: Counting, image: np.ndarray, tmp_path: Path) -> None:
    first = embed(EmbeddingCache(store=EmbeddingStore(tmp_path, 1e9)), model, image, [1])
    (file,) = tmp_path.rglob("*.npy")
    for content in (b"", file.read_bytes()[:200], b"junk" * 100):
        file.write_bytes(content)
        assert torch.equal(embed(EmbeddingCache(store=EmbeddingStore(tmp_path, 1e9)), model, image, [1]), first)
        assert np.load(file, allow_pickle=False).shape == first.shape[1:]


def test_disk_keeps_to_its_limit_and_drops_what_was_not_read(tmp_path: Path) -> None:
    import os

    one = np.ones((4, 8, 8), np.float16)
    size = one.nbytes + 128
    store = EmbeddingStore(tmp_path, 4.5 * size)
    for n in range(4):
        store.write(f"{n:02d}", one)
        os.utime(tmp_path / f"{n:02d}"[:2] / f"{n:02d}.npy", (1000 + n, 1000 + n))
    assert store.read("00") is not None  # read again: now the newest
    store.write("04", one)
    left = sorted(p.stem for p in tmp_path.rglob("*.npy"))
    assert left == ["00", "02", "03", "04"] or left == ["00", "03", "04"]
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.npy")) <= 4.5 * size
    assert store.read("01") is None


def test_a_disk_that_takes_nothing_costs_only_time(model: Counting, image: np.ndarray, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    cache = EmbeddingCache(store=EmbeddingStore(blocked / "embeddings", 1e9))
    assert embed(cache, model, image, [0]).shape[0] == 1


@pytest.mark.parametrize(("size", "window", "everywhere"), [(64, 3, (1,)), (64, 4, (1,)), (96, 5, ()), (64, 0, (0, 1))])
def test_fused_attention_agrees_with_segment_anything(size: int, window: int, everywhere: tuple[int, ...]) -> None:
    """Windows that fit the grid of tokens, and windows that are padded."""
    torch.manual_seed(0)
    architecture = Architecture(
        image_size=size,
        patch_size=8,
        embed_dim=32,
        depth=2,
        heads=2,
        window=window,
        global_blocks=everywhere,
        out_chans=16,
        mlp_dim=32,
        decoder_heads=2,
    )
    encoder = build(architecture).image_encoder
    for name, value in encoder.named_parameters():
        if "rel_pos" in name or name.endswith("bias"):
            torch.nn.init.normal_(value, std=0.5)
    pixels = torch.randn(3, 3, size, size)
    with torch.inference_mode():
        expected = encoder(pixels)
        use_fused_attention(encoder)
        found = encoder(pixels)
        use_fused_attention(encoder)
        assert torch.equal(encoder(pixels), found)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert not torch.equal(found, expected) or window == 0


def test_fused_attention_learns_the_same(tiny: SAMModel) -> None:
    pixels = torch.randn(1, 3, 64, 64)
    grads = []
    for fused in (False, True):
        encoder = tiny.sam.image_encoder
        encoder.zero_grad()
        if fused:
            use_fused_attention(encoder)
        encoder(pixels).square().sum().backward()
        grads.append([p.grad.clone() for p in encoder.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
