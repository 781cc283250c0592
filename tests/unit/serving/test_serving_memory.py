from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from aslseg.serving.memory import reuse_freed_memory

FAULTS = """
import ctypes, resource, sys
from aslseg.serving.memory import reuse_freed_memory
if sys.argv[1] == "kept":
    assert reuse_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size = 3 << 20
def once():
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
libc.mallopt(-3, 1 << 20) if sys.argv[1] != "kept" else None  # glibc raises its limit by itself with the first free
once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this system has another C library")
def test_freed_blocks_are_used_again_without_new_pages() -> None:
    found = {}
    for way in ("kept", "given back"):
        command = [sys.executable, "-c", FAULTS, way]
        found[way] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["kept"] < 20
    assert found["given back"] > 20 * (3 << 20) // 4096 // 2


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not reuse_freed_memory()
