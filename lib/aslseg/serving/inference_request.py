"""What a client wants inferred: scan, model and parameters, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore

from aslseg.serving.http_errors import RefusedError
from aslseg.serving.params import InferenceParams, validate_params


@dataclass(frozen=True)
class InferenceRequest:
    """What a client wants inferred, checked.

    Attributes:
        model: Name of the model.
        path: The scan: found by its id, or a file that the server itself wrote. No client can name a path.
        params: The client's parameters.
        case: Id of the scan in the datastore; None for an upload.
        label_file: A mask that was uploaded with the request.
        client: Who asks; two annotators never share the state of their clicks.
        temporary: The scan is deleted after this request, so that work for later requests is useless.
    """

    model: str
    path: Path
    params: InferenceParams
    case: str | None = None
    label_file: Path | None = None
    client: str = ""
    temporary: bool = False


def request_from_mapping(request: Mapping[str, Any], store: Datastore) -> InferenceRequest:
    """The request of a caller inside the server, as MONAI Label passes it on: one dictionary with everything.

    Args:
        request: ``model``, ``image`` (a scan's id), optionally ``client``, and parameters.
        store: Where the id is looked up.

    Raises:
        RefusedError: No such scan, or a parameter that is not allowed.
    """
    params = validate_params({k: v for k, v in request.items() if k not in ("model", "image", "client")})
    case = request.get("image")
    return InferenceRequest(
        str(request.get("model")), scan_path(store, case), params, case, client=str(request.get("client", ""))
    )


def scan_path(store: Datastore, case: Any) -> Path:
    """The file of a scan.

    Raises:
        RefusedError: There is no scan with this id.
    """
    path = store.get_image_uri(case) if isinstance(case, str) and case else ""
    if not path:
        raise RefusedError(f"no scan {str(case)[:80]!r} here", 404)
    return Path(path)
