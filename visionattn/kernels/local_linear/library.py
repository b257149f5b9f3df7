"""Local linear attention as operators of PyTorch: implementations, gradients and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from visionattn.kernels.local_linear import reference
from visionattn.kernels.local_linear.plain import attention as plain
from visionattn.kernels.operator import Definition, register


def _flops(products: int) -> Callable[..., int]:
    """So many products `[pixels, d] [d, pixels]` per head, of the half that is seen where it is causal."""

    def count(q: Sequence[int], *args: object) -> int:
        pairs = q[0] * q[3] * (q[1] * q[2]) ** 2
        return 2 * products * pairs * q[4]

    return count


LOCAL_LINEAR_ATTENTION = register(
    Definition(
        name="local_linear_attention",
        schema="Tensor q, Tensor k, Tensor v, Tensor ridge, float scale, bool causal, int iterations",
        implementations={
            "reference": reference.local_linear_attention,
            "torch": plain.local_linear_attention,
        },
        backwards={"torch": plain.local_linear_attention.backward},
        # Logits, mean, slopes and output; the matrices of the systems are d / 2 products more, as many as the
        # iterations of the other solver are, within a factor of two.
        flops=(_flops(4), _flops(14)),
        shared=("ridge",),
    )
)

PARALLAX_ATTENTION = register(
    Definition(
        name="parallax_attention",
        schema="Tensor q, Tensor r, Tensor k, Tensor v, float scale, bool causal",
        implementations={"reference": reference.parallax_attention, "torch": plain.parallax_attention},
        backwards={"torch": plain.parallax_attention.backward},
        flops=(_flops(4), _flops(12)),
    )
)
