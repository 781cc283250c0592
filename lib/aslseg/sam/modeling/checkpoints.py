"""SAM files: read without executing anything, recognised from their content, checked key by key.

Formats (docs/sam.md): ``sam_vit_b/l/h`` and MedSAM are plain state dicts at 1024 px; SAM-Med2D keeps its
state dict under ``model``, at 256 px, with 72 adapter keys or without; CFR keeps LoRA weights, prompt encoder and
decoder, and needs the SAM it was trained from; ours are safetensors with metadata. A new format is
recognised here, gets its way of being asked in :mod:`aslseg.sam.modeling.conventions`, and, where a user
may have to name it, an entry in the setting ``sam_kind`` (:mod:`aslseg.settings.training`).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aslseg.compute.weights import load_weights, read_metadata
from aslseg.errors import BadSettingsError, BadWeightsError
from aslseg.files import sha256
from aslseg.sam.modeling.architecture import VIT_B, VIT_H, VIT_L, Architecture, build
from aslseg.sam.modeling.conventions import BY_KIND, SAM
from aslseg.sam.modeling.lora import cfr_blocks, cfr_rank, is_cfr, merged_cfr
from aslseg.sam.modeling.safe_load import read_tensors
from aslseg.settings import Settings

CONTAINERS = ("model", "state_dict", "model_state_dict")
ENCODERS = {768: ("sam_vit_b", VIT_B), 1024: ("sam_vit_l", VIT_L), 1280: ("sam_vit_h", VIT_H)}
ADAPTER = re.compile(r"image_encoder\.blocks\.(\d+)\.Adapter\.")
BLOCK = re.compile(r"image_encoder\.blocks\.(\d+)\.")
MED2D_SIZE = 256
UNDECIDED = "sam_vit_b or medsam"


@dataclass(frozen=True)
class Checkpoint:
    """The content of a SAM file.

    Attributes:
        path: The file.
        kind: ``aslseg``, ``sam_vit_b``, ``sam_vit_l``, ``sam_vit_h``, ``medsam``, ``sam_med2d``, ``cfr_lora``, ``sam``
            (another size), or ``sam_vit_b or medsam`` where these two cannot be distinguished.
        recognised_by: The property that the kind was recognised by.
        state: State dict, LoRA merged.
        architecture: Recognised from the shapes, or from the metadata of our files.
        metadata: Ours, or empty.
        adapters: Encoder blocks that carry an adapter.
        lora: Rank of CFR's LoRA, 0 without.
        parameters: Number of trained values in the file.
        objects: Names of Python objects in the file; they were neither imported nor called.
        missing: Keys of the architecture that the file lacks; a key of another shape counts as missing and unexpected.
        unexpected: Keys of the file that the architecture lacks.
    """

    path: Path
    kind: str
    recognised_by: str
    state: dict[str, Tensor]
    architecture: Architecture
    metadata: dict[str, Any]
    adapters: int
    lora: int
    parameters: int
    objects: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def require_loadable(self) -> None:
        """Check that the weights can be used.

        Raises:
            BadWeightsError: Keys are missing or unexpected, or the kind is not known.
        """
        name = self.path.name
        if self.kind == UNDECIDED:
            raise BadWeightsError(
                f"{name}: sam_vit_b and MedSAM have the same keys and shapes but want other grey values; this file's "
                "name has neither sam_vit_b nor medsam in it. Set sam_kind to sam or medsam"
            )
        if self.kind == "cfr_lora" and not any(k.startswith("image_encoder.") for k in self.state):
            raise BadWeightsError(f"{name}: holds CFR's LoRA only; set sam_base to the SAM that it was trained from")
        if self.missing or self.unexpected:
            raise BadWeightsError(
                f"{name}: does not fit {self.kind} at {self.architecture.image_size} px: "
                f"{_some(self.missing)} missing, {_some(self.unexpected)} unexpected. "
                f"`aslseg info --sam-checkpoint {name} --json` lists them; give a complete file"
            )

    def at(self, image_size: int) -> Checkpoint:
        """The same SAM for another input size, positional embeddings resized.

        Raises:
            BadSettingsError: The size is no multiple of the token size.
        """
        a = self.architecture
        step = a.patch_size * (2 if a.adapters else 1)
        if image_size % step:
            raise BadSettingsError(f"sam_image_size {image_size}: {self.path.name} needs a multiple of {step} pixels")
        wanted = replace(a, image_size=image_size)
        return replace(self, architecture=wanted, state=resized(self.state, wanted))


def read(path: Path, settings: Settings | None = None) -> Checkpoint:
    """Read a SAM file and recognise it. Tensors of ``.pth`` files stay on disk until they are used.

    Args:
        path: The file.
        settings: ``sam_kind`` overrules the recognised kind; CFR's LoRA is merged into ``sam_base``.

    Raises:
        BadWeightsError: The file is missing, damaged, or no SAM.
    """
    if not path.is_file():
        raise BadWeightsError(f"{path}: no such file; set sam_checkpoint to a SAM file or leave it empty")
    settings = settings or Settings()
    whole, metadata, objects = _tensors(path)
    state = whole
    try:
        if is_cfr(whole):
            kind, why, state, architecture = _cfr(path.name, whole, settings)
        elif metadata:
            kind, why = "aslseg", "its metadata"
            architecture = Architecture.from_metadata(metadata["architecture"])
        else:
            architecture = _shape(state)
            kind, why = _kind(architecture, path, settings)
            architecture = replace(architecture, conventions=BY_KIND.get(kind, SAM))
        with torch.device("meta"):
            wanted = build(architecture).state_dict()
    except (LookupError, TypeError, ZeroDivisionError, ValueError, RuntimeError) as error:
        raise BadWeightsError(
            f"{path.name}: not a SAM ({type(error).__name__}: {error}); expected the image encoder, prompt encoder and "
            "mask decoder of segment-anything. Give a SAM, MedSAM or SAM-Med2D file, or leave sam_checkpoint empty"
        ) from None
    matches = {k for k in wanted.keys() & state.keys() if wanted[k].shape == state[k].shape}
    return Checkpoint(
        path=path,
        kind=kind,
        recognised_by=why,
        state=state,
        architecture=architecture,
        metadata=metadata,
        adapters=len({m[1] for m in map(ADAPTER.match, whole) if m}),
        lora=cfr_rank(whole) if kind == "cfr_lora" else 0,
        parameters=sum(v.numel() for k, v in whole.items() if "gaussian_matrix" not in k),
        objects=objects,
        missing=tuple(k for k in wanted if k not in matches),
        unexpected=tuple(k for k in state if k not in matches),
    )


def describe(path: Path, settings: Settings | None = None) -> dict[str, Any]:
    """A description of a file, for ``aslseg info --sam-checkpoint``.

    Returns:
        ``kind``, ``recognised_by``, ``sha256``, ``image_size`` of the file, ``adapters`` (bool), ``lora`` (rank),
        ``parameters``, ``preprocessing``, ``mask_prompt``, ``objects``, ``missing``, ``unexpected``.

    Raises:
        BadWeightsError: As :func:`read`.
    """
    found = read(path, settings)
    a = found.architecture
    return {
        "kind": found.kind,
        "recognised_by": found.recognised_by,
        "sha256": sha256(path),
        "image_size": a.image_size,
        "adapters": found.adapters > 0,
        "lora": found.lora,
        "parameters": found.parameters,
        "preprocessing": {k: asdict(a.conventions)[k] for k in ("resize", "interpolation", "scaling")},
        "mask_prompt": a.conventions.mask_prompt,
        "objects": list(found.objects),
        "missing": list(found.missing),
        "unexpected": list(found.unexpected),
    }


def resized(state: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Resize the positional embeddings to another token grid, bilinearly; the rest stays as it is.

    Args:
        state: SAM's state dict.
        architecture: The new grid.

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


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], tuple[str, ...]]:
    """State dict, our metadata if it is our file, and the names of Python objects in it."""
    if path.suffix == ".safetensors":
        try:
            read_metadata(path)
        except BadWeightsError:
            return _plain_safetensors(path), {}, ()
        return *load_weights(path, "sam"), ()
    content, objects = read_tensors(path)
    container = next((c for c in CONTAINERS if isinstance(content, dict) and isinstance(content.get(c), dict)), None)
    state = content[container] if container else content
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise BadWeightsError(f"{path.name}: expected a state dict of tensors; save model.state_dict()")
    return {str(k).removeprefix("module."): v for k, v in state.items()}, {}, objects


def _plain_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadWeightsError(f"{path.name}: damaged ({error}); copy it again or train it anew") from None


def _shape(state: dict[str, Tensor]) -> Architecture:
    """The architecture that the shapes show, with SAM's conventions; an official one where tensors are missing."""
    whole = _official(state)
    with torch.device("meta"):
        needed = build(whole).state_dict() if whole else {}
    if whole and (needed.keys() - state.keys()):
        return whole
    grid, dim = state["image_encoder.pos_embed"].shape[1], state["image_encoder.pos_embed"].shape[-1]
    patch = state["image_encoder.patch_embed.proj.weight"].shape[-1]
    depth = 1 + max(int(m[1]) for m in map(BLOCK.match, state) if m)
    relative = [state[f"image_encoder.blocks.{n}.attn.rel_pos_h"].shape for n in range(depth)]
    everywhere = tuple(n for n in range(depth) if relative[n][0] == 2 * grid - 1)
    windows = {(length + 1) // 2 for n, (length, _) in enumerate(relative) if n not in everywhere}
    if len(windows) > 1:
        raise ValueError(f"windows of {sorted(windows)} tokens")
    return Architecture(
        image_size=grid * patch,
        patch_size=patch,
        embed_dim=dim,
        depth=depth,
        heads=dim // relative[0][1],
        window=windows.pop() if windows else 0,
        global_blocks=everywhere,
        out_chans=state["image_encoder.neck.0.weight"].shape[0],
        mlp_dim=state["mask_decoder.transformer.layers.0.mlp.lin1.weight"].shape[0],
        masks=len(state["mask_decoder.mask_tokens.weight"]) - 1,
        adapters=any(ADAPTER.match(k) for k in state),
    )


def _official(state: dict[str, Tensor]) -> Architecture | None:
    """The official SAM whose encoder has the width of the file's encoder; None for other widths."""
    widths = [v.shape[0] for k, v in state.items() if k.endswith("norm1.weight") and BLOCK.match(k)]
    patches = state.get("image_encoder.patch_embed.proj.weight")
    if not widths or widths[0] not in ENCODERS or (patches is not None and patches.shape[-1] != 16):
        return None
    official = ENCODERS[widths[0]][1]
    position = state.get("image_encoder.pos_embed")
    tokens = [position.shape[1]] if position is not None else []
    tokens += [
        (len(v) + 1) // 2
        for n in official.global_blocks
        if (v := state.get(f"image_encoder.blocks.{n}.attn.rel_pos_h")) is not None
    ]
    size = tokens[0] * official.patch_size if tokens else official.image_size
    return replace(official, image_size=size, adapters=any(ADAPTER.match(k) for k in state))


def _kind(architecture: Architecture, path: Path, settings: Settings) -> tuple[str, str]:
    """The kind of a file without metadata, and the property it is recognised by."""
    a, name = architecture, path.name.lower()
    official = ENCODERS.get(a.embed_dim, ("sam",))[0] if a.patch_size == 16 else "sam"
    if settings.sam_kind != "auto":
        return official if settings.sam_kind == "sam" else settings.sam_kind, "the setting sam_kind"
    if a.adapters:
        return "sam_med2d", "its adapters"
    if a.patch_size == 16 and a.image_size == MED2D_SIZE:
        return "sam_med2d", "its image size: of the known files only SAM-Med2D's have 256 px"
    if official != "sam_vit_b" or a.image_size != VIT_B.image_size:
        return official, "its shapes"
    # MedSAM and sam_vit_b have the same keys and shapes
    if "medsam" in name:
        return "medsam", "its shapes and medsam in its name"
    return ("sam_vit_b", "its shapes and sam_vit_b in its name") if "sam_vit_b" in name else (UNDECIDED, "its shapes")


def _cfr(name: str, cfr: dict[str, Tensor], settings: Settings) -> tuple[str, str, dict[str, Tensor], Architecture]:
    """Kind, its evidence, state dict (merged with ``sam_base`` where set) and architecture of a CFR file."""
    base = None
    if settings.sam_base:
        base = read(Path(settings.sam_base), settings.model_copy(update={"sam_kind": "sam", "sam_base": ""}))
        base.require_loadable()
    channels = cfr["w_a_000"].shape[1]
    if base is None and channels not in ENCODERS:
        raise BadWeightsError(
            f"{name}: CFR's LoRA for a SAM of {channels} channels; set sam_base to the one it was trained from"
        )
    shape = base.architecture if base else ENCODERS[channels][1]
    if cfr_blocks(cfr) != set(range(shape.depth)):
        raise BadWeightsError(
            f"{name}: {len(cfr_blocks(cfr))} of {shape.depth} blocks have LoRA weights for queries and values (w_a and "
            "w_b); the file is incomplete or belongs to another SAM. Copy it again or set sam_base to the one it needs"
        )
    masks = len(cfr["mask_decoder.mask_tokens.weight"]) - 1
    architecture = replace(shape, masks=masks, canvas=True, conventions=BY_KIND["cfr_lora"])
    return "cfr_lora", "its LoRA weights", merged_cfr(base.state, cfr) if base else cfr, architecture


def _some(keys: tuple[str, ...]) -> str:
    return f"{len(keys)} keys ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "no keys"
