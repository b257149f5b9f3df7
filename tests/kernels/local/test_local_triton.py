"""The fused local attention without a GPU: interpreted, and what its compiled kernels take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton_tools import TARGETS, Resources, compile_for, run_interpreted

from visionattn.kernels.local.fused import backward as triton_backward
from visionattn.kernels.local.fused import bias as triton_bias
from visionattn.kernels.local.fused import forward as triton_forward
from visionattn.kernels.local.fused import neighborhood as triton_neighborhood
from visionattn.kernels.local.fused.geometry import choose_tiling, geometry
from visionattn.kernels.local.pattern import Pattern, neighborhood_axis, overlapping_axis, window_axis

INTERPRETED = Path(__file__).with_name("interpreted_local.py")
KERNELS = {
    "forward": triton_forward.forward_kernel,
    "query": triton_backward.query_kernel,
    "key": triton_backward.key_kernel,
    "window": triton_backward.window_kernel,
    "bias": triton_bias.bias_kernel,
    "scores": triton_neighborhood.scores_kernel,
    "aggregate": triton_neighborhood.aggregate_kernel,
    "distribute": triton_neighborhood.distribute_kernel,
}
HALVES = ("scores", "aggregate", "distribute")
NAMES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
NEIGHBORHOOD = Pattern(*(neighborhood_axis(56, 7, 1, 1, False),) * 2)
WINDOWS = Pattern(*(window_axis(56, 7, 3),) * 2)
LARGE = Pattern(*(neighborhood_axis(256, 80, 1, 1, False),) * 2)
STRIDED = Pattern(*(neighborhood_axis(256, 80, 16, 1, False),) * 2)
OVERLAPPING = Pattern(*(overlapping_axis(64, 16, 4, "zero"),) * 2)


@pytest.mark.parametrize("tests", ["equals_the_formula", "not equals_the_formula"])
def test_interpreted(tests: str) -> None:
    run_interpreted(INTERPRETED, "-k", tests)


@pytest.mark.slow  # a quarter of an hour in the interpreter: 180 cases and 500 random patterns
def test_interpreted_at_length() -> None:
    run_interpreted(INTERPRETED, "-m", "slow")


def _types(numbers: Any) -> Any:
    """The types of the numbers of a record; words and truths are constants."""
    if isinstance(numbers, tuple):
        parts = map(_types, numbers)
        return type(numbers)(*parts) if hasattr(numbers, "_fields") else tuple(parts)
    return "i32" if isinstance(numbers, int) else numbers


def compiled(
    kernel: str, target: str, pattern: Pattern, dtype: torch.dtype, dim: int, has_bias: bool = True
) -> tuple[Resources, dict[str, Any]]:
    """What a kernel takes with the options that it is launched with, and these."""
    function, hip = KERNELS[kernel], target == "gfx942"
    q = torch.empty(1, pattern.y.length, pattern.x.length, 2, dim, dtype=dtype, device="meta")
    bias = q.new_empty(2, *pattern.table_shape) if has_bias else None
    if kernel in ("window", "bias"):
        pairs = triton_bias.pair_tiling(q, bias, pattern, has_bias, hip)
        tiles, options = pairs.tiles, dict(pairs.options)
        if kernel == "bias":
            options["FORM"] = options["FORM"]._replace(mask="pairs")
    else:
        owner = "key" if kernel in ("key", "distribute") else "query"
        most = triton_neighborhood.MOST_OTHERS if kernel in HALVES else 64
        tiles, options = choose_tiling(q, bias, pattern, owner, hip=hip, most_others=most)
    options |= {} if has_bias else {"bias": None, "partial": None}
    numbers = geometry(q, bias, pattern, tiles)
    types = dict.fromkeys(
        ("q", "k", "v", "bias", "out", "grad_out", "grad_q", "grad_k", "grad_v", "weights"), NAMES[dtype]
    )
    types |= dict.fromkeys(("lse", "grad_lse", "delta", "partial"), "*fp32")
    types |= {"scale": "fp32", "g": _types(numbers), "share": _types(triton_bias.Share((0, 0), (1, 1), 1, 1))}
    names = [name for name in function.arg_names if name not in options]
    return compile_for(target, function, {name: types.get(name, "i32") for name in names}, options), options


# Most registers of a thread: on NVIDIA 255 is all there are, 168 lets three programs of 128 threads share a
# processor and 128 four; gfx942 counts vector and accumulation registers together, of which there are 512.
LIMITS = {
    "forward": {"sm_80": 168, "sm_90": 128, "gfx942": 256},
    "query": {"sm_80": 168, "sm_90": 128, "gfx942": 256},
    "key": {"sm_80": 255, "sm_90": 168, "gfx942": 512},
    "bias": {"sm_80": 168, "sm_90": 168, "gfx942": 256},
    "window": {"sm_80": 255, "sm_90": 255, "gfx942": 512},
    "scores": {"sm_80": 168, "sm_90": 168, "gfx942": 256},
    "aggregate": {"sm_80": 128, "sm_90": 128, "gfx942": 256},
    "distribute": {"sm_80": 128, "sm_90": 128, "gfx942": 256},
}


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_compiles_into_registers(kernel: str, target: str) -> None:
    pattern = WINDOWS if kernel == "window" else NEIGHBORHOOD
    taken, options = compiled(kernel, target, pattern, torch.bfloat16, 32, kernel not in HALVES)
    assert options["FORM"].own == 64
    assert taken.registers <= LIMITS[kernel][target]
    assert taken.spilled == 0
    assert taken.shared <= TARGETS[target][3] // 2
    assert taken.wgmma == (target == "sm_90")


@pytest.mark.slow  # two minutes of compilation
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        (torch.float16, 16),
        (torch.bfloat16, 30),
        (torch.bfloat16, 64),
        (torch.bfloat16, 128),
        (torch.bfloat16, 256),
        (torch.float32, 32),
        (torch.float32, 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_other_widths(kernel: str, target: str, dtype: torch.dtype, dim: int, has_bias: bool) -> None:
    if (kernel == "bias" and not has_bias) or (kernel in HALVES and has_bias):
        return
    pattern = WINDOWS if kernel == "window" else NEIGHBORHOOD
    taken, _ = compiled(kernel, target, pattern, dtype, dim, has_bias)
    assert taken.spilled <= 32
    assert taken.shared <= TARGETS[target][3]


@pytest.mark.slow  # a minute of compilation
@pytest.mark.parametrize("pattern", [LARGE, STRIDED, OVERLAPPING], ids=["some", "none", "zero"])
@pytest.mark.parametrize("kernel", ["forward", "query", "key"])
def test_other_masks(kernel: str, pattern: Pattern) -> None:
    taken, options = compiled(kernel, "sm_90", pattern, torch.bfloat16, 64, has_bias=False)
    assert options["FORM"].mask == (
        "some" if pattern is LARGE or (pattern, kernel) == (OVERLAPPING, "key") else "none"
    )
    assert taken.spilled == 0
    assert taken.wgmma
