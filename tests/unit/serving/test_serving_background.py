from __future__ import annotations

import threading
from collections.abc import Callable

from aslseg.serving.background import Background


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
