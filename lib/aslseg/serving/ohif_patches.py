"""OHIF's MONAI Label extension, mended on its way to the browser.

The wheel's files stay as they are. Each mend is one place in the text of the bundle; where another version of the
extension reads differently it is left out, with a warning.
"""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from pathlib import Path

from aslseg.types import Labels

logger = logging.getLogger(__name__)

MARK = "modelLabelToIdxMap"  # only the extension's bundle has it

# what stands there, what is served, why
MENDS = (
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
        "a row without points is a row without points",
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


def mended(file: Path, labels: Labels) -> str | None:
    """The text of a file of OHIF as it is to be served; None: as it is.

    Args:
        file: A file of the viewer.
        labels: Whose nesting says what may be drawn inside of what.
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
    for before, after, why in MENDS:
        if text.count(before) == 1:
            text = text.replace(before, after)
        else:
            logger.warning("OHIF's extension reads differently than expected, left out: %s", why)
    return text
