"""Batch norm fused into the convolution before it, for prediction."""

from __future__ import annotations

import copy
from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fuse_batch_norm(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode that computes the same with fewer passes over memory.

    Only batch norms that directly follow a convolution in an ``nn.Sequential`` are fused.
    """
    network = copy.deepcopy(network).eval()
    for block in [m for m in network.modules() if isinstance(m, nn.Sequential)]:
        for n, (layer, norm) in enumerate(pairwise(list(block))):
            if not isinstance(layer, nn.Conv3d | nn.ConvTranspose3d) or not isinstance(norm, nn.BatchNorm3d):
                continue
            # without running statistics its output depends on the whole batch
            if norm.running_mean is not None:
                block[n] = fuse_conv_bn_eval(layer, norm, isinstance(layer, nn.ConvTranspose3d))
                block[n + 1] = nn.Identity()
    return network
