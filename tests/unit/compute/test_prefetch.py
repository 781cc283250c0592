"""Values that are computed ahead are those that would have been computed when asked for."""

from __future__ import annotations

import threading

import pytest
import torch

from aslseg.compute.augment import normal_noise
from aslseg.compute.prefetch import Prefetched


def test_any_order_gives_the_values_of_the_function() -> None:
    ahead = Prefetched(lambda n: n * n, stride=2)
    asked = [0, 2, 4, 100, 101, 6, 8, 8]
    assert [ahead(n) for n in asked] == [n * n for n in asked]


def test_the_next_values_are_computed_before_they_are_asked_for() -> None:
    begun = {n: threading.Event() for n in range(0, 20, 5)}

    def value(number: int) -> int:
        begun[number].set()
        return number

    assert Prefetched(value, stride=5)(0) == 0
    assert all(event.wait(10) for event in begun.values())


def test_an_error_comes_with_the_number_that_it_belongs_to() -> None:
    def value(number: int) -> int:
        if number == 1:
            raise ValueError("no patch")
        return number

    ahead = Prefetched(value)
    assert ahead(0) == 0
    with pytest.raises(ValueError, match="no patch"):
        ahead(1)
    assert ahead(2) == 2


def test_noise_on_the_cpu_comes_from_the_given_generator() -> None:
    one, two = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    assert torch.equal(normal_noise((2, 3), one, torch.device("cpu")), torch.randn(2, 3, generator=two))
