"""Does the server grow? Two annotators click for long; its memory and open files are measured all the time.

    python benchmarks/soak.py --out work/soak [--clicks 10000] [--minutes 30]

It ends after so many clicks or minutes, whichever is first, prints a table, and exits with 1 if memory or open files
grew by more than 5 % after the first minute. They click on the same slices again and again, save a label now and then,
and ask for the next sample and the status page: every cache is full after a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from bench_clicks import ROOT, server

SHAPE = (56, 48, 24)
WATCHED = {"memory": "process_resident_memory_bytes", "open files": "process_open_fds"}
MOST = 1.05
SLICES = range(6, 18)


@dataclass
class Soak:
    """The load on a server, and what was measured meanwhile.

    Args:
        url: Its address.
        labels: Scan to a label file of it, which is saved now and then.
        clicks: After so many it ends.
        seconds: After so long it ends.
        warm: Seconds after which nothing may grow.
        rest: Seconds between two clicks of one annotator.
    """

    url: str
    labels: dict[str, Path]
    clicks: int
    seconds: float
    warm: float = 60.0
    rest: float = 0.0
    done: int = 0
    samples: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {name: [] for name in WATCHED})
    failed: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Click until the end; measure every second."""
        began, lock = time.monotonic(), threading.Lock()

        def over() -> bool:
            return self.done >= self.clicks or time.monotonic() - began > self.seconds or bool(self.failed)

        def annotate(who: str, case: str) -> None:
            try:
                with requests.Session() as session:
                    n = 0
                    while not over():
                        self._act(session, who, case, n)
                        n += 1
                        with lock:
                            self.done += 1
                        time.sleep(self.rest)
            except requests.RequestException as error:
                self.failed.append(str(error))

        annotators = list(zip(("ann", "bob"), self.labels, strict=False))
        threads = [threading.Thread(target=annotate, args=one) for one in annotators]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            text = requests.get(f"{self.url}/aslseg/metrics", timeout=60).text
            for name, metric in WATCHED.items():
                found = re.search(rf"^{metric} (\S+)$", text, re.MULTILINE)
                if found:
                    self.samples[name].append((time.monotonic() - began, float(found[1])))
            time.sleep(1)
        if self.failed:
            raise SystemExit(f"the server failed: {self.failed[0]}")

    def _act(self, session: requests.Session, who: str, case: str, n: int) -> None:
        k = SLICES[n // 4 % len(SLICES)]
        spots = [[20 + m, 24, k] for m in range(n % 4 + 1)]
        params = {"label": "liver", "foreground": spots, "client_id": who, "result_extension": ".nrrd"}
        model = "sam" if n % 16 == 15 else "sam_2d"
        data = {"params": json.dumps(params)}
        session.post(f"{self.url}/infer/{model}?image={case}", data=data, timeout=600).raise_for_status()
        if n % 50 == 49:
            with self.labels[case].open("rb") as file:
                saved = {"label": ("label.nii.gz", file)}
                address = f"{self.url}/datastore/label?image={case}&tag=soak"
                session.put(address, files=saved, timeout=600).raise_for_status()
            session.post(f"{self.url}/activelearning/random", json={}, timeout=600).raise_for_status()
            session.get(f"{self.url}/aslseg/", timeout=600).raise_for_status()

    def growth(self) -> dict[str, tuple[float, float]]:
        """What was measured just after the first minute, and at the end: the medians of a fifth of the time each."""
        found = {}
        for name, samples in self.samples.items():
            values = [value for at, value in samples if at >= self.warm]
            part = max(len(values) // 5, 1)
            if len(values) < 2:
                raise SystemExit(f"it ended before the first {self.warm:g} s were over: there is nothing to compare")
            found[name] = (statistics.median(values[:part]), statistics.median(values[-part:]))
        return found


def main() -> None:
    from aslseg.volume.phantom import write_studies

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clicks", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=30.0)
    options = parser.parse_args()
    folder = options.out.resolve()
    studies = folder / "studies"
    write_studies(studies, 4, 2, 5, shape=SHAPE, overwrite=True)
    conf: dict[str, Any] = {"first_round": False, "min_free_gb": 0, "model_dir": folder / "models"}
    labels = {f"phantom_00{n}": studies / "labels" / "final" / f"phantom_00{n}.nii.gz" for n in range(2)}
    with server(ROOT / "apps" / "aslseg", studies, folder, conf, {}) as url:
        soak = Soak(url, labels, options.clicks, 60 * options.minutes)
        began = time.monotonic()
        soak.run()
        seconds = time.monotonic() - began
    growth = soak.growth()
    (folder / "samples.json").write_text(json.dumps(soak.samples) + "\n")
    lines = [f"{soak.done} clicks in {seconds:.0f} s; load {os.getloadavg()}", ""]
    lines += ["| | after a minute | at the end | growth |", "|---|---|---|---|"]
    lines += [f"| {name} | {a:.0f} | {b:.0f} | {100 * (b / a - 1):+.1f} % |" for name, (a, b) in growth.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    if any(b > MOST * a for a, b in growth.values()):
        raise SystemExit("it grows")


if __name__ == "__main__":
    main()
