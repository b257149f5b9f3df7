"""The fused linear and agent attention: interpreted, what the compiled kernels take, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton_tools import TARGETS, Resources, compile_for, run_interpreted

from visionattn.kernels import agent_attention, linear_attention, use_backend
from visionattn.kernels.dense.fused import attention as triton_attention
from visionattn.kernels.dense.op import DENSE_ATTENTION
from visionattn.kernels.linear.fused import linear as triton_linear

NAMES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
MAPS = ("q", "k", "v", "a", "b", "x", "bias", "out", "grad_out", "grad_q", "grad_k", "grad_v", "grad_bias")
VECTORS = ("lse", "grad_lse", "delta", "products", "sums", "center", "base", "factor", "slope")
# What a launch of these kernels may lack.
ABSENT = {"sum": ("center",), "apply": ("center", "base")}
KERNELS = {
    "forward": triton_attention.forward_kernel,
    "query": triton_attention.query_kernel,
    "key": triton_attention.key_kernel,
    "bias": triton_attention.bias_kernel,
    "sum": triton_linear.sum_kernel,
    "apply": triton_linear.apply_kernel,
}


@pytest.mark.slow  # half a minute in the interpreter
def test_interpreted() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_triton.py"))


def _types(numbers: Any) -> Any:
    """The types of the numbers of a record."""
    if isinstance(numbers, tuple):
        parts = tuple(map(_types, numbers))
        return type(numbers)(*parts) if hasattr(numbers, "_fields") else parts
    return "i32"


def compiled(kernel: str, target: str, dtype: torch.dtype, dim: int, rows: int = 64) -> Resources:
    hip = target == "gfx942"
    x = torch.empty(1, rows, 1, dim, dtype=dtype)
    if kernel in ABSENT:
        options = {**triton_linear.launch_options(x, kernel), **dict.fromkeys(ABSENT[kernel])}  # type: ignore[arg-type]
        numbers = triton_linear.geometry(x, x)
    else:
        options = triton_attention.launch_options(x, hip=hip)
        numbers = triton_attention.geometry(x, x, None)
    types = {**dict.fromkeys(MAPS, NAMES[dtype]), **dict.fromkeys(VECTORS, "*fp32"), "g": _types(numbers)}
    types |= dict.fromkeys(("scale", "eps", "floor"), "fp32")
    names = [name for name in KERNELS[kernel].arg_names if name not in options]
    return compile_for(target, KERNELS[kernel], {n: types.get(n, "i32") for n in names}, options)


# Most registers of a thread: on NVIDIA 255 is all there are, 168 lets three programs of 128 threads share a
# processor; gfx942 counts vector and accumulation registers together, of which there are 512.
LIMITS = {
    "forward": {"sm_80": 128, "sm_90": 128, "gfx942": 512},
    "query": {"sm_80": 168, "sm_90": 128, "gfx942": 512},
    "key": {"sm_80": 255, "sm_90": 168, "gfx942": 512},
    "bias": {"sm_80": 168, "sm_90": 128, "gfx942": 512},
    "sum": {"sm_80": 128, "sm_90": 128, "gfx942": 256},
    "apply": {"sm_80": 128, "sm_90": 128, "gfx942": 256},
}


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_compiles_into_registers(kernel: str, target: str) -> None:
    taken = compiled(kernel, target, torch.float16, 32)
    assert taken.registers <= LIMITS[kernel][target]
    assert taken.spilled == 0
    assert taken.shared <= TARGETS[target][3] // 2
    # Products of 32 rows, as the sums of heads of width 32, are too small for warp groups.
    assert taken.wgmma == (target == "sm_90" and kernel != "sum")


@pytest.mark.slow  # two minutes of compilation
@pytest.mark.parametrize("rows", [9, 64])
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        (torch.bfloat16, 16),
        (torch.bfloat16, 64),
        (torch.bfloat16, 128),
        (torch.bfloat16, 256),
        (torch.float32, 32),
        (torch.float32, 256),
    ],
    ids=str,
)
@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_other_widths(kernel: str, target: str, dtype: torch.dtype, dim: int, rows: int) -> None:
    if kernel not in ABSENT and DENSE_ATTENTION.refusals["triton"](torch.empty(1, rows, 1, dim, dtype=dtype)):
        pytest.skip("is refused")
    taken = compiled(kernel, target, dtype, dim, rows)
    assert taken.spilled <= 32
    assert taken.shared <= TARGETS[target][3]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["sum", "injective", "none", "agent"])
def test_on_a_gpu(kind: str, dtype: torch.dtype) -> None:
    """Real sizes against the formula in float64, by PyTorch; twenty backward passes give the same bits."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    packed = random(4, 56, 56, 3, 4, 32)
    q, k, v = packed.unbind(3)
    function: Callable[..., Tensor]
    if kind == "agent":
        inputs = [q, random(4, 7, 7, 4, 32), k, v]
        inputs += [random(4, 49, 3136, dtype=torch.float32), random(4, 3136, 49, dtype=torch.float32)]

        def function(*x: Tensor) -> Tensor:
            return agent_attention(*x[:4], bias_in=x[4], bias_out=x[5])
    else:
        inputs = [q.relu(), k.relu(), v] if kind == "sum" else [q, k, v]

        def function(*x: Tensor) -> Tensor:
            return linear_attention(*x, normalize=kind, floor=100.0)  # type: ignore[arg-type]

    def gradients(leaves: list[Tensor], backend: str) -> list[Tensor]:
        with use_backend(backend):
            out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    grad = random(4, 56, 56, 4, 32)
    exact = gradients([x.detach().double().requires_grad_() for x in inputs], "torch")
    leaves = [x.detach().requires_grad_() for x in inputs]
    first = gradients(leaves, "triton")
    bound = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for ours, theirs in zip(first, exact):
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()
    for _ in range(20):
        for once, again in zip(first, gradients(leaves, "triton")):
            assert torch.equal(once, again)
