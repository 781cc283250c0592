"""Who a request comes from and what that person may do: a token file, or MONAI Label's Keycloak settings.

MONAI Label guards its routes by roles and asks :func:`get_current_user` for the user. That function is replaced: the
original decodes no Keycloak token with PyJWT 2 or later and answers 500 while Keycloak does not answer
(https://github.com/Project-MONAI/MONAILabel/issues/1493).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jwt
import requests
from fastapi import APIRouter, Depends, FastAPI, Form, HTTPException, Request
from monailabel.config import settings as platform
from monailabel.endpoints.user import auth as theirs
from monailabel.endpoints.user.auth import RBAC, User

from aslseg.errors import BadSettingsError
from aslseg.files import FileStamp
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.network_access import authentication_configured
from aslseg.serving.tokens import ROLES, TokenHolder, read_token_file
from aslseg.settings import Settings

USER = Depends(RBAC(platform.MONAI_LABEL_AUTH_ROLE_USER))
ANNOTATOR = Depends(RBAC(platform.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))
ADMIN = Depends(RBAC(platform.MONAI_LABEL_AUTH_ROLE_ADMIN))

ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"]


class TokenFile:
    """The users of a token file, read again when the file changes, so that a removed line ends access at once.

    Args:
        path: The file.

    Raises:
        BadSettingsError: As :func:`read_token_file`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._stamp = FileStamp.of(path)
        self._holders = read_token_file(path)

    def user(self, token: str, name: str | None = None) -> User:
        """The holder of a token.

        Args:
            token: As it came.
            name: The name that came with it, if any.

        Raises:
            HTTPException: 401, no such token.
            RefusedError: The file was changed and cannot be read any more; nobody is let in then.
        """
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
        found = [h for h in self._current() if hmac.compare_digest(h.sha256, digest) and name in (None, h.name)]
        if not found:
            raise unauthorized("unknown token")
        return User(username=found[0].name, roles=platform_roles(found[0].role))

    def _current(self) -> list[TokenHolder]:
        with self._lock:
            try:
                stamp = FileStamp.of(self.path)
                if stamp != self._stamp:
                    self._holders, self._stamp = read_token_file(self.path), stamp
            except BadSettingsError as error:
                raise RefusedError(f"nobody can log in: {error}", 503) from None
            except OSError as error:
                reason = error.strerror or type(error).__name__
                raise RefusedError(
                    f"nobody can log in: the token file cannot be read ({reason}); check its disk", 503
                ) from None
            return self._holders


def platform_roles(role: str) -> list[str]:
    """MONAI Label's roles for one of ours: its own and those below it."""
    below = [platform.MONAI_LABEL_AUTH_ROLE_ANNOTATOR, platform.MONAI_LABEL_AUTH_ROLE_REVIEWER]
    names = [*below, platform.MONAI_LABEL_AUTH_ROLE_ADMIN]
    return [platform.MONAI_LABEL_AUTH_ROLE_USER, *names[: ROLES.index(role) + 1]]


def keycloak_user(token: str, name: str | None = None) -> User:
    """The user of a Keycloak access token.

    Raises:
        HTTPException: 401, not a valid token of the realm; 503, Keycloak does not answer.
    """
    try:
        key = theirs.get_public_key(platform.MONAI_LABEL_AUTH_REALM_URI)
    except (requests.RequestException, ValueError, KeyError) as error:
        raise HTTPException(503, f"Keycloak does not give its key ({type(error).__name__}); is it running?") from None
    try:
        payload = jwt.decode(token, key, algorithms=ALGORITHMS, options={"verify_aud": False})
    except (jwt.InvalidTokenError, ValueError) as error:
        raise unauthorized(f"not a valid token ({type(error).__name__})") from None
    roles: Any = payload
    for part in platform.MONAI_LABEL_AUTH_TOKEN_ROLES.split("#"):
        roles = roles.get(part) if isinstance(roles, dict) else None
    username = payload.get(platform.MONAI_LABEL_AUTH_TOKEN_USERNAME)
    if not isinstance(username, str):
        raise unauthorized(f"the token has no {platform.MONAI_LABEL_AUTH_TOKEN_USERNAME}")
    return User(username=username, roles=[str(role) for role in roles] if isinstance(roles, list) else [])


