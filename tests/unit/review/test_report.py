"""The report of a round: everything in it, from the ledger alone, on scans that are there, replaced or gone."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from aslseg.cases.studies import PSEUDO
from aslseg.errors import DiskFullError, LedgerError
from aslseg.files import sha256
from aslseg.review.report import collect, headline, report_path, source_words, write
from aslseg.rounds.label_files.masks import MaskStore
from aslseg.rounds.ledger.ledger import Entry, Ledger
from aslseg.settings import Paths, Settings
from aslseg.volume.io import read_image
from own_thread import for_this_thread
from tiny_rounds import tiny_settings, tiny_studies

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return tiny_settings(tmp_path)


@pytest.fixture
def paths(tmp_path: Path, settings: Settings) -> Paths:
    return Paths(settings, tiny_studies(tmp_path, cases=11, labelled=1))


def promoted(paths: Paths, case: str, tumour: float | None) -> Entry:
    """The event of a promotion of a phantom's true mask."""
    assert paths.studies is not None
    scan = paths.studies / f"{case}.nii.gz"
    truth = read_image(paths.studies.parent / "studies_truth" / f"{case}.nii.gz")
    details = {
        "sha256": MaskStore(paths.home).add(truth.array.astype(np.uint8), truth.affine),
        "image": sha256(scan),
        "agreement": {"liver": 0.95, "tumour": tumour},
        "threshold": {"liver": 0.9, "tumour": 0.7},
        "models": {},
    }
    return Entry("mask", 1, case, PSEUDO, details)


def decision(agreement: float, *reasons: str, promoted: bool = False) -> dict[str, Any]:
    per_label = {"liver": agreement, "tumour": None}
    return {"agreement": agreement, "per_label": per_label, "promoted": promoted, "reasons": list(reasons)}


def close(paths: Paths, *entries: Entry, number: int = 1, **summary: Any) -> Ledger:
    """End a round with these promotions."""
    ledger = Ledger(paths.ledger)
    cases = [str(e.case) for e in entries]
    decided = {c: decision(0.9, promoted=True) for c in cases} | summary.pop("decisions", {})
    ledger.append([Entry("opened", number), *entries])
    ledger.close_round(number, {"promoted": cases, "decisions": decided} | summary)
    return ledger


def pictures(page: str) -> list[np.ndarray]:
    """The pictures of a page, (rows, columns, 3) in 0..1."""
    found = re.findall(r"data:image/png;base64,([^\"]+)", page)
    return [imread(io.BytesIO(base64.b64decode(text)))[..., :3] for text in found]


def test_everything_stands_in_it(paths: Paths, settings: Settings) -> None:
    names = [f"phantom_{n:03d}" for n in range(1, 11)]
    entries = [promoted(paths, name, 0.7 + 0.01 * n) for n, name in enumerate(names)]
    low = decision(0.4, "liver: agreement 0.400 below 0.9")
    strange = decision(0.9, promoted=True) | {"flags": ["liver: unlike the 5 human labels: worth a look"]}
    numbers = {
        "published": ["ssl: published (Dice 0.9100, published 0.9000 on 3 validation cases) [retrained]"],
        "validation": {"ssl": 0.91, "adapter": None},
        "classes": {"liver": {"dice": 0.91, "cases": 6}, "tumour": {"dice": 0.55, "cases": 2}},
        "seconds": {"predict": 3.0, "ssl": 7200.0},
        "measured": {"ssl": 7200.0},
        "warnings": ["a warning"],
        "skipped": {"broken": "no image"},
        "source": "ssl",
        "shown": "ssl",
        "evidence": {
            "liver": {"dice": 0.883, "cases": 8, "floor": 0.8, "reason": None},
            "tumour": {"dice": None, "cases": 0, "floor": 0.65, "reason": "tumour: no human label"},
        },
    }
    ledger = close(paths, *entries, decisions={"zzz": low, names[3]: strange}, **numbers)
    path, content = write(paths, settings, 1)
    page = path.read_text()
    assert path == report_path(paths, 1)

    assert [p["case"] for p in content["promoted"]] == names, "lowest agreement first"
    shown = [(p["case"], p["kind"]) for p in content["pictures"]]
    assert shown[:5] == [(name, "doubtful") for name in names[:5]]
    assert {c for c, kind in shown[5:] if kind == "at random"} < set(names[5:])
    assert len(shown) == 8
    again = write(paths, settings)[1]["pictures"]
    assert [(p["case"], p["kind"]) for p in again] == shown, "the seed is the round"
    assert [d["case"] for d in content["first"]] == ["zzz"], "a promoted mask needs no label first"
    assert "<th>Asked</th>" in page
    for text in (
        "Promoted: 10 of 11 scans without a human label",
        "liver 0.950, tumour 0.700",
        "liver 0.900, tumour 0.700",
        "1 scan: liver: agreement below 0.9",
        "liver: agreement 0.400 below 0.9",
        "published (Dice 0.9100, published 0.9000 on 3 validation cases)",
        "no promise: this round measured nothing that one could rest on",
        "Mostly right.",
        "A hint of where to look. Expect to redraw much of it. Uncertain: measured on 2 scans.",
        "2 h 0 min",
        '<td>liver</td><td class="n">0.883</td><td class="n">8</td><td class="n">0.8</td><td></td>',
        '<td class="n">not measured</td><td class="n">0</td><td class="n">0.65</td><td>tumour: no human label</td>',
        "<td>liver: unlike the 5 human labels: worth a look</td>",
        "found from before, or nothing to do",
        "a warning",
        "broken: no image",
        "No promoted scan has been labelled by a person yet",
    ):
        assert text in page, text

    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert "<script" not in page
    assert "http:" not in page
    assert "https:" not in page
    drawn = pictures(page)
    assert len(drawn) == 8
    for picture in drawn:
        blue = picture[..., 2] - picture[..., 0] > 0.3
        assert blue.sum() > 50, "the liver has an outline"

    dice = {"dice": {"liver": 1.0, "tumour": None}, "mask": "m", "label": "n"}
    ledger.append([Entry("checked", 1, names[0], PSEUDO, dice)])
    ledger.append([Entry("checked", 1, names[1], PSEUDO, dice | {"dice": {"liver": 0.5, "tumour": 0.25}})])
    # corrected once more: the last label counts; and an audit of a mask that was not promoted
    ledger.append([Entry("checked", 1, names[1], PSEUDO, dice | {"dice": {"liver": 0.1, "tumour": 0.1}, "label": "o"})])
    last = dice | {"dice": {"liver": 0.5, "tumour": 0.25}, "label": "p"}
    ledger.append([Entry("checked", 1, names[1], PSEUDO, last)])
    close_one = {"sha256": "c", "image": "i", "agreement": {"liver": 0.2}, "promoted": False}
    ledger.append([Entry("audit", 1, "other", PSEUDO, close_one)])
    ledger.append([Entry("checked", 1, "other", PSEUDO, dice | {"dice": {"liver": 0.0, "tumour": 0.0}, "mask": "c"})])
    page = write(paths, settings, 1)[0].read_text()
    assert "1 of these masks was accepted unchanged" in page
    assert "liver 0.750, tumour 0.250" in page


