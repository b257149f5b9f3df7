"""The public linear and agent attention functions: argument checks and the choice of the implementation.

All tensors are heads-last `[B, H, W, heads, head_dim]` and may be strided views of a packed projection. The
place of a pixel matters through a bias only, so a sequence of tokens is a map of height 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from torch import Tensor

from visionattn.kernels.checks import check_dense_bias, check_qkv, check_tensor
from visionattn.kernels.dense.library import DENSE_ATTENTION
from visionattn.kernels.grouped import grouped_heads
from visionattn.kernels.linear.library import LINEAR_ATTENTION
from visionattn.kernels.operator import leaf

Normalize = Literal["sum", "injective", "none"]
_NORMALIZATIONS = get_args(Normalize)

# The same operator under another name, so that errors and `explain` call it as the caller does.
AGENT_ATTENTION = replace(DENSE_ATTENTION, name="agent_attention")


@leaf
@grouped_heads()
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalize: Normalize = "sum",
    scale: float | None = None,
    eps: float | None = None,
    floor: float | None = None,
) -> Tensor:
    """Attention with weights that are products instead of exponentials; O(H W d²) per head.

    With `w_ij = scale * q_i·k_j` over all N pixels j, the weight of value j for query i is

    - `"sum"`: `w_ij / max(Σ_j w_ij + eps, floor)`, the kernel form (https://arxiv.org/abs/2006.16236);
    - `"injective"`: `(1 + w_ij - mean_j w_ij) / N`, which sums to one without a division and may be negative
      (InLine, https://arxiv.org/abs/2412.06590); computed from centred keys, which is exact and better
      conditioned than the published subtraction;
    - `"none"`: `w_ij`.

    A feature map is applied to q and k by the caller. Sums run in float32 for half-precision inputs, under
    autocast too.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape but for the number of heads.
        v: values, as the keys.
        normalize: the normalisation above.
        scale: multiplies q·k; `d ** -0.5` by default. With `"sum"` it matters only against `eps` and `floor`;
            `1 / (H * W)` gives the form with means in place of sums.
        eps: added to the denominator of `"sum"`; 1e-6 by default.
        floor: smallest denominator of `"sum"`; none by default.

    Returns:
        `[B, H, W, heads, d]`, contiguous.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an unknown normalisation.
    """
    check_qkv("linear_attention", q, k, v)
    if normalize not in _NORMALIZATIONS:
        raise ValueError(f"normalize={normalize!r} is unknown; choose one of {', '.join(_NORMALIZATIONS)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # A number in the signature would be an input of a program compiled for all sizes: no operator takes such
    # an input, and the program would be made twice.
    eps = 1e-6 if eps is None else eps
    floor = float("-inf") if floor is None else floor
    return LINEAR_ATTENTION(q, k, v, normalize, scale, eps, floor).contiguous()


@leaf
def agent_attention(
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias_in: Tensor | None = None,
    bias_out: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention through a few agents (https://arxiv.org/abs/2312.08874); O(H W n d) per head.

    `V_A = softmax(scale A Kᵀ + bias_in) V`, then `softmax(scale Q Aᵀ + bias_out) V_A`: dense attention twice.

    Args:
        q: queries `[B, H, W, heads, d]`.
        agents: `[B, rows, columns, heads, d]`, commonly the queries pooled to n = rows * columns tokens.
        k: keys, as q.
        v: values, as q.
        bias_in: added to the logits of the agents over the pixels, `[heads, n, H * W]`, with gradient.
        bias_out: added to the logits of the pixels over the agents, `[heads, H * W, n]`, with gradient;
            fastest as a transposed view of `[heads, n, H * W]`.
        scale: multiplies the products, not the biases; `d ** -0.5` by default.

    Returns:
        `[B, H, W, heads, d]`, contiguous.

    Raises:
        ValueError: shapes, devices or dtypes do not fit.
    """
    height, width = check_qkv("agent_attention", q, k, v)
    batch, _, _, heads, head_dim = q.shape
    check_tensor("agent_attention", "agents", agents, "[B, rows, columns, heads, head_dim]")
    if agents.dim() != 5 or (agents.shape[0], *agents.shape[3:]) != (batch, heads, head_dim):
        raise ValueError(
            f"agent_attention: agents must be [{batch}, rows, columns, {heads}, {head_dim}], "
            f"got shape {tuple(agents.shape)}"
        )
    if agents.device != q.device or agents.dtype != q.dtype:
        raise ValueError(
            f"agent_attention: agents is {agents.dtype} on {agents.device}, q is {q.dtype} on {q.device}"
        )
    count = agents.shape[1] * agents.shape[2]
    for name, bias, shape in (
        ("bias_in", bias_in, (heads, count, height * width)),
        ("bias_out", bias_out, (heads, height * width, count)),
    ):
        if bias is not None:
            check_dense_bias("agent_attention", name, bias, shape, q)
    scale = head_dim**-0.5 if scale is None else scale
    gathered, _ = AGENT_ATTENTION(agents, k, v, bias_in, scale, False)
    return AGENT_ATTENTION(q, agents, gathered, bias_out, scale, False)[0].contiguous()
