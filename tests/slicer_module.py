"""3D Slicer's MONAI Label module without Slicer: its own HTTP client, and what the module does between the requests.

The client is the file of the module in the MONAI Label wheel. The rest follows ``MONAILabel.py`` beside it, function by
function, with arrays in place of Slicer's segments.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 - the library's own abbreviation

MODULE = Path(sys.prefix) / "monailabel" / "plugins" / "slicer" / "MONAILabel" / "MONAILabelLib" / "client.py"


def client_module() -> ModuleType:
    """The module's ``client.py``, from where the wheel installs it."""
    spec = importlib.util.spec_from_file_location("slicer_monailabel_client", MODULE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class SlicerModule:
    """An annotator at Slicer.

    Args:
        url: Of the server.
        folder: For the files that the client downloads.
        name: The client id in the module's settings.

    Attributes:
        segments: Name to mask (i, j, k) bool, in the order of Slicer's list.
        sample: The scan that is open, as the server described it.
        reply: What came with the last mask.
    """

    def __init__(self, url: str, folder: Path, name: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.errors = folder, client_module()
        self.client = self.errors.MONAILabelClient(url, tmpdir=str(folder), client_id=name)
        self.segments: dict[str, np.ndarray] = {}
        self.sample: dict[str, Any] = {}
        self.reply: dict[str, Any] = {}
        self.requested: list[str] = []
        self.fetch_info()

    def fetch_info(self) -> None:
        """``fetchInfo``."""
        self.info = self.client.info()
        assert not self.info.get("config"), "the module asks to upgrade the server"
        self.models = self.info["models"]

    def next_sample(self, strategy: str) -> str:
        """``onNextSampleButton`` and ``initSample``, with the settings *original label* and *auto run* on."""
        self.segments, self.requested = {}, []
        self.sample = self.client.next_sample(strategy, {})
        case = self.sample["id"]
        self.scan = nib.load(self.sample["path"])
        labels = self.client.datastore()["objects"][case]["labels"]
        if "original" in labels:
            names = labels["original"]["info"].get("params", {}).get("label_names", {}) or self.info["labels"]
            self._update_mask(self.client.download_label(case, "original"), list(names))
        for label in self.info["labels"]:
            self.segments.setdefault(label, np.zeros(self.scan.shape, bool))
        for label in self.info["labels"]:
            for name, model in self.models.items():
                if label in model.get("labels", []):
                    # a combo box without this entry keeps the text that it has: none, where it lists no model
                    automatic = [n for n, m in self.models.items() if m["type"] in ("segmentation", "detection")]
                    self.click_segmentation(name if name in automatic else next(iter(automatic), ""))
                    return str(case)
        return str(case)

    def click_segmentation(self, model: str) -> None:
        """``onClickSegmentation``."""
        self.requested.append(model)
        file, self.reply = self.client.infer(model, self.sample["id"], self._infer_params({}))
        labels = self.reply.get("label_names") or self.models[model].get("labels")
        if isinstance(labels, dict):
            labels = [k for k, _ in sorted(labels.items(), key=lambda item: item[1])]
        self._update_mask(file, labels)

    def click(self, segment: str, foreground: list[list[int]], background: list[list[int]] | None = None) -> None:
        """``onClickDeepgrow`` with the first model of *Smart Edit*, which is three-dimensional."""
        model = next(n for n, m in self.models.items() if m["type"] in ("deepgrow", "deepedit"))
        params = {"label": segment, "foreground": foreground, "background": background or []}
        file, self.reply = self.client.infer(model, self.sample["id"], self._infer_params(params))
        self._update_mask(file, [segment])

    def submit(self) -> dict[str, Any]:
        """``onSaveLabel``: segments are numbered by their order, and ``idx`` counts a background segment too."""
        exported = np.zeros(self.scan.shape, np.uint8)
        info = []
        for position, (name, mask) in enumerate(self.segments.items()):
            if name != "background":
                info.append({"name": name, "idx": position + 1})
                exported[mask] = len(info)
        path = self.folder / "label.nii.gz"
        nib.save(nib.Nifti1Image(exported, self.scan.affine), path)
        saved = self.client.save_label(self.sample["id"], str(path), params={"label_info": info})
        self.fetch_info()
        return dict(saved)

    def train(self) -> dict[str, Any]:
        """``onTraining`` with the trainer that the box shows first."""
        return dict(self.client.train_start(next(iter(self.info["trainers"])), {}))

    def _infer_params(self, params: dict[str, Any]) -> dict[str, Any]:
        return {**params, "result_extension": ".nrrd", "result_dtype": "uint8"}

    def _update_mask(self, file: str, labels: list[str]) -> None:
        """``updateSegmentationMask``: value n + 1 is the n-th label, whose segment is replaced."""
        array = sitk.GetArrayFromImage(sitk.ReadImage(file)).transpose(2, 1, 0)
        assert array.shape == self.scan.shape
        for value, label in enumerate((name for name in labels if name != "background"), 1):
            self.segments[label] = array == value
