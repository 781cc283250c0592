"""Whether the server may listen on an address. Imports no server, so that the command line can ask."""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Sequence

from aslseg.errors import BadSettingsError
from aslseg.settings import Settings


def require_safe_exposure(bound: str, settings: Settings) -> None:
    """Refuse to serve patients' scans to everybody on a network.

    Args:
        bound: Address that the server listens on.
        settings: ``token_file`` and ``insecure``.

    Raises:
        BadSettingsError: Not a loopback address, no authentication, and ``insecure`` is off.
    """
    if settings.insecure or authentication_configured(settings) or _is_loopback(bound):
        return
    raise BadSettingsError(
        f"it would listen on {bound} without authentication, for everybody on the network. Give --host 127.0.0.1, or "
        "a token file (`aslseg token`, --conf token_file FILE), or, on a network that you trust, --conf insecure true"
    )


def bound_host(arguments: Sequence[str]) -> str:
    """The address that ``monailabel start_server`` or uvicorn was started with; MONAI Label does not tell its apps."""
    everywhere = "0.0.0.0"  # noqa: S104 - the default of MONAI Label, which is refused
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-i", "--host", default=everywhere if "start_server" in arguments else "127.0.0.1")
    return str(parser.parse_known_args(list(arguments))[0].host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def authentication_configured(settings: Settings) -> bool:
    """Whether requests must say who they come from: by a token file, or by MONAI Label's Keycloak settings."""
    keycloak = os.environ.get("MONAI_LABEL_AUTH_ENABLE", "").strip().lower()
    return bool(settings.token_file) or keycloak in ("1", "true", "yes", "on", "t", "y")
