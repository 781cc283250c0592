"""OHIF's MONAI Label extension, patched as it is served.

The wheel's files stay as they are. Each patch replaces one piece of the bundle's text; in a version of the extension
that does not hold this piece exactly once, the patch is left out, with a warning.
"""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from pathlib import Path

from aslseg.types import Labels

logger = logging.getLogger(__name__)

MARK = "modelLabelToIdxMap"  # only the extension's bundle has it

# the text in the bundle, the text that is served, the reason
PATCHES = (
    (
        "params['foreground'] = fg;",
        "params['foreground'] = fg; if (currentLabel && currentLabel !== 'background') params['label'] = currentLabel;",
        "clicks say which label they are for, so that they repair its automatic mask",
    ),
    (
        "let fg = points[currentLabel];",
        "let fg = points[currentLabel] || [];",
        "a 2-D model asked without a point does not stop the panel",
    ),
    (
        "const annotations = clickPoints[label][uid]['ProbeMONAILabel'];",
        "const annotations = clickPoints[label][uid]['ProbeMONAILabel'] || [];",
        "a row without points does not stop the panel",
    ),
    (
        "await this.props.onClick(model);",
        "try { await this.props.onClick(model); } catch (e) { console.error(e); }",
        "Run can be pressed again after an error",
    ),
    (
        "updateTargets.has(currentSegArray[i])",
        "(updateTargets.has(currentSegArray[i]) || convertedData[i] && labels.some(l => (INSIDE[l] || []).some("
        "p => currentSegs.info[p] && currentSegs.info[p].segmentIndex === currentSegArray[i])))",
        "a lesion can be drawn inside its organ",
    ),
)


def patched_text(file: Path, labels: Labels) -> str | None:
    """The text of a file of OHIF with the patches; None where the file is served unchanged.

    Args:
        file: A file of the viewer.
        labels: Their nesting decides which label may be drawn inside which.
    """
    if file.suffix != ".js":
        return None
    text = _extension(file)
    if text is None:
        return None
    names = labels.names
    inside = {
        name: [names[p] for p in range(len(names)) if p != n and n + 1 in labels.members(p)]
        for n, name in enumerate(names)
    }
    return text.replace("INSIDE[l]", f"({json.dumps(inside)})[l]")


@lru_cache(maxsize=256)
def _extension(file: Path) -> str | None:
    text = file.read_text(encoding="utf-8", errors="surrogateescape")
    if MARK not in text:
        return None
    for before, after, why in PATCHES:
        if text.count(before) == 1:
            text = text.replace(before, after)
        else:
            logger.warning("OHIF's extension reads differently than expected, left out: %s", why)
    return text