def test_the_promise_and_its_audits_stand_in_report_and_headline(paths: Paths, settings: Settings) -> None:
    about = {"target": 0.85, "confidence": 0.9, "bound": 0.86, "k": 2, "audits": 6, "pairs": 14, "r": 0.9}
    made = {"liver": about | {"made": True, "missing": 0}, "tumour": about | {"made": False, "missing": 3}}
    drawn = {"sha256": "m", "image": "i", "agreement": {"liver": 0.9}, "promoted": True}
    ledger = close(paths, Entry("audit", 1, "phantom_003", PSEUDO, drawn), promise=made, published=["ssl: published"])
    path, content = write(paths, settings, 1)
    page, short = path.read_text(), headline(content)
    line = "liver: promised: mean Dice of the promoted at least 0.85 (0.9 confidence), from 6 audits"
    assert f"<li>{line}</li>" in page
    assert "<li>tumour: no promise yet: 3 more audits</li>" in page
    assert "Drawn at random for an audit after this round: phantom_003." in page
    assert "0 audits were answered so far, 1 waits" in page
    first = page[page.index("Look at these first") : page.index("<h2>Promoted")]
    assert "<b>phantom_003</b> waits for an audit (strategy <code>audit</code>)" in first
    assert f"L{line[1:]}. Tumour: no promise yet: 3 more audits. Ssl: published." in short["text"]
    assert (short["promise"][0], short["audits"]) == (line, 1)
    assert "phantom" not in json.dumps(short), "names of scans may be names of patients"

    answered = {"mask": "m", "label": "l", "dice": {"liver": 0.7, "tumour": None}}
    ledger.append([Entry("checked", 1, "phantom_003", PSEUDO, answered)])
    path, content = write(paths, settings, 1)
    assert f'<li class="bad">{line}; 1 audit since: mean Dice 0.700, NOT kept</li>' in path.read_text()
    assert "NOT kept" in headline(content)["text"]


def test_where_the_promise_decides_no_fixed_agreement_is_shown(paths: Paths, settings: Settings) -> None:
    entry = promoted(paths, "phantom_001", 0.8)
    entry.details["threshold"] = {}
    features = {"volume": {"promoted": 316.3, "human": 390.8, "cases": [9, 8], "p": 0.32, "drift": False}}
    close(paths, entry, drift={"liver": features})
    page = write(paths, settings, 1)[0].read_text()
    assert "<th>Asked</th>" not in page
    assert "These agree best, and are as many as the promise below holds for" in page
    assert "<td>volume (ml)</td>" in page


