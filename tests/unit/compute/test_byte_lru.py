from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from aslseg.compute.byte_lru import ByteLRU


def cache(limit: float) -> ByteLRU[str, np.ndarray]:
    return ByteLRU(limit, lambda arrays: sum({id(a): a.nbytes for a in arrays}.values()))


def test_the_least_recently_used_leaves_first() -> None:
    kept = cache(20)
    for name in "ab":
        kept.put(name, np.zeros(10, np.uint8))
    assert kept.get("a") is not None
    kept.put("c", np.zeros(10, np.uint8))
    assert kept.keys() == ["a", "c"]
    assert "b" not in kept
    assert kept.get("b") is None
    assert (kept.bytes, len(kept)) == (20, 2)


def test_the_newest_stays_even_beyond_the_limit() -> None:
    kept = cache(20)
    kept.put("small", np.zeros(10, np.uint8))
    kept.put("large", np.zeros(100, np.uint8))
    assert kept.keys() == ["large"]


def test_what_values_share_counts_once() -> None:
    kept, shared = cache(20), np.zeros(15, np.uint8)
    kept.put("a", shared)
    kept.put("b", shared)
    assert kept.keys() == ["a", "b"]


def test_replacing_and_removing() -> None:
    kept = cache(20)
    kept.put("a", np.zeros(20, np.uint8))
    kept.put("a", np.ones(5, np.uint8))
    assert kept.bytes == 5
    assert kept.pop("a").sum() == 5
    assert kept.pop("a") is None
    assert len(kept) == 0


def test_many_threads() -> None:
    kept = cache(50)

    def work(n: int) -> None:
        kept.put(str(n % 9), np.zeros(10, np.uint8))
        kept.get(str((n + 1) % 9))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(500)))
    assert kept.bytes <= 50