def unauthorized(reason: str) -> HTTPException:
    """401, with the header that makes a browser ask for name and token."""
    return HTTPException(401, reason, {"WWW-Authenticate": 'Basic realm="ASLseg", charset="UTF-8"'})


def authenticated_name(user: User) -> str | None:
    """The name of a user that was authenticated; None where nobody has to say who they are."""
    return user.username if platform.MONAI_LABEL_AUTH_ENABLE else None


def install_auth(host: FastAPI, settings: Settings) -> None:
    """Authenticate every request, if the settings ask for it.

    Raises:
        BadSettingsError: The token file cannot be used.
    """
    if not authentication_configured(settings):
        return
    find = TokenFile(Path(settings.token_file)).user if settings.token_file else keycloak_user
    # MONAI Label's routes check roles only if this is set; it was read from the environment before our settings
    platform.MONAI_LABEL_AUTH_ENABLE = True

    def current_user(request: Request) -> User:
        return find(*credentials(request.headers.get("authorization", "")))

    host.dependency_overrides[theirs.get_current_user] = current_user
    router = APIRouter(prefix="/auth", tags=["Auth"])
    _add_routes(router, current_user, None if settings.token_file else keycloak_login, find)
    before = len(host.router.routes)
    host.include_router(router)
    host.router.routes[:] = host.router.routes[before:] + host.router.routes[:before]


def credentials(header: str) -> tuple[str, str | None]:
    """Token and name of an ``Authorization`` header: Bearer, as Slicer sends it, or Basic, as browsers do.

    Raises:
        HTTPException: 401, neither of them.
    """
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip(), None
    if scheme.lower() == "basic":
        try:
            name, colon, token = base64.b64decode(value, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError, ValueError):
            name, colon, token = "", "", ""
        if colon:
            return token, name
    raise unauthorized("log in with a token: Authorization: Bearer TOKEN, or Basic with name and token")


def _add_routes(
    router: APIRouter,
    current_user: Callable[[Request], User],
    login: Callable[[str, str], dict[str, Any]] | None,
    find: Callable[[str, str | None], User],
) -> None:
    """What Slicer asks: whether it must log in, a token for name and password, and whether a token is valid."""

    @router.get("/")
    def enabled() -> dict[str, Any]:
        return {
            "enabled": True,
            "client_id": platform.MONAI_LABEL_AUTH_CLIENT_ID,
            "realm": platform.MONAI_LABEL_AUTH_REALM_URI if login else "ASLseg",
        }

    @router.post("/token")
    def token(username: Annotated[str, Form()], password: Annotated[str, Form()]) -> dict[str, Any]:
        """With a token file the token is the password."""
        if login is not None:
            return login(username, password)
        find(password, username)
        return {"access_token": password, "token_type": "bearer"}

    @router.get("/token/valid")
    def valid(user: User = Depends(current_user)) -> dict[str, Any]:  # noqa: B008 - FastAPI's form
        return user.model_dump()


def keycloak_login(name: str, password: str) -> dict[str, Any]:
    """Keycloak's token for a name and a password.

    Raises:
        HTTPException: 401, refused by Keycloak; 503, Keycloak does not answer.
    """
    form = {"client_id": platform.MONAI_LABEL_AUTH_CLIENT_ID, "grant_type": "password"}
    form |= {"username": name, "password": password}
    try:
        reply = requests.post(theirs.token_uri(), data=form, timeout=platform.MONAI_LABEL_AUTH_TIMEOUT)
        content = reply.json()
    except (requests.RequestException, ValueError) as error:
        raise HTTPException(503, f"Keycloak does not answer ({type(error).__name__}); is it running?") from None
    if not reply.ok:
        raise unauthorized("Keycloak refused the name or the password")
    return dict(content)
