"""Linear attention as an operator: implementations, gradients and FLOPs. Triton is imported when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from visionattn.kernels.linear import reference
from visionattn.kernels.linear.plain import attention as plain
from visionattn.kernels.operator import Definition, register


def _fused(*args: Any) -> Tensor:
    from visionattn.kernels.linear.fused.linear import forward

    return forward(*args)


def _fused_gradients(
    grads: Sequence[Tensor], outputs: Any, wanted: Any, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from visionattn.kernels.linear.fused.linear import backward

    return backward(grads[0], *args)


def _gradients(grads: Sequence[Tensor], outputs: Any, wanted: Any, *args: Any) -> tuple[Tensor, ...]:
    return plain.gradients(grads[0], *args)


def _flops(q: Sequence[int], products: int) -> int:
    """So many products of pixels and `[d, d]` matrices."""
    return 2 * products * q[0] * q[1] * q[2] * q[3] * q[4] ** 2


LINEAR_ATTENTION = register(
    Definition(
        name="linear_attention",
        schema="Tensor q, Tensor k, Tensor v, str normalize, float scale, float eps, float floor",
        implementations={
            "reference": reference.linear_attention,
            "torch": plain.linear_attention,
            "triton": _fused,
        },
        backwards={"torch": _gradients, "triton": _fused_gradients},
        flops=(
            # The sum over keys and values, and its product with the queries.
            lambda q, *args: _flops(q, 2),
            # The sum again, that of queries and gradients, and a product for each of three gradients.
            lambda q, *args: _flops(q, 5),
        ),
    )
)
