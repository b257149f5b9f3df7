"""Routed attention as an operator: implementations, gradients and FLOPs. Triton is imported when it runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionattn.kernels.operator import Definition, register
from visionattn.kernels.routed import reference
from visionattn.kernels.routed.plain import attention as plain


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    region: Sequence[int],
    scale: float,
    return_lse: bool,
    distinct: bool,
) -> tuple[Tensor, Tensor]:
    from visionattn.kernels.routed.fused.forward import forward

    return forward(q, k, v, indices, bias, region, scale)


def _fused_gradients(
    grads: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    wanted: Sequence[bool],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    region: Sequence[int],
    scale: float,
    return_lse: bool,
    distinct: bool,
) -> tuple[Tensor | None, ...]:
    from visionattn.kernels.routed.fused.backward import backward

    grad_out, grad_lse = grads
    grad_out = torch.zeros_like(outputs[0]) if grad_out is None else grad_out
    return backward(grad_out, grad_lse, outputs, q, k, v, indices, bias, region, scale, wanted[3])


def _flops(q: Sequence[int], indices: Sequence[int], region: Sequence[int], products: int) -> int:
    """So many products of queries and listed keys; padding counts."""
    batch, height, width, heads, dim = q
    return 2 * products * batch * height * width * heads * dim * indices[3] * region[0] * region[1]


ROUTED_ATTENTION = register(
    Definition(
        name="routed_attention",
        schema="Tensor q, Tensor k, Tensor v, Tensor indices, Tensor? bias, SymInt[] region, float scale,"
        " bool return_lse, bool distinct",
        implementations={
            "reference": reference.routed_attention,
            "torch": plain.routed_attention,
            "triton": _fused,
        },
        backwards={"torch": plain.gradients, "triton": _fused_gradients},
        flops=(
            lambda q, k, v, indices, bias, region, *args: _flops(q, indices, region, 2),
            # Two kernels compute the logits and the gradients of the weights, then one and two products more.
            lambda q, k, v, indices, bias, region, *args: _flops(q, indices, region, 7),
        ),
        constants=("indices",),
    )
)