def test_names_are_escaped_and_lists_are_bounded(paths: Paths, settings: Settings) -> None:
    details = {"sha256": EVIL, "image": EVIL, "agreement": {EVIL: 0.9}, "threshold": {EVIL: 0.5}, "models": {}}
    many = [Entry("mask", 1, f"{EVIL}{n:03d}", PSEUDO, details) for n in range(200)]
    left = {f"left{n:03d}{EVIL}": decision(0.1, EVIL) for n in range(200)}
    texts = {"published": [EVIL], "warnings": [EVIL], "skipped": {EVIL: EVIL}, "source": EVIL, "shown": EVIL}
    close(paths, *many, decisions=left, validation={EVIL: 0.5}, seconds={EVIL: 1.0}, **texts)
    path, content = write(paths, settings, 1)
    page = path.read_text()
    assert EVIL not in page
    assert "<script" not in page
    assert (len(content["promoted"]), len(content["left"]), len(content["pictures"])) == (50, 50, 8)
    assert page.count("and 150 more") == 2
    assert page.count("no picture: the scan was taken away since") == 8
    assert len(page) < 100_000


def test_a_round_without_promotions(paths: Paths, settings: Settings) -> None:
    close(paths, decisions={"a": decision(0.4, "liver: agreement 0.400 below 0.9"), "b": decision(0.5, "mask: empty")})
    path, content = write(paths, settings, 1)
    page = path.read_text()
    assert "Nothing was promoted." in page
    assert "<img" not in page
    assert "Not measured: neither a new label nor a validation case holds it." in page
    text = headline(content)["text"]
    assert text.startswith("Round 1: 0 of 2 scans without a human label promoted. Most frequent reason: ")


def test_a_round_of_an_earlier_version(paths: Paths, settings: Settings) -> None:
    entry = promoted(paths, "phantom_001", None)
    ledger = Ledger(paths.ledger)
    ledger.append([Entry("opened", 1), entry])
    ledger.close_round(1, {"promoted": ["phantom_001"], "agreement": {"phantom_001": 0.95, "phantom_002": 0.3}})
    page = write(paths, settings, 1)[0].read_text()
    assert len(pictures(page)) == 1
    assert "the reasons of this round were not kept" in page


def test_scans_and_masks_that_changed_since(paths: Paths, settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    assert paths.studies is not None
    names = [f"phantom_{n:03d}" for n in range(1, 6)]
    entries = {name: promoted(paths, name, 0.8) for name in names}
    close(paths, *entries.values())
    gone, replaced, pruned, damaged, _ = names
    (paths.studies / f"{gone}.nii.gz").unlink()
    other = (paths.studies / "phantom_000.nii.gz").read_bytes()
    (paths.studies / f"{replaced}.nii.gz").write_bytes(other)
    store = MaskStore(paths.home)
    store.path(entries[pruned].details["sha256"]).unlink()
    store.path(entries[damaged].details["sha256"]).write_bytes(b"no mask")
    path, content = write(paths, settings, 1)
    notes = {p["case"]: p["note"] for p in content["pictures"]}
    assert "taken away" in notes[gone]
    assert "replaced" in notes[replaced]
    assert "cannot be read" in notes[pruned]
    assert "cannot be read" in notes[damaged]
    assert len(pictures(path.read_text())) == 1
    assert [pruned in r.getMessage() or damaged in r.getMessage() for r in caplog.records] == [True, True]


def test_a_full_disk_leaves_the_report_as_it_was(
    paths: Paths, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    close(paths)
    path, _ = write(paths, settings, 1)
    before = path.read_bytes()

    def full(source: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", for_this_thread(full, os.replace))
    with pytest.raises(DiskFullError, match="free some space"):
        write(paths, settings, 1)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_only_rounds_that_have_ended_have_one(paths: Paths, settings: Settings) -> None:
    with pytest.raises(LedgerError, match="no round has ended"):
        write(paths, settings)
    close(paths)
    Ledger(paths.ledger).open_round({})
    with pytest.raises(LedgerError, match="round 2 has not ended"):
        write(paths, settings, 2)
    with pytest.raises(LedgerError, match=r"there is no round 7 .* rounds with a report: 1"):
        write(paths, settings, 7)
    assert write(paths, settings)[1]["round"] == 1
    Ledger(paths.ledger).append([Entry("rolled back", 1)])
    path, content = write(paths, settings)
    assert "This round was rolled back" in path.read_text()
    assert headline(content)["text"].startswith("Round 1 (rolled back since): ")


def test_the_headline_names_no_scan(paths: Paths, settings: Settings) -> None:
    close(
        paths, promoted(paths, "phantom_003", 0.8), published=["ssl: unchanged"], skipped={"anna": "anna: unreadable"}
    )
    (row,) = Ledger(paths.ledger).rounds()
    found = headline(collect(paths, settings, row))
    assert found["text"] == "Round 1: 1 of 1 scans without a human label promoted. Ssl: unchanged."
    assert (found["promoted"], found["not_promoted"]) == (1, 0)
    assert "phantom" not in json.dumps(found)
    assert "anna" not in json.dumps(found)


def test_the_source_is_named_by_label_where_labels_come_from_several() -> None:
    assert source_words({"source": "ssl"}) == "ssl"
    assert source_words({"source": "ssl", "sources": {"liver": "ssl", "tumour": "ssl"}}) == "ssl"
    mixed = {"source": "mixed", "sources": {"liver": "ssl", "tumour": "adapter"}}
    assert source_words(mixed) == "liver: ssl, tumour: adapter"
