"""The public functions of local linear attention: argument checks and the choice of the implementation.

All maps are heads-last, `[B, H, W, heads, d]`; the place of a pixel matters for `causal` only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionattn.kernels.checks import check_qkv
from visionattn.kernels.local_linear.library import LOCAL_LINEAR_ATTENTION, PARALLAX_ATTENTION
from visionattn.kernels.operator import leaf

# Iterations of conjugate gradients for a ridge of at least 1, and for a smaller one: 1e-4 needs 7 to 11 at 1
# and 11 to 36 at 0.01.
_EASY, _HARD = 16, 32


@leaf
def local_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ridge: float | Tensor = 1.0,
    scale: float | None = None,
    causal: bool = False,
    iterations: int | None = None,
) -> Tensor:
    """Attention that fits a line to the values instead of their mean (https://arxiv.org/abs/2510.01450).

    The output is the value at q of a ridge regression of v on k under softmax weights p: with k̄ = Σ p k and
    `x = (Cov_p(k) + λ I)⁻¹ (q - k̄)`, it is `Σ_j p_j (1 + x · (k_j - k̄)) v_j`. The weights sum to one and may
    be negative; with a large λ they are those of softmax attention. The published form, with centred keys and
    a quotient, is equal and worse conditioned.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape.
        v: values, same shape.
        ridge: λ, above 0: a number, `[heads]` or `[B, H, W, heads]`.
        scale: multiplies q·k in the softmax; `d ** -0.5` by default.
        causal: whether a pixel sees those before it (row by row) and itself alone.
        iterations: of conjugate gradients, for heads wider than 32; 16 by default for a ridge of at least 1,
            else 32, and 32 where it is a tensor. Narrower heads are solved exactly.

    Returns:
        `[B, H, W, heads, d]`, contiguous.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or a ridge or iterations not above 0.
    """
    name = "local_linear_attention"
    check_qkv(name, q, k, v)
    if iterations is None:
        iterations = _EASY if not isinstance(ridge, Tensor) and ridge >= 1 else _HARD
    if iterations < 1:
        raise ValueError(f"{name}: iterations must be at least 1, got {iterations}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return LOCAL_LINEAR_ATTENTION(q, k, v, _ridge_of(name, ridge, q), scale, causal, iterations)


@leaf
def parallax_attention(
    q: Tensor, r: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False
) -> Tensor:
    """Softmax attention tilted by a learned slope: `Σ_j p_j (1 - r · (k_j - k̄)) v_j`.

    `local_linear_attention` with a projection in place of the solution of a system, r = -x.

    Args:
        q: queries `[B, H, W, heads, d]`.
        r: slopes, same shape; their products with the keys are not scaled.
        k: keys, same shape.
        v: values, same shape.
        scale: multiplies q·k in the softmax; `d ** -0.5` by default.
        causal: whether a pixel sees those before it (row by row) and itself alone.

    Returns:
        `[B, H, W, heads, d]`, contiguous.

    Raises:
        ValueError: shapes, devices or dtypes do not fit.
    """
    name = "parallax_attention"
    check_qkv(name, q, k, v)
    check_qkv(name, q, r, r)
    return PARALLAX_ATTENTION(q, r, k, v, q.shape[-1] ** -0.5 if scale is None else scale, causal)


def _ridge_of(name: str, ridge: float | Tensor, q: Tensor) -> Tensor:
    """The ridge as `[1 | B, 1 | H, 1 | W, 1 | heads, 1]`."""
    if not isinstance(ridge, Tensor):
        if not ridge > 0:
            raise ValueError(f"{name}: ridge must be above 0, got {ridge}")
        wide = torch.promote_types(q.dtype, torch.float32)
        return torch.full((1, 1, 1, 1, 1), float(ridge), dtype=wide, device=q.device)
    if tuple(ridge.shape) not in ((q.shape[3],), tuple(q.shape[:4])):
        raise ValueError(
            f"{name}: ridge has shape {tuple(ridge.shape)}; needed is a number, {(q.shape[3],)} or "
            f"{tuple(q.shape[:4])}"
        )
    if ridge.device != q.device or not torch.is_floating_point(ridge):
        raise ValueError(f"{name}: ridge is {ridge.dtype} on {ridge.device}, q is {q.dtype} on {q.device}")
    return ridge.view(1, 1, 1, -1, 1) if ridge.dim() == 1 else ridge.unsqueeze(-1)
