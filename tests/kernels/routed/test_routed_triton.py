"""The fused routed attention without a GPU: interpreted, and what its compiled kernels take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton_tools import TARGETS, Resources, compile_for, run_interpreted

from visionattn.kernels.routed.fused import backward as triton_backward
from visionattn.kernels.routed.fused import bias as triton_bias
from visionattn.kernels.routed.fused import forward as triton_forward
from visionattn.kernels.routed.fused.geometry import BiasStrides, Regions, Sets
from visionattn.kernels.triton_rows import Strides, tile_options

KERNELS = {
    "bias": triton_bias.bias_kernel,
    "forward": triton_forward.forward_kernel,
    "query": triton_backward.query_kernel,
    "key": triton_backward.key_kernel,
}
NAMES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def test_interpreted() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_triton.py"))


def compiled(
    kernel: str,
    target: str,
    dtype: torch.dtype,
    dim: int,
    side: int = 8,
    has_bias: bool = True,
    lists: str = "full",
) -> Resources:
    """Compile a kernel; `lists` may be `"padded"` or `"counted"` (padded, and regions with counts)."""
    maps = ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")
    types: dict[str, Any] = dict.fromkeys(maps, NAMES[dtype])
    types |= dict.fromkeys(("lists", "starts", "listing", "ends", "counts", "list_counts"), "*i32")
    types |= dict.fromkeys(("lse", "grad_lse", "delta"), "*fp32")
    types |= {"listed": "*i8", "bias": "*fp32", "grad_bias": "*fp32", "scale": "fp32", "batch": "i32"}
    records = {"strides": Strides, "strides_k": Strides, "sets": Sets, "bias_strides": BiasStrides}
    records |= dict.fromkeys(("query_regions", "key_regions"), Regions)
    types |= {name: record(*["i32"] * len(record._fields)) for name, record in records.items()}
    q = torch.empty(1, side, side, 1, dim, dtype=dtype)
    if kernel == "bias":
        options = triton_bias.bias_launch_options(torch.empty(1, 56, 56, 1, dim, dtype=dtype), relative=True)
    else:
        options = tile_options(q, side * side, has_bias, kernel != "forward", hip=target == "gfx942")
    options |= {} if has_bias else {"bias": None}
    options |= {} if lists == "counted" else {"counts": None, "list_counts": None}
    options |= {} if lists != "full" else {"ends": None}
    names = [name for name in KERNELS[kernel].arg_names if name not in options]
    return compile_for(target, KERNELS[kernel], {name: types[name] for name in names}, options)


# Most registers of a thread: on NVIDIA 255 is all there are, 128 lets four programs of 128 threads share a
# processor; gfx942 counts vector and accumulation registers together, of which there are 512.
LIMITS = {
    "bias": {"sm_80": 255, "sm_90": 255, "gfx942": 512},
    "forward": {"sm_80": 168, "sm_90": 128, "gfx942": 512},
    "query": {"sm_80": 168, "sm_90": 128, "gfx942": 512},
    "key": {"sm_80": 255, "sm_90": 255, "gfx942": 512},
}


# Counts are read place by place beside the lists.
COUNTED = 192


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize(
    ("kernel", "has_bias", "lists"),
    [
        ("bias", True, "full"),
        ("bias", True, "counted"),
        *((kernel, has, "full") for kernel in ("forward", "query", "key") for has in (False, True)),
        *(
            (kernel, False, lists)
            for kernel in ("forward", "query", "key")
            for lists in ("padded", "counted")
        ),
    ],
)
def test_compiles_into_registers(kernel: str, has_bias: bool, lists: str, target: str) -> None:
    taken = compiled(kernel, target, torch.float16, 32, has_bias=has_bias, lists=lists)
    most = LIMITS[kernel][target]
    if target != "gfx942":
        # Pairs of a bias are read one by one and held beside the logits.
        most = 255 if has_bias else max(most, COUNTED) if lists == "counted" else most
    assert taken.registers <= most
    assert taken.spilled == 0
    assert taken.shared <= TARGETS[target][3] // 2
    assert taken.wgmma == (target == "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("side", [2, 8])
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        (torch.bfloat16, 16),
        (torch.bfloat16, 64),
        (torch.bfloat16, 128),
        (torch.bfloat16, 256),
        (torch.float32, 32),
    ],
    ids=str,
)
@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_other_widths(kernel: str, target: str, dtype: torch.dtype, dim: int, side: int) -> None:
    taken = compiled(kernel, target, dtype, dim, side)
    assert taken.spilled <= 32
    assert taken.shared <= TARGETS[target][3]
