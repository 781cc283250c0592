"""Free memory under limits of control groups, whose files are written here as Linux writes them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from aslseg.compute import free_memory as module
from aslseg.compute.free_memory import free_memory

GB = 10**9


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the control groups of a machine with 64 GB free lie; none yet."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GB))
    monkeypatch.setattr(module, "MOUNT", tmp_path / "cgroup")
    monkeypatch.setattr(module, "MEMBERSHIP", tmp_path / "membership")
    return tmp_path / "cgroup"


def member(mount: Path, text: str) -> None:
    mount.with_name("membership").write_text(text)


def group(folder: Path, limit: str, used: int, cache: int, version: module.Files = module.V2) -> None:
    folder.mkdir(parents=True)
    (folder / version.limit).write_text(f"{limit}\n")
    (folder / version.used).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cache}\n{version.cache} {cache}\n")


def test_without_control_groups_it_is_the_machines(mount: Path) -> None:
    assert free_memory() == 64 * GB
    member(mount, "0::/\n")
    assert free_memory() == 64 * GB


def test_a_container_has_what_is_left_of_its_limit(mount: Path) -> None:
    member(mount, "0::/\n")
    group(mount, str(8 * GB), used=5 * GB, cache=2 * GB)
    assert free_memory() == 5 * GB


def test_the_tightest_limit_of_all_groups_counts(mount: Path) -> None:
    member(mount, "0::/system.slice/aslseg.service\n")
    group(mount / "system.slice", str(9 * GB), used=6 * GB, cache=0)
    group(mount / "system.slice" / "aslseg.service", "max", used=4 * GB, cache=0)
    assert free_memory() == 3 * GB


def test_more_is_used_than_a_lowered_limit(mount: Path) -> None:
    member(mount, "0::/\n")
    group(mount, str(2 * GB), used=3 * GB, cache=0)
    assert free_memory() == 0


def test_version_1_within_and_outside_of_a_container(mount: Path) -> None:
    member(mount, "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n1:name=systemd:/docker/ab:c\n0::/\n")
    group(mount / "memory", str(8 * GB), used=1 * GB, cache=0, version=module.V1)
    assert free_memory() == 7 * GB
    group(mount / "memory" / "docker" / "ab", str(4 * GB), used=1 * GB, cache=GB // 2, version=module.V1)
    assert free_memory() == 3.5 * GB


def test_files_that_say_nothing_are_no_limit(mount: Path) -> None:
    member(mount, "0::/\n")
    group(mount, "plenty", used=1, cache=0)
    assert free_memory() == 64 * GB
    (mount / "memory.max").write_text("1000\n")
    (mount / "memory.stat").write_text("one word a line\nfile\n")
    assert free_memory() == 64 * GB
