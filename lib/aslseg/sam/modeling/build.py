"""A SAM with its preprocessing.

A *slice* is an array (i, j): rows i, columns j. SAM's *input frame* is the slice with its long side resized
to ``image_size`` and zero-padded at the bottom and right, or for some kinds resized to the whole square. *Low-res*
maps have a quarter of a token's edge (4 x grid). Prompts are (x, y) = (column, row); :mod:`aslseg.prompts.frame` makes
them on slices, and :meth:`SAMModel.scale` takes them to the input frame.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn

from aslseg.compute.device import bfloat16_pays, choose_device
from aslseg.errors import BadWeightsError
from aslseg.files import sha256
from aslseg.resources import small_sam
from aslseg.sam.modeling import checkpoints
from aslseg.sam.modeling.architecture import Architecture, build
from aslseg.sam.modeling.conventions import Conventions
from aslseg.settings import Settings

MASK_LOGIT_LIMIT = 6.0
ELLIPSE_EDGE = 0.15  # of the radius: how far the ellipse in a box fades


class SAMModel:
    """A SAM with its preprocessing, batched over slices and prompts.

    Args:
        sam: The network.
        architecture: What it was built from.
        metadata: ``kind``, ``labels``, ``architecture``, ``base_sha256`` and the other entries of its file.
        device: Computes it.
        fingerprint: Identifies the weights in caches: the hash of the file, or by default a new random name.
    """

    def __init__(
        self,
        sam: Sam,
        architecture: Architecture,
        metadata: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
        fingerprint: str = "",
    ) -> None:
        self.sam = sam.to(device)
        self.architecture = architecture
        self.metadata = {"kind": "sam", "architecture": architecture.to_metadata()} | (metadata or {})
        self.device = torch.device(device)
        self.fingerprint = fingerprint or uuid.uuid4().hex
        self.bf16 = bfloat16_pays(self.device)
        for end in (sam.image_encoder.patch_embed, sam.image_encoder.neck):
            _in_single_precision(end)

    @property
    def image_size(self) -> int:
        """Edge of the square input in pixels."""
        return self.architecture.image_size

    @property
    def conventions(self) -> Conventions:
        """How slices and prompts are shown to it."""
        return self.architecture.conventions

    def input_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns that a slice of ``shape`` (i, j) fills in the input frame."""
        if self.conventions.resize == "squash":
            return self.image_size, self.image_size
        return ResizeLongestSide.get_preprocess_shape(shape[0], shape[1], self.image_size)

    def preprocess(self, slices: Tensor) -> Tensor:
        """Slices (B, i, j) in 0..1 to SAM's input (B, 3, image_size, image_size), by the conventions of its file.

        With ``zscore`` the slices are those of a volume with zero mean and unit variance.
        """
        shape = self.input_shape((slices.shape[1], slices.shape[2]))
        grey = slices.to(self.device, torch.float32)[:, None]
        if self.conventions.scaling == "imagenet":
            grey = grey * 255
        low, high = grey.amin((2, 3), keepdim=True), grey.amax((2, 3), keepdim=True)
        if tuple(grey.shape[2:]) != shape:
            mode = self.conventions.interpolation
            smooth = {"align_corners": False, "antialias": True} if mode != "nearest" else {}
            grey = F.interpolate(grey, shape, mode=mode, **smooth)
        if self.conventions.scaling == "minmax":
            grey = (grey.clamp(low, high) - low) / (high - low).clamp(min=1e-8)
        return self.sam.preprocess(grey.expand(-1, 3, -1, -1))

    def encode(self, slices: np.ndarray | Tensor) -> Tensor:
        """Slices (B, i, j) in 0..1 to embeddings (B, C, grid, grid)."""
        return self.sam.image_encoder(self.preprocess(torch.as_tensor(slices)))

    def decode(
        self,
        embeddings: Tensor,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
        multimask: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One mask, or three, for each of P prompts, which may belong to different slices.

        Args:
            embeddings: (P, C, grid, grid), the embedding of the slice for every prompt, or (1, ...) for all.
            points: Coordinates (P, n, 2) as (x, y) in the input frame and labels (P, n): 1 in, 0 out, -1 padding.
            boxes: (P, 4) as x0, y0, x1, y1 in the input frame.
            masks: (P, 1, 4 grid, 4 grid), as :meth:`mask_prompt` makes them.
            multimask: Three masks for an ambiguous prompt.

        Returns:
            Low-res logits (P, M, 4 grid, 4 grid) and predicted IoU (P, M); M is 3 or 1.
        """
        sparse, dense = self.sam.prompt_encoder(points=points, boxes=boxes, masks=masks)
        # The decoder repeats one image embedding for all prompts and adds the dense prompt to it. Added to the dense
        # prompts here, the sum is the same, and prompts on several slices share a call.
        return self.sam.mask_decoder(
            image_embeddings=torch.zeros_like(embeddings[:1]),
            image_pe=self.sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense + embeddings,
            multimask_output=multimask,
        )

    def mask_prompt(self, probabilities: Tensor) -> Tensor:
        """Low-res probabilities (P, 4 grid, 4 grid) to mask prompts (P, 1, 4 grid, 4 grid)."""
        p = probabilities[:, None].to(self.device, torch.float32)
        if self.conventions.mask_prompt == "probabilities":
            return p
        return torch.logit(p, eps=1e-4).clamp(-MASK_LOGIT_LIMIT, MASK_LOGIT_LIMIT)

    def to_low_res(self, slices: Tensor) -> Tensor:
        """Maps on slices (B, i, j) to low-res maps (B, 4 grid, 4 grid), zero where the input is padding."""
        size = 4 * self.architecture.grid
        shape = self.input_shape((slices.shape[1], slices.shape[2]))
        full = slices.to(self.device, torch.float32)[:, None]
        if tuple(full.shape[2:]) != shape:
            full = F.interpolate(full, shape, mode="bilinear", align_corners=False, antialias=True)
        full = F.pad(full, (0, self.image_size - shape[1], 0, self.image_size - shape[0]))
        return F.interpolate(full, (size, size), mode="bilinear", align_corners=False, antialias=True)[:, 0]

    def to_slices(self, low_res: Tensor, shape: tuple[int, int]) -> Tensor:
        """Low-res maps (P, M, 4 grid, 4 grid) to slices (P, M, i, j)."""
        return self.sam.postprocess_masks(low_res, self.input_shape(shape), shape)

    def scale(self, shape: tuple[int, int]) -> tuple[float, float]:
        """Factors from slice pixels to input-frame pixels along x (columns) and y (rows)."""
        rows, columns = self.input_shape(shape)
        return columns / shape[1], rows / shape[0]


def ellipses(boxes: Tensor, size: int, scale: float) -> Tensor:
    """Guess the objects in boxes: probabilities that fade from the centre of a box to its sides.

    A convex object in its tight box resembles the inscribed ellipse (docs/sam.md).

    Args:
        boxes: (P, 4) as x0, y0, x1, y1 in the input frame.
        size: Edge of low-res maps.
        scale: Input-frame pixels per low-res pixel.

    Returns:
        Low-res maps (P, size, size), 0.5 on the ellipse.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    middle, radius = (low + high) / 2, ((high - low) / 2).clamp(min=scale / 2)
    line = (torch.arange(size, device=boxes.device) + 0.5) * scale
    x, y = ((line - middle[:, n, None]) / radius[:, n, None] for n in (0, 1))
    return torch.sigmoid((1 - torch.hypot(x[:, None, :], y[:, :, None])) / ELLIPSE_EDGE)


def _in_single_precision(module: nn.Module) -> None:
    """Exclude a module from autocast.

    The first module of the residual stream decides in which precision the blocks add to it, so that both ends of the
    encoder stay in float32 while its blocks compute in bfloat16.
    """
    module.forward = MethodType(_without_autocast, module)


def _without_autocast(self: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return type(self).forward(self, x.float())


def base_path(settings: Settings) -> Path:
    """The SAM that fine-tuning starts from, and that answers clicks until one is published."""
    return Path(settings.sam_checkpoint) if settings.sam_checkpoint else small_sam()


def load(path: Path, settings: Settings) -> SAMModel:
    """Load a SAM that answers prompts; its format is recognised from the file.

    Prompts say what is drawn, so a SAM that was fine-tuned for other labels may be used too.

    Args:
        path: Our ``*.safetensors``, or an official file of SAM, MedSAM or SAM-Med2D with or without adapters.
        settings: ``device``, ``sam_image_size``, ``sam_kind``.

    Raises:
        BadWeightsError: Damaged, of an unknown format, incomplete, or made for canvases (CFR).
        BadSettingsError: A ``sam_image_size`` that does not fit.
    """
    model = load_any(path, settings)
    if model.architecture.canvas:
        raise BadWeightsError(
            f"{path.name}: segments stitched canvases and takes no prompts (CFR). Give a SAM, MedSAM or SAM-Med2D "
            "file, or leave sam_checkpoint empty"
        )
    return model


def load_any(path: Path, settings: Settings) -> SAMModel:
    """As :func:`load`, also for SAMs that segment canvases.

    ``sam_image_size`` resizes files to start from; files that were fine-tuned here keep the size of their training.

    Args:
        path: A SAM file; for CFR's the setting ``sam_base`` names the SAM it was trained from.
        settings: ``device``, ``sam_image_size``, ``sam_kind``, ``sam_base``.

    Raises:
        BadWeightsError, BadSettingsError: As :func:`load`.
    """
    found = checkpoints.read(path, settings)
    found.require_loadable()
    size = settings.sam_image_size
    if size and size != found.architecture.image_size and "trained" not in found.metadata:
        found = found.at(size)
    sam = build(found.architecture)
    sam.load_state_dict({k: v.float() for k, v in found.state.items()}, strict=True)
    metadata = found.metadata | {"kind": "sam", "architecture": found.architecture.to_metadata()}
    fingerprint = f"{sha256(path)}-{found.kind}-{found.architecture.image_size}"
    if found.lora:
        metadata["lora_base_sha256"] = sha256(Path(settings.sam_base))
        fingerprint += f"-{metadata['lora_base_sha256'][:16]}"
    return SAMModel(sam, found.architecture, metadata, choose_device(settings), fingerprint)
