"""Typed settings: ``--conf`` over ``ASLSEG_*`` variables over ``.env`` over defaults; docs/settings.md lists them.

Imports no torch, so that ``aslseg --help`` and MONAI Label's constructors stay quick.
"""

from aslseg.settings.groups import GROUPS, relevant
from aslseg.settings.model import ResolvedSettings, Settings
from aslseg.settings.paths import Paths
from aslseg.settings.sources import PLATFORM_KEYS, load_settings

__all__ = ["GROUPS", "PLATFORM_KEYS", "Paths", "ResolvedSettings", "Settings", "load_settings", "relevant"]
