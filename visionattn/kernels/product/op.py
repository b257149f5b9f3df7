"""The public product of features and a weight matrix."""

from __future__ import annotations

from torch import Tensor

from visionattn.kernels.checks import check_tensor
from visionattn.kernels.operator import leaf
from visionattn.kernels.product.library import PRODUCT


@leaf
def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """`torch.nn.functional.linear` by the faster library: oneDNN's in float32 with AVX-512, else PyTorch's.

    Compiled and exported programs, autocast, forward-mode derivatives, `vmap` and other dtypes have
    PyTorch's. So has a forced backend `"triton"`: there is no kernel of ours to compare with the vendors'.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]`.
        gelu: whether an exact GELU follows.

    Returns:
        `[..., out]`.

    Raises:
        ValueError: `use_backend("cpu")` where oneDNN cannot be used, with the reason.
        TypeError: x or weight is no tensor.
        RuntimeError: PyTorch's own, for shapes that do not fit.
    """
    check_tensor("product", "x", x, "[..., in]")
    check_tensor("product", "weight", weight, "[out, in]")
    return PRODUCT(x, weight, bias, gelu)
