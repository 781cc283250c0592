"""SAM files: read without executing anything, recognised from what they hold, checked key by key.

Formats (science.md, section 3.3): ``sam_vit_b/l/h`` and MedSAM are plain state dicts at 1024 px; SAM-Med2D keeps its
state dict under ``model``, at 256 px, with 72 adapter keys or without; ours are safetensors that say what they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aslseg.errors import BadWeightsError
from aslseg.sam.architecture import Architecture, build
from aslseg.weights import load_weights, read_metadata

CONTAINERS = ("model", "state_dict", "model_state_dict")
ENCODERS = {768: "sam_vit_b", 1024: "sam_vit_l", 1280: "sam_vit_h"}
ADAPTER = re.compile(r"image_encoder\.blocks\.(\d+)\.Adapter\.")
BLOCK = re.compile(r"image_encoder\.blocks\.(\d+)\.")
MED2D_SIZE = 256


@dataclass(frozen=True)
class Checkpoint:
    """A SAM file's content.

    Attributes:
        path: The file.
        kind: ``aslseg``, ``sam_vit_b``, ``sam_vit_l``, ``sam_vit_h``, ``medsam``, ``sam_med2d`` or ``sam``.
        state: State dict with the adapter keys left out.
        architecture: As recognised from the shapes, or as our own file says.
        metadata: Ours, or empty.
        adapters: Encoder blocks that carry an adapter.
        parameters: Number of trained values in the file, adapters included.
        missing, unexpected: Keys that the architecture wants and that it has no place for; a key of another shape
            is in both.
    """

    path: Path
    kind: str
    state: dict[str, Tensor]
    architecture: Architecture
    metadata: dict[str, Any]
    adapters: int
    parameters: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def require_loadable(self) -> None:
        """Raise if the weights cannot be used as they are.

        Raises:
            BadWeightsError: Missing or unexpected keys, or adapters.
        """
        if self.adapters:
            raise BadWeightsError(
                f"{self.path.name}: SAM-Med2D with adapters in {self.adapters} blocks, which this version cannot use; "
                "give a SAM-Med2D file without adapters (encoder_adapter=False), SAM, MedSAM or our small SAM"
            )
        if self.missing or self.unexpected:
            raise BadWeightsError(
                f"{self.path.name}: does not fit {self.kind} at {self.architecture.image_size} px: "
                f"{_some(self.missing)} missing, {_some(self.unexpected)} unexpected. "
                f"`aslseg info --sam-checkpoint {self.path.name} --json` lists them; give a complete file"
            )


def read(path: Path) -> Checkpoint:
    """Read a SAM file and recognise it. Tensors of ``.pth`` files stay on disk until they are used.

    Raises:
        BadWeightsError: Missing, damaged, not a SAM, or holding objects other than tensors.
    """
    if not path.is_file():
        raise BadWeightsError(f"{path}: no such file; set sam_checkpoint to a SAM file or leave it empty")
    whole, metadata, trained = _tensors(path)
    state = {k: v for k, v in whole.items() if not ADAPTER.match(k)}
    try:
        architecture = (
            Architecture.from_metadata(metadata["architecture"]) if metadata else _recognise(state, path, trained)
        )
        with torch.device("meta"):
            wanted = build(architecture).state_dict()
    except (KeyError, IndexError, TypeError, ZeroDivisionError, ValueError, RuntimeError) as error:
        raise BadWeightsError(
            f"{path.name}: not a SAM ({type(error).__name__}: {error}); expected the image encoder, prompt encoder and "
            "mask decoder of segment-anything. Give a SAM, MedSAM or SAM-Med2D file, or leave sam_checkpoint empty"
        ) from None
    fits = {k for k in wanted.keys() & state.keys() if wanted[k].shape == state[k].shape}
    return Checkpoint(
        path,
        "aslseg" if metadata else _kind(architecture, path, trained),
        state,
        architecture,
        metadata,
        len({m[1] for m in map(ADAPTER.match, whole) if m}),
        sum(v.numel() for k, v in whole.items() if "gaussian_matrix" not in k),
        tuple(k for k in wanted if k not in fits),
        tuple(k for k in state if k not in fits),
    )


def describe(path: Path) -> dict[str, Any]:
    """What ``aslseg info --sam-checkpoint`` says about a file.

    Returns:
        ``kind``, ``image_size``, ``adapters`` (bool), ``parameters``, ``missing``, ``unexpected``.

    Raises:
        BadWeightsError: As :func:`read`.
    """
    found = read(path)
    return {
        "kind": found.kind,
        "image_size": found.architecture.image_size,
        "adapters": found.adapters > 0,
        "parameters": found.parameters,
        "missing": list(found.missing),
        "unexpected": list(found.unexpected),
    }


def resized(state: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Positional embeddings brought to another token grid, bilinearly; everything else as it is.

    Args:
        state: SAM's state dict.
        architecture: The grid that is wanted.

    Returns:
        A new dict; tensors that already fit are the same objects.
    """
    grid, out = architecture.grid, dict(state)
    position = state["image_encoder.pos_embed"]
    if position.shape[1] != grid:
        moved = position.float().permute(0, 3, 1, 2)
        moved = F.interpolate(moved, (grid, grid), mode="bilinear", align_corners=False)
        out["image_encoder.pos_embed"] = moved.permute(0, 2, 3, 1)
    for block in architecture.global_blocks:
        for axis in "hw":
            key = f"image_encoder.blocks.{block}.attn.rel_pos_{axis}"
            if len(state[key]) != 2 * grid - 1:
                line = state[key].float().T[None]
                out[key] = F.interpolate(line, 2 * grid - 1, mode="linear", align_corners=False)[0].T
    return out


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
    """State dict, our metadata if it is our file, and whether it is a training checkpoint."""
    if path.suffix == ".safetensors":
        try:
            read_metadata(path)
        except BadWeightsError:
            return _plain_safetensors(path), {}, False
        return *load_weights(path, "sam"), False
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except UnpicklingError:
        raise BadWeightsError(
            f"{path.name}: holds Python objects beside its weights, or is damaged; nothing in it was executed. "
            "Save its state dict alone (torch.save(model.state_dict(), ...)) or copy the file again"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError) as error:
        first = (str(error).strip().splitlines() or [""])[0][:120]
        raise BadWeightsError(
            f"{path.name}: cannot be read ({first or type(error).__name__}); it is truncated or not a PyTorch file. "
            "Copy or download it again"
        ) from None
    container = next((c for c in CONTAINERS if isinstance(content, dict) and isinstance(content.get(c), dict)), None)
    state = content[container] if container else content
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise BadWeightsError(f"{path.name}: expected a state dict of tensors; save model.state_dict()")
    trained = container is not None and "optimizer" in content
    return {str(k).removeprefix("module."): v for k, v in state.items()}, {}, trained


