"""The fused linear and agent attention in Triton's interpreter; `test_linear_triton.py` runs this file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_linear import FORMS, SHAPES, agent_inputs, packed
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from visionattn.kernels import agent_attention, explain, linear_attention, use_backend
from visionattn.kernels.dense.fused import attention as triton_attention

Function = Callable[..., Tensor]
# A head of two tiles of products, rows beyond one tile.
WIDE = (1, 5, 15, 1, 80)


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps are split as large ones are."""
    monkeypatch.setattr(triton_attention, "_LEAST_ROWS", 40)


def outcome(function: Function, inputs: dict[str, Tensor], backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Output and the gradients of all inputs of a loss that weighs every number differently."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    with use_backend(backend):
        out = function(**leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    return [out, *torch.autograd.grad(out, list(leaves.values()), weight)]


def assert_equals_the_formula(
    function: Function, inputs: dict[str, Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = {name: x.detach().to(dtype).double() for name, x in inputs.items()}
    expected = outcome(function, rounded, "reference", torch.float64)
    empty = torch.empty

    def unwritten(*args: Any, **kwargs: Any) -> Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", unwritten)
        result = outcome(function, inputs, "triton", dtype)
    for ours, theirs in zip(result, expected):
        assert ours.dtype == dtype
        bound = 2e-6 if dtype == torch.float32 else 2e-3
        # Some gradients of a single pixel are zero.
        assert (ours.double() - theirs).norm() <= bound * max(theirs.norm(), 0.1)


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in (*SHAPES, WIDE)), (SHAPES[4], torch.float16)],
    ids=str,
)
def test_linear_equals_the_formula(shape, dtype, form, monkeypatch):
    inputs = dict(zip("qkv", packed(shape)))
    assert_equals_the_formula(lambda **x: linear_attention(**x, **form), inputs, dtype, monkeypatch)


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("shape", "grid", "dtype"),
    [
        (SHAPES[1], (1, 2), torch.float32),
        (SHAPES[2], (2, 3), torch.float32),
        (SHAPES[3], (7, 7), torch.float32),
        (SHAPES[4], (3, 3), torch.float32),
        (WIDE, (2, 2), torch.float32),
        (SHAPES[4], (3, 3), torch.float16),
    ],
    ids=str,
)
def test_agents_equal_the_formula(shape, grid, biased, dtype, monkeypatch):
    inputs = agent_inputs(shape, grid, biased)
    assert_equals_the_formula(agent_attention, inputs, dtype, monkeypatch)


def test_a_bias_may_be_strided_and_hide_pixels(monkeypatch):
    inputs = {name: x.detach().float() for name, x in agent_inputs(SHAPES[4], (3, 3), True).items()}
    inputs["bias_in"][:, 1, :150] = float("-inf")
    bias_out = inputs.pop("bias_out")[..., :1]

    def function(**x: Tensor) -> Tensor:
        # Neither its own layout nor one that can be kept: the same bias for all agents.
        return agent_attention(**x, bias_out=bias_out.to(x["q"].dtype).expand(-1, -1, 9))

    assert_equals_the_formula(function, inputs, torch.float32, monkeypatch)


def test_strided_gradients_and_strided_biases():
    inputs = {name: x.detach().float() for name, x in agent_inputs((2, 3, 4, 2, 8), (2, 2), True).items()}
    turned = inputs["bias_out"].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    gradients = []
    for backend in ("triton", "torch"):
        with use_backend(backend):
            loss = agent_attention(**{**inputs, "bias_out": turned}).sum()
        gradients += torch.autograd.grad(loss, turned)
    assert gradients[0].stride() == turned.stride()
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def operators() -> list[tuple[Any, tuple[Any, ...]]]:
    """The operators with arguments; views of a packed projection, and contiguous ones."""
    q, k, v = (x.detach().float().requires_grad_() for x in packed((2, 3, 4, 2, 8)))
    dense = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    bias = torch.randn(2, 6, 12, requires_grad=True)
    agents = torch.randn(2, 2, 3, 2, 8, requires_grad=True)
    linear, attend = torch.ops.visionattn.linear_attention, torch.ops.visionattn.dense_attention
    numbers = (0.5, 1e-6, 6.0, "triton")
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (linear, (*qkv, form, *numbers)) for qkv in ((q, k, v), dense) for form in ("sum", "injective")
    ]
    calls += [(attend, (agents, k, v, b, 0.5, True, "triton")) for b in (None, bias)]
    grad = torch.ones(1).expand(2, 3, 4, 2, 8)
    arguments = (grad, torch.zeros(2, 3, 4, 2, 8), q, k, v, "sum", *numbers, [True, False, True])
    calls += [(torch.ops.visionattn.linear_attention_backward, arguments)]
    out, lse = (x.detach() for x in attend(agents, k, v, bias, 0.5, True, "triton"))
    kept = torch.ones(1).expand(out.shape), torch.ones(1).expand(lse.shape), out, lse
    for b in (None, bias):
        arguments = (*kept, agents, k, v, b, 0.5, True, "triton", [True, True, True, b is not None])
        calls += [(torch.ops.visionattn.dense_attention_backward, arguments)]
    return calls


