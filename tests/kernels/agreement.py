"""Comparison of the implementations of an operator: values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from visionattn.kernels import use_backend

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


def packed_qkv(
    batch: int, height: int, width: int, heads: int, dim: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Strided views of one projection, as networks pass them."""
    q, k, v = torch.randn(batch, height, width, 3, heads, dim, dtype=dtype).unbind(3)
    return q, k, v


def values_and_gradients(
    function: Function, inputs: Sequence[Tensor], backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients for `inputs` of a loss that weighs every finite output differently."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    with use_backend(backend):
        result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (out * torch.randn(out.shape, generator=generator, dtype=out.dtype))[out.isfinite()].sum()
        for out in outputs
    )
    return outputs, list(torch.autograd.grad(loss, leaves))


def assert_implementations_agree(
    function: Function, inputs: Sequence[Tensor], backend: str = "torch"
) -> None:
    """`backend` against the reference: recording gradients, and not recording them."""
    expected, expected_gradients = values_and_gradients(function, inputs, "reference")
    outputs, gradients = values_and_gradients(function, inputs, backend)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    with use_backend(backend), torch.inference_mode():
        result = function(*inputs)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    torch.testing.assert_close(outputs, expected)
    assert all(out.is_contiguous() for out in outputs)
