"""Reweighting of features by mixtures of Gaussians around their mean."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from visionattn.kernels.precision import at_least_float32, without_autocast

Over = Literal["pixels", "channels"]


def gaussian_reweighting(
    x: Tensor, offset: Tensor, width: Tensor, over: Over = "pixels", eps: float = 1e-8
) -> Tensor:
    """Weigh every feature by how near it is to the mean (GAAM, https://arxiv.org/abs/2401.11143).

    Heads are neighbouring parts of equal length of the axis that is reweighted; the last takes the rest. With
    m and σ² the mean and the variance over a part, `y_k = (x - m - offset_k) / sqrt(σ² + eps)`, and the
    weights are the softmax over the part of `-Σ_k y_k² / (2 width_k²)`: the normalisers of the published
    product of densities cancel.

    Args:
        x: `[B, H, W, C]`.
        offset: of the Gaussians from the mean, `[heads, gaussians]`.
        width: of the Gaussians, in standard deviations, same shape.
        over: whether means are over the pixels of a channel or over the channels of a pixel.
        eps: added to the variance.

    Returns:
        `x` times its weights, `[B, H, W, C]`, contiguous.

    Raises:
        ValueError: shapes do not fit, more heads than pixels or channels, or an unknown axis.
    """
    if over not in get_args(Over):
        raise ValueError(f"over={over!r} is unknown; choose one of {', '.join(get_args(Over))}")
    if x.dim() != 4 or not torch.is_floating_point(x):
        raise ValueError(f"x must be [B, H, W, C] of a floating-point dtype, got {x.dtype} {tuple(x.shape)}")
    if offset.dim() != 2 or offset.shape != width.shape or not offset.numel():
        raise ValueError(
            f"offset and width must both be [heads, gaussians], got {tuple(offset.shape)} and "
            f"{tuple(width.shape)}"
        )
    heads = offset.shape[0]
    flat = x.flatten(1, 2)
    flat = flat if over == "pixels" else flat.mT
    if flat.shape[1] < 2 * heads:
        raise ValueError(f"{heads} heads cannot share {flat.shape[1]} {over}: each needs two")
    size = flat.shape[1] // heads
    with without_autocast(x):
        parts = at_least_float32(flat).split([size] * (heads - 1) + [flat.shape[1] - size * (heads - 1)], 1)
        out = torch.cat([_reweighted(*part, eps) for part in zip(parts, offset, width)], 1)
    out = out if over == "pixels" else out.mT
    return out.unflatten(1, x.shape[1:3]).to(x.dtype).contiguous()


def _reweighted(x: Tensor, offset: Tensor, width: Tensor, eps: float) -> Tensor:
    variance, mean = torch.var_mean(x, 1, keepdim=True)
    distance = ((x - mean).unsqueeze(-1) - offset) / (variance + eps).sqrt().unsqueeze(-1)
    return x * (-(distance.square() / (2 * width.square())).sum(-1)).softmax(1)
