"""The tables of bench_loop.py: all finished arms of all settings under some folders.

Each arm is compared with ``ssl at equal compute``, the SSL model alone trained for as many steps as the whole loop, and
with ``self-training``. A scan's Dice is its mean over the labelled sets that both arms have, in the table over all
settings over these too, so that a scan counts once; the test is Wilcoxon's, two-sided, paired by scan.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

CHOSEN_BY = 16
"""Of the scored scans the first that the arms may be chosen by; the others decide nothing."""
CONTROLS = ("ssl at equal compute", "self-training")
CEILING = "true labels for as long"

Results = dict[str, dict[str, dict[str, dict[str, Any]]]]
"""By setting, arm and set: result.json."""


def read_results(folders: Iterable[Path]) -> Results:
    """What is finished under some folders."""
    found: Results = {}
    for path in sorted(p for folder in folders for p in folder.glob("edge*_labels*/set*/*/result.json")):
        setting, number, arm = path.parts[-4:-1]
        found.setdefault(setting, {}).setdefault(arm, {})[number] = json.loads(path.read_text())
    return found


def tables(folders: Sequence[Path]) -> str:
    """Markdown: a table for each setting and one over all of them."""
    results = read_results(folders)
    parts = [f"### {setting}\n\n{one_setting(found)}" for setting, found in results.items()]
    if len(results) > 1:
        parts.append(f"### all settings\n\n{over_all(results)}")
    return "\n".join(parts)


def one_setting(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The arms of one setting, by their mean Dice on all scored scans."""
    sets = sorted({n for runs in found.values() for n in runs})
    head = [
        "arm",
        "steps",
        *sets,
        "to choose by",
        "held out",
        *map(_against, CONTROLS),
        "gap closed",
        "masks learned",
        "r",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm, runs in sorted(
        found.items(), key=lambda item: -float(np.mean([list(r["dice"].values()) for r in item[1].values()]))
    ):
        first = next(iter(runs.values()))
        cells = [arm, f"{first['units']:g} x {first['unit']}"]
        cells += [_spread(list(runs[n]["dice"].values())) if n in runs else "" for n in sets]
        mean = np.mean([list(r["dice"].values()) for r in runs.values()], 0)
        cells += [f"{part.mean():.3f}" if len(part) else "" for part in (mean[:CHOSEN_BY], mean[CHOSEN_BY:])]
        cells += [compared(runs, found.get(control, {})) if arm != control else "" for control in CONTROLS]
        cells += [_gap(arm, found), *_masks(runs.values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def over_all(results: Results) -> str:
    """Each arm against the controls on all settings and sets that both have."""
    head = ["arm", *map(_against, CONTROLS), "worst setting against the first"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm in dict.fromkeys(arm for found in results.values() for arm in found):
        cells, worst = [], []
        for control in CONTROLS:
            mine, theirs = {}, {}
            for setting, found in results.items():
                for number in found.get(arm, {}).keys() & found.get(control, {}).keys():
                    mine[setting, number] = found[arm][number]
                    theirs[setting, number] = found[control][number]
                if control == CONTROLS[0] and (pair := paired(found.get(arm, {}), found.get(control, {}))):
                    worst.append((float(np.mean(pair[0] - pair[1])), setting))
            cells.append(compared(mine, theirs) if arm != control else "")
        lowest = min(worst, default=None)
        cells.append(f"{lowest[0]:+.3f} ({lowest[1]})" if lowest and arm != CONTROLS[0] else "")
        lines.append(f"| {' | '.join([arm, *cells])} |")
    return "\n".join(lines) + "\n"


def paired(mine: dict[Any, dict[str, Any]], theirs: dict[Any, dict[str, Any]]) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean Dice of each scan over the runs that both arms have, (scans,) each; None where they have none in common."""
    common = sorted(mine.keys() & theirs.keys())
    if not common:
        return None
    names = list(mine[common[0]]["dice"])
    ours, other = (np.array([[runs[n]["dice"][c] for c in names] for n in common]).mean(0) for runs in (mine, theirs))
    return ours, other


def compared(mine: dict[Any, dict[str, Any]], theirs: dict[Any, dict[str, Any]]) -> str:
    """Mean difference, the p of Wilcoxon's test and the number of runs that both have."""
    pair = paired(mine, theirs)
    if pair is None:
        return ""
    ours, other = pair
    p = 1.0 if (ours == other).all() else float(stats.wilcoxon(ours, other).pvalue)
    return f"{(ours - other).mean():+.3f}, p {p:.2g} ({len(mine.keys() & theirs.keys())})"


def _against(control: str) -> str:
    return f"minus `{control}`"


def _spread(values: list[float]) -> str:
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


def _gap(arm: str, found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Part of the difference between true labels and the first control that an arm gains."""
    runs, low, high = found[arm], found.get(CONTROLS[0], {}), found.get(CEILING, {})
    common = runs.keys() & low.keys() & high.keys()
    if not common or arm in (CONTROLS[0], CEILING):
        return ""
    means = [np.mean([list(r[n]["dice"].values()) for n in common]) for r in (runs, low, high)]
    return f"{(means[0] - means[1]) / (means[2] - means[1]):.0%}" if means[2] > means[1] else ""


def _masks(runs: Iterable[dict[str, Any]]) -> list[str]:
    """Dice of the masks that were learned and of all masks, and the correlation of agreement with Dice."""
    learned, everything, r = [], [], []
    for run in runs:
        masks, agreement = run.get("masks") or {}, run.get("agreement") or {}
        if not masks:
            continue
        everything.append(np.mean(list(masks.values())))
        if run.get("learned"):
            learned.append(np.mean(list(run["learned"].values())))
        pairs = np.array([(agreement[c], masks[c]) for c in masks if c in agreement]).reshape(-1, 2)
        if len(pairs) > 2 and (pairs.std(0) > 0).all():
            r.append(np.corrcoef(pairs.T)[0, 1])
    if not everything:
        return ["", ""]
    shown = f"{np.mean(learned):.3f} of {np.mean(everything):.3f}" if learned else f"none of {np.mean(everything):.3f}"
    return [shown, f"{np.mean(r):.2f}" if r else ""]
