"""The fused local attention in Triton's interpreter; `test_local_triton.py` runs it in its own process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    BIASES,
    CASES,
    DIMS,
    Case,
    assert_close,
    assert_equals_reference,
    make,
    name_of,
    pattern_of,
    patterns,
    run,
    unwritten_is_nan,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode
from triton_tools import interpret_quickly

from visionattn.kernels import explain, neighborhood_attention, use_backend, window_attention
from visionattn.kernels.local.library import encode
from visionattn.kernels.local.op import LOCAL_ATTENTION
from visionattn.kernels.local.pattern import (
    Call,
    Pattern,
    grid_axis,
    neighborhood_axis,
    overlapping_axis,
    window_axis,
)
from visionattn.kernels.operator import refuses_fused

__all__ = ["unwritten_is_nan"]
interpret_quickly()
POINT = window_axis(1, 1)
TINY = Pattern(window_axis(3, 2, 1), window_axis(2, 2))
TINY_NEIGHBORHOOD = Pattern(neighborhood_axis(4, 3, 1, 1, False), neighborhood_axis(3, 2, 1, 1, True))


# A case takes the interpreter one to three seconds; every fourth stands for the rest in the default suite.
SLOW = pytest.mark.slow
ALL = [
    pytest.param(number, case, marks=[SLOW] if number % 4 else [], id=name_of(case))
    for number, case in enumerate(CASES)
]


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize(("number", "case"), ALL)
def test_equals_the_formula(number: int, case: Case) -> None:
    layout = "permuted" if number % 5 == 0 else "packed"
    bias, dim = BIASES[number % 3], DIMS[(number + number // len(DIMS)) % len(DIMS)]
    tensors = make(pattern_of(case), bias, dim, heads=1 + number % 2, layout=layout)
    assert_equals_reference("triton", pattern_of(case), tensors, 1e-6)


@pytest.mark.slow  # minutes: every case with the other two biases, and two images
@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("other", [1, 2])
@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=[name_of(case) for case in CASES])
def test_equals_the_formula_with_other_biases(number: int, case: Case, other: int) -> None:
    bias, dim = BIASES[(number + other) % 3], DIMS[(number + 3) % len(DIMS)]
    tensors = make(pattern_of(case), bias, dim, heads=1, batch=2)
    assert_equals_reference("triton", pattern_of(case), tensors, 1e-6)


@pytest.mark.parametrize("bias", ["none", "table"])
@pytest.mark.parametrize("pattern", [TINY, TINY_NEIGHBORHOOD], ids=["windows", "neighborhood"])
def test_half_precision(pattern: Pattern, bias: str) -> None:
    assert_equals_reference("triton", pattern, make(pattern, bias, 32, dtype=torch.float16), 1.5e-3)


def test_head_dim_256() -> None:
    assert_equals_reference("triton", TINY, make(TINY, "table", 256, heads=1), 1e-6)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("pattern", [TINY, TINY_NEIGHBORHOOD], ids=["windows", "neighborhood"])
def test_no_images(pattern: Pattern, bias: str) -> None:
    results = run("triton", pattern, make(pattern, bias, batch=0))
    expected = run("reference", pattern, make(pattern, bias, batch=0))
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (neighborhood_axis(5, 3, 1, 1, False), [1, 1, 2, 3, 3]),
        (neighborhood_axis(6, 4, 1, 1, False), [1.5, 1.5, 1.5, 2.5, 3.5, 3.5]),
        (neighborhood_axis(8, 4, 2, 1, False), [1.5, 1.5, 2.5, 2.5, 4.5, 4.5, 5.5, 5.5]),
        (neighborhood_axis(10, 4, 4, 1, False), [1.5] * 4 + [5.5] * 4 + [7.5] * 2),
        (neighborhood_axis(7, 3, 1, 2, False), [2, 3, 2, 3, 4, 3, 4]),
        (neighborhood_axis(6, 3, 1, 1, True), [0, 0.5, 1, 2, 3, 4]),
        (neighborhood_axis(8, 4, 2, 1, True), [0, 0.5, 1, 1.5, 3, 3.5, 5, 5.5]),
        (window_axis(12, 4, 2), [0.5] * 2 + [3.5] * 4 + [7.5] * 4 + [10.5] * 2),
        (grid_axis(8, 4), [3, 4] * 4),
        (overlapping_axis(8, 4, 1, "zero"), [10 / 6] * 4 + [25 / 6] * 4),
        (overlapping_axis(8, 4, 1, "mask"), [2] * 4 + [5] * 4),
        (overlapping_axis(8, 4, 1, "clamp"), [2.5] * 4 + [4.5] * 4),
    ],
    ids=str,
)
def test_table_of_the_specification(axis: Any, expected: list[float]) -> None:
    # With equal logits the output is the mean of what a query sees.
    mean = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(mean_of_keys(POINT, axis, torch.arange(axis.length)), mean[None])
    if axis.border != "zero":
        # Two axes make a product.
        v = 10 * torch.arange(axis.length).view(-1, 1) + torch.arange(axis.length)
        torch.testing.assert_close(mean_of_keys(axis, axis, v), 10 * mean[:, None] + mean)


def mean_of_keys(y: Any, x: Any, v: Tensor) -> Tensor:
    v = v.float().view(1, y.length, x.length, 1, 1)
    with use_backend("triton"):
        return LOCAL_ATTENTION(v * 0, v * 0, v, Call(Pattern(y, x), None, 1.0, False))[0].view(
            y.length, x.length
        )


@pytest.mark.parametrize("bias", ["none", "table", "dense"])
def test_equal_inputs_give_equal_bits(bias: str) -> None:
    tensors = make(TINY_NEIGHBORHOOD, bias, 16, batch=2)
    first, second = (run("triton", TINY_NEIGHBORHOOD, tensors) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("used", ["out", "lse"])
def test_gradients_of_one_output(used: str) -> None:
    tensors = make(TINY, "table")

    def gradients(backend: str) -> list[Tensor]:
        with use_backend(backend):
            out, lse = neighborhood_attention(*tensors[:3], 2, bias=tensors[3], return_lse=True)
        return list(torch.autograd.grad((out if used == "out" else lse).square().sum(), tensors[:2]))

    assert_close(gradients("triton"), gradients("torch"), 1e-6)


def test_second_derivatives_are_those_of_the_pytorch_path() -> None:
    tensors = make(TINY, "table", 4)

    def second(backend: str) -> list[Tensor]:
        with use_backend(backend):
            out, lse = neighborhood_attention(*tensors[:3], 2, bias=tensors[3], return_lse=True)
        loss = out.square().sum() + lse.square().sum()
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), tensors))

    assert_close(second("triton"), second("torch"), 1e-5)


@pytest.mark.parametrize("bias", ["none", "table", "dense"])
@pytest.mark.parametrize("layout", ["packed", "permuted"])
def test_registered_with_pytorch(bias: str, layout: str) -> None:
    *qkv, table = [*make(TINY, bias, 4, 1, layout=layout), None][:4]
    geometry = encode(TINY)
    operator = torch.ops.visionattn.local_attention.default
    torch.library.opcheck(operator, (*qkv, table, geometry, 0.5, True, "triton"))
    out, lse = operator(*qkv, table, geometry, 0.5, True, "triton")
    plain = [None if x is None else x.detach() for x in (*qkv, table, out, lse)]
    expanded = torch.ones(1).expand(out.shape)
    for grad_lse, adds in ((torch.randn_like(plain[5]), table is not None), (None, False)):
        wanted = [True, True, True, adds]
        args = (expanded, grad_lse, *plain[4:], *plain[:4], geometry, 0.5, True, "triton", wanted)
        torch.library.opcheck(torch.ops.visionattn.local_attention_backward.default, args)


def test_vmap_equals_a_loop() -> None:
    stacks = [torch.stack([x.detach(), 2 * x.detach()]).requires_grad_() for x in make(TINY, "table", 4)]

    def attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return neighborhood_attention(q, k, v, 2, bias=table)

    with use_backend("triton"):
        together = torch.func.vmap(attention)(*stacks)
        alone = torch.stack([attention(*sample) for sample in zip(*stacks, strict=True)])
    grad = torch.randn_like(alone)
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(
        torch.autograd.grad(together, stacks, grad), torch.autograd.grad(alone, stacks, grad)
    )


def test_compiles_whole_with_dynamic_sizes() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return neighborhood_attention(q, k, v, 2, return_lse=True)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    # Sizes that no other size equals: PyTorch takes equal sizes for the same symbol.
    for batch, height, width in ((2, 4, 5), (3, 6, 2)):
        q, k, v = torch.randn(batch, height, width, 3, 1, 8, requires_grad=True).unbind(3)
        results = []
        for function in (attend, compiled):
            with use_backend("triton"):
                out, lse = function(q, k, v)
                results.append([out, lse, *torch.autograd.grad(out.sum() + lse.square().sum(), (q, k, v))])
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1


def test_exports() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return window_attention(q, k, v, 2, shift=1)

    q, k, v = (x.detach() for x in make(TINY, batch=2))
    batch = {0: torch.export.Dim("batch", min=1)}
    with use_backend("triton"):
        program = torch.export.export(Attention(), (q, k, v), dynamic_shapes=(batch, batch, batch))
    q, k, v = (x.detach() for x in make(TINY, batch=3))
    torch.testing.assert_close(program.module()(q, k, v), Attention()(q, k, v))


@pytest.mark.parametrize("bias", ["none", "table"])
def test_flops_are_those_of_the_visible_pairs(bias: str) -> None:
    tensors = make(TINY_NEIGHBORHOOD, bias, 8)
    with FlopCounterMode(display=False) as counter:
        run("triton", TINY_NEIGHBORHOOD, tensors)
    assert counter.get_total_flops() == TINY_NEIGHBORHOOD.flops(heads=2, head_dim=8) // 2 * (2 + 5)


def test_choices_and_refusals_say_why() -> None:
    q, k, v = (x.detach() for x in make(TINY))
    choice = explain(neighborhood_attention, q, k, v, 2)
    assert (choice.backend, choice.reason) == ("triton", "fused kernel available")
    far = torch.empty_strided(q.shape, (1, 2**30, 1, 1, 1), device="meta")
    assert "2**31" in str(refuses_fused(far, far, far, Call(TINY, None, 1.0, False)))
    for dtype, reason in ((torch.float64, "not in torch.float64"), (torch.bfloat16, "nonsense in bfloat16")):
        with use_backend("triton"), pytest.raises(ValueError, match=reason):
            neighborhood_attention(q.to(dtype), k.to(dtype), v.to(dtype), 2)
    wide = torch.ones(1, 2, 2, 1, 257)
    with use_backend("triton"), pytest.raises(ValueError, match="head_dim 257 is above 256"):
        neighborhood_attention(wide, wide, wide, 2)


def check_random_pattern(pattern: Pattern, bias: str, dim: int) -> None:
    assert_equals_reference("triton", pattern, make(pattern, bias, dim, heads=1), 2e-6)


RANDOM = {
    "pattern": patterns(most_pixels=40, largest=5),
    "bias": st.sampled_from(BIASES),
    "dim": st.sampled_from(DIMS),
}
FUZZ = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@pytest.mark.usefixtures("unwritten_is_nan")
@settings(max_examples=8, **FUZZ)
@given(**RANDOM)
def test_random_patterns(pattern: Pattern, bias: str, dim: int) -> None:
    check_random_pattern(pattern, bias, dim)


@pytest.mark.slow  # ten minutes: 500 patterns in the interpreter
@pytest.mark.usefixtures("unwritten_is_nan")
@settings(max_examples=500, **FUZZ)
@given(**RANDOM)
def test_many_random_patterns(pattern: Pattern, bias: str, dim: int) -> None:
    check_random_pattern(pattern, bias, dim)
