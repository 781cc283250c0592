"""Plug-ins by name, imported only when used, so that listing them costs no torch.

Adding a method, network or recipe is one file and one line in a registry.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from aslseg.errors import BadSettingsError


def suggest(name: str, known: list[str]) -> str:
    """The remedy half of an unknown-name message: the closest valid name, else all of them."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid names are: {', '.join(sorted(known))}"


class Registry:
    """Names mapped to ``module:attribute`` strings.

    Args:
        kind: What is registered, for messages (``"ssl method"``).
        entries: Name to import string.
    """

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries = entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def get(self, name: str) -> Any:
        """Import and return the plug-in.

        Raises:
            BadSettingsError: No plug-in has that name.
        """
        if name not in self._entries:
            raise BadSettingsError(f"unknown {self.kind} {name!r}; {suggest(name, list(self._entries))}")
        module, attribute = self._entries[name].split(":")
        return getattr(import_module(module), attribute)


SSL_METHODS = Registry(
    "ssl method",
    {
        "supervised": "aslseg.ssl.methods.supervised:Supervised",
        "mean_teacher": "aslseg.ssl.methods.mean_teacher:MeanTeacher",
        "ua_mt": "aslseg.ssl.methods.ua_mt:UncertaintyAwareMeanTeacher",
        "cps": "aslseg.ssl.methods.cps:CrossPseudoSupervision",
        "dtc": "aslseg.ssl.methods.dtc:DualTaskConsistency",
        "mcnet": "aslseg.ssl.methods.mcnet:MutualConsistency",
        "bcp": "aslseg.ssl.methods.bcp:BidirectionalCopyPaste",
        "bcp_mt": "aslseg.ssl.methods.bcp_mt:CopyPasteTeacher",
    },
)

NETWORKS = Registry(
    "network",
    {
        "vnet": "aslseg.ssl.networks:vnet",
        "vnet_small": "aslseg.ssl.networks:vnet_small",
        "unet": "aslseg.ssl.networks:unet",
        "segresnet": "aslseg.ssl.networks:segresnet",
        "dynunet": "aslseg.ssl.networks:dynunet",
    },
)

RECIPES = Registry(
    "recipe",
    {
        "aslseg": "aslseg.rounds.recipes.aslseg:aslseg",
        "cfr": "aslseg.rounds.recipes.cfr:cfr",
        "self_training": "aslseg.rounds.recipes.controls:self_training",
        "supervised": "aslseg.rounds.recipes.controls:supervised",
    },
)

# what is made of a round: its page just before it is closed, its headline after, or that it failed; rounds do not know
# the pages
REPORTS = Registry(
    "report",
    {
        "page": "aslseg.review.report:write_page",
        "headline": "aslseg.review.report:send_headline",
        "failure": "aslseg.review.report:send_failure",
    },
)

# in the order in which they are tried: the first that recognises a folder is taken
LAYOUTS = Registry(
    "layout",
    {
        "nnunet": "aslseg.cases.importing.layouts.nnunet:NnUNet",
        "msd": "aslseg.cases.importing.layouts.decathlon:Decathlon",
        "bids": "aslseg.cases.importing.layouts.bids:Bids",
        "dicom": "aslseg.cases.importing.layouts.dicom:Dicom",
        "lits": "aslseg.cases.importing.layouts.lits:LiTS",
        "two_folders": "aslseg.cases.importing.layouts.two_folders:TwoFolders",
        "case_folders": "aslseg.cases.importing.layouts.case_folders:CaseFolders",
        "beside": "aslseg.cases.importing.layouts.beside:Beside",
        "flat": "aslseg.cases.importing.layouts.flat:Flat",
    },
)
