"""Routed attention as an operator: implementations, gradients and FLOPs. Triton is imported when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visionattn.kernels.operator import Definition, register
from visionattn.kernels.routed import reference
from visionattn.kernels.routed.call import Call
from visionattn.kernels.routed.plain import attention as plain


def _pack(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Any, ...]:
    return q, k, v, *call[:3], list(call.query_region), list(call.region), *call[5:]


def _unpack(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Call]:
    return q, k, v, Call(*rest)


def _fused(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    from visionattn.kernels.routed.fused.forward import forward

    return forward(q, k, v, call)


def _fused_gradients(
    grads: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    wanted: Sequence[bool],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
) -> tuple[Tensor | None, ...]:
    from visionattn.kernels.routed.fused.backward import backward

    grad_out = torch.zeros_like(outputs[0]) if grads[0] is None else grads[0]
    return backward(grad_out, grads[1], outputs, q, k, v, call, wanted[3])


def _flops(q: Sequence[int], indices: Sequence[int], region: Sequence[int], products: int) -> int:
    """So many products of queries and the places of their lists.

    A formula knows shapes alone: padding counts, and so do places of regions without a key.
    """
    batch, height, width, heads, dim = q
    return 2 * products * batch * height * width * heads * dim * indices[3] * region[0] * region[1]


ROUTED_ATTENTION = register(
    Definition(
        name="routed_attention",
        schema="Tensor q, Tensor k, Tensor v, Tensor indices, Tensor? counts, Tensor? bias,"
        " SymInt[] query_region, SymInt[] region, float scale, bool return_lse, bool is_full",
        implementations={
            "reference": reference.routed_attention,
            "torch": plain.routed_attention,
            "triton": _fused,
        },
        backwards={"torch": plain.gradients, "triton": _fused_gradients},
        flops=(
            lambda q, k, v, indices, counts, bias, query_region, region, *args: _flops(q, indices, region, 2),
            # Two kernels compute the logits and the gradients of the weights, then one and two products more.
            lambda q, k, v, indices, counts, bias, query_region, region, *args: _flops(q, indices, region, 7),
        ),
        constants=("indices", "counts"),
        pack=_pack,
        unpack=_unpack,
    )
)