@pytest.mark.parametrize("call", range(9))
def test_registered_with_pytorch(call):
    operator, arguments = operators()[call]
    torch.library.opcheck(operator, arguments)


def linear_case(form: dict[str, Any]) -> tuple[Function, list[Tensor]]:
    inputs = [x.detach().float().requires_grad_() for x in packed((2, 3, 4, 2, 8))]
    return lambda *x: linear_attention(*x, **form), inputs


def agent_case() -> tuple[Function, list[Tensor]]:
    inputs = agent_inputs((2, 3, 4, 2, 8), (2, 2), True)
    leaves = [x.detach().float().requires_grad_() for x in inputs.values()]
    return lambda *x: agent_attention(**dict(zip(inputs, x))), leaves


CASES = [*(lambda form=form: linear_case(form) for form in FORMS[1:]), agent_case]


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_are_those_of_the_pytorch_path(case):
    function, leaves = case()

    def second(backend: str) -> tuple[Tensor, ...]:
        with use_backend(backend):
            out = function(*leaves)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    torch.testing.assert_close(second("triton"), second("torch"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_vmap_equals_a_loop(case):
    function, leaves = case()
    stacks = [torch.stack([x.detach(), 2 * x.detach()], 1).requires_grad_() for x in leaves]
    with use_backend("triton"):
        together = torch.func.vmap(function, 1, 1)(*stacks)
        alone = torch.stack([function(*(x[:, i] for x in stacks)) for i in range(2)], 1)
    grad = torch.randn_like(alone)
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(
        torch.autograd.grad(together, stacks, grad), torch.autograd.grad(alone, stacks, grad)
    )


@pytest.mark.parametrize("kind", ["linear", "agent"])
def test_compiles_whole_with_dynamic_sizes(kind):
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kind == "linear":
            return linear_attention(q, k, v, normalize="injective")
        return agent_attention(q, q[:, :2, :2], k, v)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    # Sizes of the first call that are equal, also to the 3, 2 and 8 below, would count as always equal.
    for batch, height, width in ((4, 5, 6), (5, 6, 7), (4, 3, 6)):
        qkv = torch.randn(batch, height, width, 3, 2, 8, requires_grad=True)
        results = []
        for attend in (function, compiled):
            with use_backend("triton"):
                out = attend(*qkv.unbind(3))
            results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
        torch.testing.assert_close(results[1], results[0])
    assert counter.frame_count == 1


def test_exports():
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return agent_attention(q, q[:, :2, :2], k, linear_attention(q, k, v))

    inputs = tuple(x.detach().float() for x in packed((1, 5, 6, 2, 8)))
    size = {1: torch.export.Dim("height", min=2, max=64)}
    with use_backend("triton"):
        program = torch.export.export(Attention(), inputs, dynamic_shapes=(size, size, size))
        larger = tuple(x.detach().float() for x in packed((1, 11, 6, 2, 8)))
        torch.testing.assert_close(program.module()(*larger), Attention()(*larger))


def test_flops_are_counted():
    q, k, v = (x.detach().float().requires_grad_() for x in packed((2, 3, 4, 2, 8)))
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        linear_attention(q, k, v).sum().backward()
    assert counter.get_total_flops() == 2 * (2 + 5) * (2 * 12 * 2) * 8 * 8
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        agent_attention(q, q[:, :1], k, v).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * (2 + 7) * (2 * 2 * 12 * 4) * 8


def test_refusals_say_why():
    q, k, v = (x.detach().float() for x in packed((1, 3, 4, 2, 8)))
    assert explain(linear_attention, q, k, v).backend == "triton"
    assert explain(agent_attention, q, q, k, v).backend == "triton"
    assert "bfloat16" in explain(linear_attention, *(x.bfloat16() for x in (q, k, v))).reason
    with use_backend("triton"), pytest.raises(ValueError, match="not in torch"):
        linear_attention(q.double(), k.double(), v.double())
