"""A studies folder of thousands of tiny scans: how long a server's own bookkeeping takes, without any network.

    python benchmarks/many_scans.py --out work/many [--scans 10000] [--rounds 30]

Scans and labels of one kind are hard links to one file: bookkeeping looks at names, times and JSON, never at voxels.
One scan in ten has a human label that came through the server; the others have the mask of a round with its record,
events and score, as a round leaves them, and the ledger holds what each round decided on each of them. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import requests

from bench_clicks import ROOT, server

if TYPE_CHECKING:
    from aslseg.rounds.ledger.ledger import Ledger

SHAPE = (8, 8, 4)
EVERY = 10
"""One scan in so many has a human label."""
THINK_SECONDS = 2.0
"""Between two labels; nobody draws more quickly."""


def write_studies(studies: Path, scans: int, rounds: int) -> None:
    """The folder, as if the last of some rounds had just ended."""
    from aslseg.cases.studies import FINAL, ORIGINAL
    from aslseg.files import sha256
    from aslseg.rounds.ledger.ledger import Entry, Ledger, Score
    from aslseg.settings import Paths, load_settings

    home = Paths(load_settings({}, env={})[0], studies).home
    affine = np.diag([0.8, 0.8, 2.5, 1])
    first = {"scan": studies / "scan_00000.nii.gz"}
    first |= {tag: studies / "labels" / tag / f"scan_0000{n}.nii.gz" for n, tag in enumerate((FINAL, ORIGINAL))}
    for kind, path in first.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.zeros(SHAPE, np.int16 if kind == "scan" else np.uint8)
        array[2:6, 2:6, 1:3] = 80 if kind == "scan" else 1
        nib.save(nib.Nifti1Image(array, affine), path)
    hashes = {kind: sha256(path) for kind, path in first.items()}
    (home / "original").mkdir(parents=True)
    entries, scores = [], []
    for n in range(scans):
        case = f"scan_{n:05d}"
        tag = FINAL if n % EVERY == 0 else ORIGINAL
        for path, source in (
            (studies / f"{case}.nii.gz", first["scan"]),
            (studies / "labels" / tag / f"{case}.nii.gz", first[tag]),
        ):
            if not path.exists():
                os.link(source, path)
        if tag == FINAL:
            info = {"ts": int(time.time()), "name": f"{case}.nii.gz", "user": "ann", "sha256": hashes[FINAL]}
            info["label_info"] = [{"name": "liver", "idx": 1}, {"name": "tumour", "idx": 2}]
            entries.append(Entry("saved", case=case, tag=FINAL, details={"sha256": info["sha256"], "info": info}))
            continue
        agreement = round(0.5 + (n * 7919 % 5000) / 10000, 4)
        details = {
            "sha256": hashes[ORIGINAL],
            "agreement": {"liver": agreement, "tumour": agreement / 2},
            "models": {"ssl": "0" * 64, "sam": "1" * 64, "adapter": "2" * 64},
            "params": {"label_names": {"liver": 1, "tumour": 2}, "round": rounds},
        }
        entries.append(Entry("mask", rounds, case, ORIGINAL, details))
        scores.append(Score(case, rounds, agreement, details["agreement"]))
        (home / "original" / f"{case}.json").write_text(json.dumps({"model": "aslseg", **details, "round": rounds}))
    ledger = Ledger(home / "ledger.sqlite")
    ledger.append(entries)
    for number in range(1, rounds + 1):
        write_round(ledger, number, [s.case for s in scores])
    ledger.set_scores(scores)


def write_round(ledger: Ledger, number: int, cases: list[str]) -> None:
    """The events of a round that decided on each of these scans and promoted one in twenty."""
    from aslseg.rounds.ledger.ledger import Entry

    agreements = {case: 0.5 + (n * 7919 * number % 5000) / 10000 for n, case in enumerate(cases)}
    promoted = set(sorted(cases, key=lambda case: agreements[case])[-len(cases) // 20 :])
    decisions = {
        case: {
            "agreement": agreement,
            "per_label": {"liver": agreement, "tumour": agreement / 2},
            "promoted": case in promoted,
            "reasons": [] if case in promoted else [f"tumour: agreement {agreement / 2:.3f} below 0.7"],
            "flags": [],
        }
        for case, agreement in agreements.items()
    }
    models = dict.fromkeys(("ssl", "sam", "adapter"), f"{number:064d}")
    mask = {"sha256": f"{number:064d}", "threshold": {"liver": 0.8, "tumour": 0.7}, "models": models}
    ledger.append([Entry("opened", number)])
    ledger.append(
        Entry("mask", number, case, "aslseg_pseudo", mask | {"agreement": decisions[case]["per_label"]})
        for case in sorted(promoted)
    )
    ledger.close_round(number, {"decisions": decisions, "promoted": sorted(promoted), "agreement": agreements})


@contextmanager
def watched(url: str) -> Iterator[list[float]]:
    """Ask for ``/info/`` all the time meanwhile; gives the list into which the seconds go."""
    seconds: list[float] = []
    done = threading.Event()

    def ask() -> None:
        with requests.Session() as session:
            while not done.is_set():
                began = time.perf_counter()
                session.get(f"{url}/info/", timeout=600).raise_for_status()
                seconds.append(time.perf_counter() - began)
                done.wait(0.01)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield seconds
    finally:
        done.set()
        thread.join()


def requests_of(url: str, studies: Path, label: Path, repeats: int) -> Iterator[tuple[str, float]]:
    """Name and seconds of each request."""
    session = requests.Session()

    def timed(name: str, method: str, address: str, **more: Any) -> tuple[str, float]:
        began = time.perf_counter()
        session.request(method, f"{url}{address}", timeout=600, **more).raise_for_status()
        return name, time.perf_counter() - began

    for n in range(repeats):
        time.sleep(THINK_SECONDS)
        yield timed("next sample, agreement", "POST", "/activelearning/agreement", json={"client_id": f"user{n}"})
        yield timed("next sample, random", "POST", "/activelearning/random", json={"client_id": f"user{n}"})
        case = f"scan_{n * EVERY + 1:05d}"
        params = {"label_info": [{"name": "liver", "idx": 1}], "client_id": "ann"}
        files = {"label": ("label.nii.gz", label.read_bytes())}
        data = {"params": json.dumps(params)}
        yield timed("save a label", "PUT", f"/datastore/label?image={case}&tag=final", files=files, data=data)
        yield timed("status page", "GET", "/aslseg/")
        yield timed("metrics", "GET", "/aslseg/metrics")
        if n % 5 == 0:
            yield timed("all entries", "GET", "/datastore/?output=all")
            yield timed("list for training", "GET", "/datastore/?output=train")
            os.link(studies / "scan_00000.nii.gz", studies / f"copied_{n:03d}.nii.gz")
            yield timed("a scan was copied in", "GET", "/datastore/")


def measure(folder: Path, scans: int, rounds: int, repeats: int) -> dict[str, Any]:
    """Start a server on the folder twice, then ask it."""
    studies = folder / "studies"
    write_studies(studies, scans, rounds)
    # as after an installation, whatever the environment says: the first start stores bytecode, the later one finds it
    env = {"PYTHONPYCACHEPREFIX": str(folder / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    conf = {"first_round": False, "min_free_gb": 0, "model_dir": folder / "models"}
    found: dict[str, Any] = {"load before": os.getloadavg(), "seconds": {}}
    for start in ("first start", "later start"):
        began = time.perf_counter()
        with server(ROOT / "apps" / "aslseg", studies, folder, conf, env) as url:
            found["seconds"][start] = [time.perf_counter() - began]
            if start == "first start":
                continue
            with watched(url) as infos:
                for name, seconds in requests_of(url, studies, studies / "labels/final/scan_00000.nii.gz", repeats):
                    found["seconds"].setdefault(name, []).append(seconds)
            found["seconds"]["/info meanwhile"] = infos
    found["load after"] = os.getloadavg()
    return found


def table(found: dict[str, Any], scans: int, rounds: int) -> list[str]:
    """The results as Markdown."""
    lines = [f"{scans} scans, {rounds} rounds; load before {found['load before']}, after {found['load after']}", ""]
    lines += ["| request | p50 | p99 | max | number |", "|---|---|---|---|---|"]
    for name, seconds in found["seconds"].items():
        numbers = [*np.percentile(seconds, (50, 99)), max(seconds)]
        cells = " | ".join(f"{1e3 * x:.0f} ms" for x in numbers)
        lines.append(f"| {name} | {cells} | {len(seconds)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--scans", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    folder = options.out.resolve()
    folder.mkdir(parents=True)
    found = measure(folder, options.scans, options.rounds, options.repeats)
    (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write("\n".join(table(found, options.scans, options.rounds)) + "\n")


if __name__ == "__main__":
    main()
