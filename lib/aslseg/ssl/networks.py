"""Networks of the SSL model: the SSL papers' V-Net, a small one for CPUs, and MONAI's by name.

Every factory takes (classes, patch, last_relu) and returns a module from (B, 1, i, j, k) to
logits (B, classes, i, j, k) for i, j, k multiples of 16. ``last_relu`` False leaves out the rectifier before the head
where there is one (V-Net, SegResNet): with eight features that are never negative a rare class gets none of its own. It
ends as what remains where all features are 0, with a probability that its bias bounds below one half.
"""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.nets import SegResNet, UNet
from torch import Tensor, nn


class VNet(nn.Module):
    """V-Net as the SSL literature trains it (UA-MT lineage, docs/science.md §4): five levels, skips by addition.

    With 16 filters, batch norm and one input channel it has 9.44 M parameters.

    Args:
        classes: Output channels, background included.
        filters: Channels of the first level, doubled at each of four strided convolutions.
        dropout: Drop probability after the deepest block.
        head_dropout: Drop probability after the last block. With 8 filters, half of 8 channels gone at each step leaves
            a rare class no feature of its own: it ends as what remains when all features are off, and loses.
        last_relu: Whether the features that reach the head are rectified, as the papers' are.
    """

    ENCODER = (1, 2, 3, 3, 3)
    DECODER = (1, 2, 3, 3)

    def __init__(
        self,
        classes: int,
        filters: int = 16,
        dropout: float = 0.5,
        head_dropout: float = 0.5,
        last_relu: bool = True,
    ) -> None:
        super().__init__()
        width = [filters * 2**level for level in range(5)]
        self.encoder = nn.ModuleList(
            _convolutions(n, 1 if level == 0 else width[level], width[level]) for level, n in enumerate(self.ENCODER)
        )
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv3d(width[level], width[level + 1], 2, 2), *_norm_relu(width[level + 1]))
            for level in range(4)
        )
        half = VNetDecoder(classes, filters, head_dropout, last_relu=last_relu)
        # the decoder's parts keep the names under which they stand in published model files
        self.up, self.decoder, self.head, self.head_dropout = half.up, half.decoder, half.head, half.head_dropout
        self.dropout = nn.Dropout3d(dropout)
        self.last_relu = last_relu

    def encode(self, x: Tensor) -> list[Tensor]:
        """(B, 1, i, j, k) to the features of the five levels, (B, filters 2^l, i / 2^l, j / 2^l, k / 2^l)."""
        features = []
        for level in range(4):
            features.append(self.encoder[level](x))
            x = self.down[level](features[-1])
        return [*features, self.dropout(self.encoder[4](x))]

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """Features of :meth:`encode` to logits (B, classes, i, j, k)."""
        return _decode(self, features)

    def decoder_with(self, up: str) -> VNetDecoder:
        """A fresh decoder for the same features and classes; ``up`` as in :class:`VNetDecoder`."""
        return VNetDecoder(self.head.out_channels, self.head.in_channels, self.head_dropout.p, up, self.last_relu)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, i, j, k) to logits (B, classes, i, j, k)."""
        return self.decode(self.encode(x))


class VNetDecoder(nn.Module):
    """The way up of a V-Net, from the features of :meth:`VNet.encode` to logits.

    Args:
        classes: Output channels, background included.
        filters: Channels of the first level.
        head_dropout: Drop probability after the last block.
        up: ``transposed`` convolution (V-Net), or as in MC-Net+ ``trilinear`` (corners aligned) or ``nearest``
            interpolation followed by a 3 x 3 x 3 convolution.
        last_relu: Whether the features that reach the head are rectified.
    """

    def __init__(
        self,
        classes: int,
        filters: int,
        head_dropout: float,
        up: str = "transposed",
        last_relu: bool = True,
    ) -> None:
        super().__init__()
        width = [filters * 2**level for level in range(5)]
        self.up = nn.ModuleList(
            nn.Sequential(_upsample(up, width[level + 1], width[level]), *_norm_relu(width[level]))
            for level in range(4)
        )
        self.decoder = nn.ModuleList(
            _convolutions(n, width[level], width[level], last_relu or level > 0) for level, n in enumerate(VNet.DECODER)
        )
        self.head = nn.Conv3d(filters, classes, 1)
        self.head_dropout = nn.Dropout3d(head_dropout)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features of the five levels to logits (B, classes, i, j, k)."""
        return _decode(self, features)


def _decode(part: VNet | VNetDecoder, features: Sequence[Tensor]) -> Tensor:
    x = features[4]
    for level in (3, 2, 1, 0):
        x = part.decoder[level](part.up[level](x) + features[level])
    return part.head(part.head_dropout(x))


def _upsample(kind: str, inputs: int, outputs: int) -> nn.Module:
    if kind == "transposed":
        return nn.ConvTranspose3d(inputs, outputs, 2, 2)
    corners = {"align_corners": True} if kind == "trilinear" else {}
    return nn.Sequential(nn.Upsample(scale_factor=2, mode=kind, **corners), nn.Conv3d(inputs, outputs, 3, padding=1))


def _norm_relu(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm3d(channels), nn.ReLU(inplace=True)


def _convolutions(count: int, inputs: int, outputs: int, last_relu: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n in range(count):
        layers += [
            nn.Conv3d(inputs if n == 0 else outputs, outputs, 3, padding=1),
            *_norm_relu(outputs),
        ]
    return nn.Sequential(*layers) if last_relu else nn.Sequential(*layers[:-1])


def vnet(classes: int, patch: Sequence[int], last_relu: bool = True) -> nn.Module:
    """The papers' V-Net: 16 filters, batch norm; the head's dropout goes with the last rectifier, see `VNet`."""
    return VNet(classes, head_dropout=0.5 if last_relu else 0.0, last_relu=last_relu)


def vnet_small(classes: int, patch: Sequence[int], last_relu: bool = True) -> nn.Module:
    """V-Net with 8 filters (2.4 M parameters), quick enough to train on a CPU overnight; no dropout before its head."""
    return VNet(classes, filters=8, head_dropout=0.0, last_relu=last_relu)


def unet(classes: int, patch: Sequence[int], last_relu: bool = True) -> nn.Module:
    """MONAI's residual U-Net, 16 to 256 channels."""
    return UNet(3, 1, classes, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2)


def segresnet(classes: int, patch: Sequence[int], last_relu: bool = True) -> nn.Module:
    """MONAI's SegResNet, 16 filters."""
    network = SegResNet(3, 16, 1, classes)
    if not last_relu:
        network.conv_final[1] = nn.Identity()
    return network


def dynunet(classes: int, patch: Sequence[int], last_relu: bool = True) -> nn.Module:
    """MONAI's DynUNet with nnU-Net's plain layout; axes that reach four voxels are no longer halved."""
    from monai.networks.nets import DynUNet

    size = list(patch)
    kernels, strides = [[3, 3, 3]], [[1, 1, 1]]
    for _ in range(4):
        stride = [2 if n >= 8 else 1 for n in size]
        size = [n // s for n, s in zip(size, stride, strict=True)]
        kernels.append([3, 3, 3])
        strides.append(stride)
    return DynUNet(3, 1, classes, kernels, strides, strides[1:], filters=(16, 32, 64, 128, 160))