def _plain_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadWeightsError(f"{path.name}: damaged ({error}); copy it again or train it anew") from None


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _recognise(state: dict[str, Tensor], path: Path, trained: bool) -> Architecture:
    """The architecture that shapes give away; preprocessing from the kind."""
    grid, dim = state["image_encoder.pos_embed"].shape[1], state["image_encoder.pos_embed"].shape[-1]
    patch = state["image_encoder.patch_embed.proj.weight"].shape[-1]
    depth = 1 + max(int(m[1]) for m in map(BLOCK.match, state) if m)
    relative = [state[f"image_encoder.blocks.{n}.attn.rel_pos_h"].shape for n in range(depth)]
    everywhere = tuple(n for n in range(depth) if relative[n][0] == 2 * grid - 1)
    windows = {(length + 1) // 2 for n, (length, _) in enumerate(relative) if n not in everywhere}
    if len(windows) > 1:
        raise ValueError(f"windows of {sorted(windows)} tokens")
    size, official = grid * patch, patch == 16
    medical = official and size == MED2D_SIZE
    medsam = _is_medsam(dim, size, path, trained)
    return Architecture(
        image_size=size,
        patch_size=patch,
        embed_dim=dim,
        depth=depth,
        heads=dim // relative[0][1],
        window=windows.pop() if windows else 0,
        global_blocks=everywhere,
        out_chans=state["image_encoder.neck.0.weight"].shape[0],
        mlp_dim=state["mask_decoder.transformer.layers.0.mlp.lin1.weight"].shape[0],
        mask_prompt="probabilities" if medical else "logits",
        resize="squash" if medical or medsam else "longest",
        scaling="unit" if medsam else "imagenet",
    )


def _is_medsam(dim: int, size: int, path: Path, trained: bool) -> bool:
    # MedSAM has exactly the keys and shapes of sam_vit_b: only its name, or a training container, tells them apart.
    return dim == 768 and size == 1024 and (trained or "medsam" in path.name.lower())


def _kind(architecture: Architecture, path: Path, trained: bool) -> str:
    a = architecture
    if a.patch_size == 16 and a.image_size == MED2D_SIZE:
        return "sam_med2d"
    if _is_medsam(a.embed_dim, a.image_size, path, trained):
        return "medsam"
    return ENCODERS.get(a.embed_dim, "sam") if a.patch_size == 16 else "sam"


def _some(keys: tuple[str, ...]) -> str:
    return f"{len(keys)} keys ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "no keys"
