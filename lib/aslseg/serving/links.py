"""Which symbolic links in a studies folder are followed.

An administrator may keep labels or scans on another disk and put a link in their place. A link that leads out of the
studies is followed if it belongs to the administrator: to root, to the account that runs the server, or to the owner of
the studies folder. Anybody else who may write into the folder could otherwise show, or overwrite, files of the server.
"""

from __future__ import annotations

import os
from pathlib import Path

from aslseg.serving.http_errors import RefusedError


def trusted(path: Path, root: Path) -> bool:
    """Whether a path stays in the studies folder, or leaves it only over a link of the administrator.

    Args:
        path: A file or folder directly in ``root`` or in its sub-folders; it may not exist yet.
        root: The studies folder, resolved.
    """
    if path.resolve().is_relative_to(root):
        return True
    owners = administrators(root)
    between = [path, *path.parents]
    links = [p for p in between[: between.index(root)] if p.is_symlink()]
    return bool(links) and all(link.lstat().st_uid in owners for link in links)


def require_trusted(path: Path, root: Path) -> Path:
    """The path, if it is :func:`trusted`.

    Raises:
        RefusedError: 403, a link of somebody else leads out of the studies folder.
    """
    if not trusted(path, root):
        raise RefusedError(
            f"{path.name}: a link leads out of {root.name} and does not belong to the owner of that folder or to the "
            "server's account; nothing is read or written there. Replace the link, or change its owner (chown -h)",
            403,
        )
    return path


def administrators(root: Path) -> set[int]:
    """User ids whose links are followed."""
    own = {os.getuid()} if hasattr(os, "getuid") else set()
    return {0, root.stat().st_uid} | own
