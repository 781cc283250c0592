"""The tables of bench_loop.py: all finished arms of all settings under some folders.

Each arm is compared with ``ssl at equal compute``, the SSL model alone trained for as many steps as the whole loop, and
with ``self-training``. A scan's Dice is the mean over its labels, and over the labelled sets in which both arms score
it, in the table over all settings over these too, so that a scan counts once, whatever data set it is from; the test is
Wilcoxon's, two-sided, paired by scan. Where a scan has several labels, a second table compares each label by itself, on
the scans that hold it. Two scans of one patient count as two.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from lits_scoring import COLUMNS, summary

CHOSEN_BY = 16
"""Of the scored scans the first that the arms may be chosen by; the others decide nothing."""
CONTROLS = ("ssl at equal compute", "self-training")
CEILING = "true labels for as long"
LESIONS = ("lesion_recall", "false_lesions", "healthy_called_ill")

LABELS = ("liver", "tumour")

Runs = dict[Any, dict[str, Any]]
"""By set, or by setting and set: result.json of an arm."""
Results = dict[str, dict[str, Runs]]
"""By setting and arm."""


def read_results(folders: Iterable[Path]) -> Results:
    """What is finished under some folders."""
    found: Results = {}
    for path in sorted(p for folder in folders for p in folder.glob("*_labels*/set*/*/result.json")):
        setting, number, arm = path.parts[-4:-1]
        found.setdefault(setting, {}).setdefault(arm, {})[number] = json.loads(path.read_text())
    return found


def tables(folders: Sequence[Path]) -> str:
    """Markdown: a table for each setting, one by label where there are several, and one over all settings."""
    results = read_results(folders)
    parts = []
    for setting, found in results.items():
        parts.append(f"### {setting}\n\n{one_setting(found)}")
        if labels_of(found):
            parts.append(f"### {setting}, by label\n\n{by_label(found)}")
    if len(results) > 1:
        parts.append(f"### all settings\n\n{over_all(results)}")
    return "\n".join(parts)


def labels_of(found: dict[str, Runs]) -> tuple[str, ...]:
    """The labels that are scored one by one; none where there is one label."""
    return LABELS if any("rows" in run for runs in found.values() for run in runs.values()) else ()


def scores(run: dict[str, Any], label: str = "") -> dict[str, float]:
    """Dice of the scans of a run by id: the mean over their labels, or that of a label in the scans that hold it."""
    if not label:
        return run["dice"]
    if label == "tumour":
        return {row["case"]: row["tumour"]["dice"] for row in run["rows"] if row["tumour"]["lesions"]}
    return {row["case"]: row[label] for row in run["rows"]}


def one_setting(found: dict[str, Runs]) -> str:
    """The arms of one setting, by their mean Dice on all scored scans."""
    sets = sorted({n for runs in found.values() for n in runs})
    # where the unlabelled scans are scored, arms that learn their true labels are no ceiling, and no scan is kept back
    apart = not labels_of(found)
    chosen_by, gap = (["to choose by", "held out"], ["gap closed"]) if apart else ([], [])
    head = ["arm", "steps", *sets, *chosen_by, *map(_against, CONTROLS), *gap, "masks learned", "r"]
    lines = _head(head)
    for arm, runs in sorted(found.items(), key=lambda item: -_mean(item[1].values())):
        first = next(iter(runs.values()))
        cells = [arm, f"{first['units']:g} x {first['unit']}"]
        cells += [_spread(list(runs[n]["dice"].values())) if n in runs else "" for n in sets]
        if apart:
            mean = np.mean([list(r["dice"].values()) for r in runs.values()], 0)
            cells += [f"{part.mean():.3f}" if len(part) else "" for part in (mean[:CHOSEN_BY], mean[CHOSEN_BY:])]
        cells += [compared(runs, found.get(control, {})) if arm != control else "" for control in CONTROLS]
        cells += [*([_gap(arm, found)] if apart else []), *_masks(runs.values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def by_label(found: dict[str, Runs]) -> str:
    """The arms of one setting, label by label: mean over patients and spread over sets, and paired tests by scan."""
    head = ["arm"]
    for label in LABELS:
        head += [label, *(f"{label} {_against(control)}" for control in CONTROLS), f"{label} masks learned", "r"]
    lines = _head([*head, *map(COLUMNS.__getitem__, LESIONS)])
    for arm, runs in sorted(found.items(), key=lambda item: -_mean(item[1].values(), "tumour")):
        means, cells = [summary(run["rows"]) for run in runs.values()], [arm]
        for label in LABELS:
            cells.append(_spread([m[label] for m in means if m[label] is not None]))
            cells += [compared(runs, found.get(other, {}), label) if arm != other else "" for other in CONTROLS]
            cells += _masks(run.get("by_label", {}).get(label, {}) for run in runs.values())
        cells += [_spread([m[key] for m in means if m[key] is not None]) for key in LESIONS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def over_all(results: Results) -> str:
    """Each arm against the controls on all settings and sets that both have."""
    lines = _head(["arm", *map(_against, CONTROLS), "worst setting and label against the first"])
    for arm in dict.fromkeys(arm for found in results.values() for arm in found):
        cells = []
        for control in CONTROLS:
            mine, theirs = (
                {(setting, n): run for setting, found in results.items() for n, run in found.get(name, {}).items()}
                for name in (arm, control)
            )
            cells.append(compared(mine, theirs) if arm != control else "")
        worst = min(_differences(arm, results), default=None)
        cells.append(f"{worst[0]:+.3f} ({worst[1]})" if worst and arm != CONTROLS[0] else "")
        lines.append(f"| {' | '.join([arm, *cells])} |")
    return "\n".join(lines) + "\n"


def _differences(arm: str, results: Results) -> list[tuple[float, str]]:
    """Mean difference to the first control by setting, and by label where there are several."""
    found = []
    for setting, arms in results.items():
        for label in labels_of(arms) or ("",):
            pair = paired(arms.get(arm, {}), arms.get(CONTROLS[0], {}), label)
            if pair:
                found.append((float(np.mean(pair[0] - pair[1])), f"{setting} {label}".strip()))
    return found


def paired(mine: Runs, theirs: Runs, label: str = "") -> tuple[np.ndarray, np.ndarray] | None:
    """Mean Dice of each scan over the runs in which both arms score it, (scans,) each; None without such a scan."""
    found: dict[str, list[tuple[float, float]]] = {}
    for run in sorted(mine.keys() & theirs.keys()):
        ours, other = scores(mine[run], label), scores(theirs[run], label)
        for case in ours.keys() & other.keys():
            found.setdefault(case, []).append((ours[case], other[case]))
    if not found:
        return None
    means = np.array([np.mean(found[case], 0) for case in sorted(found)])
    return means[:, 0], means[:, 1]


def compared(mine: Runs, theirs: Runs, label: str = "") -> str:
    """Mean difference, the p of Wilcoxon's test and the number of runs that both have."""
    pair = paired(mine, theirs, label)
    if pair is None:
        return ""
    ours, other = pair
    p = 1.0 if (ours == other).all() else float(stats.wilcoxon(ours, other).pvalue)
    return f"{(ours - other).mean():+.3f}, p {p:.2g} ({len(mine.keys() & theirs.keys())})"


def _head(names: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _mean(runs: Iterable[dict[str, Any]], label: str = "") -> float:
    """Mean over runs of the mean Dice of their scans."""
    means = [np.mean(list(scores(run, label).values())) for run in runs if scores(run, label)]
    return float(np.mean(means)) if means else 0.0


def _against(control: str) -> str:
    return f"minus `{control}`"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


def _gap(arm: str, found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Part of the difference between true labels and the first control that an arm gains."""
    runs, low, high = found[arm], found.get(CONTROLS[0], {}), found.get(CEILING, {})
    common = runs.keys() & low.keys() & high.keys()
    if not common or arm in (CONTROLS[0], CEILING):
        return ""
    means = [_mean(r[n] for n in common) for r in (runs, low, high)]
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
