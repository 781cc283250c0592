"""The click models as requests reach them, with a SAM that draws what is bright; and scans for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from aslseg.models.loaded import Models
from aslseg.sam.modeling.architecture import Architecture, build
from aslseg.sam.modeling.build import SAMModel
from aslseg.serving.cascade_cache import CascadeCache
from aslseg.serving.clicks import ClickSessions, ClickTask
from aslseg.serving.inference_request import InferenceRequest, scan_path
from aslseg.serving.params import validate_params
from aslseg.serving.replies import answer
from aslseg.settings import Paths, Settings
from seeing_sam import Sees

TINY = Architecture(64, 8, 32, 1, 2, 4, (0,), 32, 64, 4)
SHAPE, MIDDLE = (40, 32, 21), [20, 16, 10]


class Served:
    """Both click models on a studies folder; ``ask`` stands for a request."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        torch.manual_seed(0)
        chosen = Settings(model_dir=str(folder / "models"), device="cpu", embedding_disk_gb=0, **settings)
        self.models = Models(chosen, Paths(chosen, folder))
        self.models.get = lambda kind: self.sam  # type: ignore[method-assign]
        self.sam, self.folder = Sees(SAMModel(build(TINY), TINY)), folder
        scans, self.sessions = CascadeCache(self.models), ClickSessions(self.models)
        self.tasks = {
            "sam": ClickTask(scans, self.sessions, ""),
            "sam_2d": ClickTask(scans, self.sessions, "", dimension=2),
        }

    def get_image_uri(self, case: str) -> str:
        """As a datastore's."""
        return str(self.folder / f"{case}.nii")

    def ask(
        self,
        image: str | Path,
        model: str = "sam",
        client: str = "",
        temporary: bool = False,
        label_file: Path | None = None,
        **params: Any,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Mask (i, j, k) and the rest of the reply.

        Args:
            image: Id of a scan, or the path of an uploaded one.
            temporary: The upload is for this request only.
            label_file: A label that comes with the request.
        """
        given = validate_params({"foreground": [MIDDLE], "result_extension": ".nii.gz", **params})
        path, case = (image, None) if isinstance(image, Path) else (scan_path(self, image), image)  # type: ignore[arg-type]
        request = InferenceRequest(model, path, given, case, label_file, client, temporary)
        told = answer(self.tasks, request, self)  # type: ignore[arg-type]
        mask = np.asarray(nib.load(told["file"]).dataobj)
        Path(told["file"]).unlink()
        return mask, told["params"]


def ball(path: Path, shift: int = 0) -> Path:
    """A bright ball on dark ground, as an uncompressed file of float32."""
    i, j, k = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    inside = (i - 20) ** 2 + (j - 16 - shift) ** 2 + (k - 10) ** 2 < 64
    nib.save(nib.Nifti1Image(np.where(inside, 240, -160).astype(np.float32), np.eye(4)), path)
    return path
