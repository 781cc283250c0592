from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from aslseg.compute.click_priority import acquire, computing_time, yield_to_clicks
from aslseg.sam.modeling.architecture import build
from aslseg.sam.modeling.build import SAMModel
from aslseg.sam.predictor.embeddings import EmbeddingCache
from aslseg.serving.background import Background
from seeing_sam import TINY


def job(done: list[str], name: str, steps: int, gate: threading.Event | None = None) -> Callable[[], bool]:
    left = [steps]

    def step() -> bool:
        if gate is not None:
            gate.wait(20)
        done.append(name)
        left[0] -= 1
        return left[0] > 0

    return step


def test_nothing_begins_while_somebody_clicks_and_the_newest_job_comes_first() -> None:
    background, done = Background(), []
    with background.click():
        background.add(job(done, "old", 2), object())
        background.add(job(done, "new", 2), object())
        assert not background.idle(0.2)
        assert done == []
    assert background.idle(20)
    assert done == ["new", "new", "old", "old"]


def test_a_step_that_has_begun_goes_on_and_the_next_waits() -> None:
    background, done, gate = Background(), [], threading.Event()
    background.add(job(done, "a", 2, gate), object())
    with background.click(), background.click():
        gate.set()
        background.idle(0.2)
        assert len(done) <= 1
    assert background.idle(20)
    assert done == ["a", "a"]


def test_it_computes_without_helpers_and_nobody_else_does() -> None:
    before, counted = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        background = Background()

        def step() -> bool:
            torch.ones(300, 300) @ torch.ones(300, 300)
            counted.append(torch.get_num_threads())
            return False

        background.add(step, step)
        assert background.idle(20)
        other = threading.Thread(target=lambda: counted.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert [*counted, torch.get_num_threads()] == [1, 2, 2]
    finally:
        torch.set_num_threads(before)


def test_a_job_that_fails_ends_alone() -> None:
    background, done = Background(), []

    def broken() -> bool:
        raise ValueError("no such slice")

    with background.click():
        background.add(job(done, "fine", 1), object())
        background.add(broken, object())
    assert background.idle(20)
    assert done == ["fine"]


def test_of_too_many_jobs_the_oldest_are_dropped() -> None:
    background, done = Background(), []
    with background.click():
        for n in range(20):
            background.add(job(done, str(n), 1), object())
    assert background.idle(20)
    assert done == [str(n) for n in range(19, 3, -1)]


def test_a_job_takes_the_place_of_the_one_waiting_for_the_same_object():
    background, done, whose = Background(), [], object()
    with background.click():
        background.add(job(done, "before", 1), whose)
        background.add(job(done, "other", 1), object())
        background.add(job(done, "after", 1), whose)
    assert background.idle(10)
    assert done == ["after", "other"]


def test_a_slice_that_is_being_encoded_stands_still_while_somebody_clicks() -> None:
    background, seen, begun = Background(), [], threading.Event()

    def encode() -> bool:
        for block in range(200):
            yield_to_clicks()
            seen.append(block)
            begun.set()
            time.sleep(0.01)
        return False

    background.add(encode, object())
    assert begun.wait(20)
    with background.click():
        most = len(seen) + 1  # the block that it is in
        time.sleep(0.3)
        assert len(seen) <= most < 200
    assert background.idle(120)
    assert len(seen) == 200


def test_a_click_gets_the_slice_that_stands_still() -> None:
    """Without word to the background both would wait for each other."""
    background, cache, begun = Background(), EmbeddingCache(), threading.Event()
    model = SAMModel(build(TINY), TINY)
    image = np.random.default_rng(0).random((32, 32, 2), np.float32)

    def pause(*_: object) -> None:
        begun.set()
        time.sleep(0.05)

    model.sam.image_encoder.blocks[0].register_forward_hook(pause)
    background.pause_in(model.sam.image_encoder)
    background.pause_in(model.sam.image_encoder)
    background.add(lambda: cache.embed(model, ["scan"], lambda _: image[..., 0]) is None, object())
    assert begun.wait(20)
    found: list[torch.Tensor] = []

    def click() -> None:
        with background.click():
            found.append(cache.embed(model, ["scan"], lambda _: image[..., 0]))

    one = threading.Thread(target=click, daemon=True)
    one.start()
    one.join(20)
    assert len(found) == 1
    assert torch.equal(found[0], cache.embed(model, ["scan"], lambda _: image[..., 0]))


def test_a_click_gets_the_lock_of_an_answer_that_stands_still() -> None:
    background, lock, begun, got = Background(), threading.Lock(), threading.Event(), threading.Event()

    def advance() -> bool:
        with acquire(lock):
            begun.set()
            for _ in range(20):
                yield_to_clicks()
                time.sleep(0.01)
        return False

    def click() -> None:
        with background.click(), acquire(lock):
            got.set()

    background.add(advance, object())
    assert begun.wait(20)
    threading.Thread(target=click, daemon=True).start()
    assert got.wait(20)


def test_time_that_a_slice_stood_still_does_not_count_as_encoding() -> None:
    background, begun, taken = Background(), threading.Event(), []

    def encode() -> bool:
        start = computing_time()
        begun.set()
        time.sleep(0.05)
        yield_to_clicks()
        taken.append(computing_time() - start)
        return False

    background.add(encode, object())
    assert begun.wait(20)
    with background.click():
        time.sleep(3)
    assert background.idle(20)
    assert taken[0] < 2.5
