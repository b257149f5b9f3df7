"""Linear and agent attention: the PyTorch paths against the formulas, derivatives, tracing, bad arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from visionattn.kernels import agent_attention, explain, linear_attention, use_backend

# Batch, height, width, heads, head dim: one pixel, a sequence, odd sizes, a head dim that no tile divides.
SHAPES = [(1, 1, 1, 1, 8), (2, 1, 17, 3, 16), (1, 7, 5, 2, 24), (2, 9, 8, 1, 60), (1, 14, 14, 4, 32)]
FORMS = [
    {"normalize": "none", "scale": 1.0},
    {"normalize": "sum"},
    {"normalize": "sum", "scale": 1.0, "floor": 6.0},
    {"normalize": "injective"},
]


def packed(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Positive q and k, any v: strided views of one packed projection, as networks have them."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.rand(*shape[:3], 3, *shape[3:], dtype=torch.float64, generator=generator).to(dtype)
    qkv[:, :, :, 2] -= 0.5
    return [x.detach().requires_grad_() for x in qkv.unbind(3)]


def agent_inputs(shape: tuple[int, ...], grid: tuple[int, int], biased: bool) -> dict[str, Tensor]:
    batch, height, width, heads, head_dim = shape
    generator = torch.Generator().manual_seed(1)
    count = grid[0] * grid[1]

    def random(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator).requires_grad_()

    inputs = {name: random(*shape) for name in ("q", "k", "v")}
    inputs["agents"] = random(batch, *grid, heads, head_dim)
    if biased:
        inputs["bias_in"] = random(heads, count, height * width)
        inputs["bias_out"] = random(heads, height * width, count)
    return inputs


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return list(torch.autograd.grad((out * weight).sum(), inputs))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_linear_equals_the_formula(shape, form):
    inputs = packed(shape)
    with use_backend("reference"):
        expected = linear_attention(*inputs, **form)
    out = linear_attention(*inputs, **form)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agents_equal_the_formula(shape, biased):
    inputs = agent_inputs(shape, (2, 3), biased)
    with use_backend("reference"):
        expected = agent_attention(**inputs)
    out = agent_attention(**inputs)
    leaves = list(inputs.values())
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out, leaves), gradients(expected, leaves))
    with torch.no_grad():
        torch.testing.assert_close(agent_attention(**inputs), expected.detach())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_linear_derivatives(form):
    inputs = packed((1, 2, 3, 2, 4))
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, **form), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: linear_attention(*x, **form), inputs)


def test_agent_derivatives():
    inputs = agent_inputs((1, 2, 3, 2, 4), (1, 2), biased=True)
    leaves = tuple(inputs.values())

    def function(*values: Tensor) -> Tensor:
        return agent_attention(**dict(zip(inputs, values)))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_injective_weights_sum_to_one_and_ignore_a_shift_of_the_keys():
    q, k, v = packed((1, 6, 5, 2, 8))
    constant = torch.ones_like(v)
    torch.testing.assert_close(linear_attention(q, k, constant, normalize="injective"), constant)
    torch.testing.assert_close(
        linear_attention(q, k + 3, v, normalize="injective"), linear_attention(q, k, v, normalize="injective")
    )


def test_injective_is_the_published_form():
    q, k, v = packed((1, 6, 5, 2, 8))
    n, scale = 30, 8**-0.5
    by_head = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    q_, k_, v_ = by_head
    product = q_ @ (k_.transpose(-2, -1) @ v_) * (scale / n)
    rest = 1 - scale * q_ @ k_.mean(-2, keepdim=True).transpose(-2, -1)
    expected = (product + rest * v_.mean(-2, keepdim=True)).transpose(1, 2).unflatten(1, (6, 5))
    torch.testing.assert_close(linear_attention(q, k, v, normalize="injective"), expected)


def test_means_in_place_of_sums_are_a_scale():
    q, k, v = packed((1, 6, 5, 2, 8))
    weights = torch.einsum("byxhd,bvuhd->bhyxvu", q, k) / 30
    expected = torch.einsum("bhyxvu,bvuhd->byxhd", weights, v)
    expected = expected / (weights.sum((-2, -1)).permute(0, 2, 3, 1)[..., None] + 0.1)
    torch.testing.assert_close(linear_attention(q, k, v, scale=1 / 30, eps=0.1), expected)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_state(form, dtype):
    """Nothing is lost but the rounding of inputs and output, though sums grow beyond what half holds."""
    inputs = packed((1, 96, 96, 1, 16), dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_attention(*inputs, **form)
    exact = linear_attention(*(x.detach().double() for x in inputs), **form)
    assert out.dtype == dtype
    limit = torch.finfo(dtype).max
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact.clamp(-limit, limit), rtol=step, atol=step)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_linear_compiles_and_exports(form):
    inputs = [x.detach().float() for x in packed((1, 5, 6, 2, 8))]

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return linear_attention(q, k, v, **form)

    expected = Module()(*inputs)
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected)
    size = {1: torch.export.Dim("height", min=2, max=64)}
    exported = torch.export.export(Module(), tuple(inputs), dynamic_shapes=(size, size, size))
    larger = [x.detach().float() for x in packed((1, 11, 6, 2, 8))]
    torch.testing.assert_close(exported.module()(*larger), Module()(*larger))


def test_agents_compile_and_export():
    inputs = {name: x.detach().float() for name, x in agent_inputs((1, 5, 6, 2, 8), (2, 2), True).items()}

    class Module(torch.nn.Module):
        def forward(self, **inputs: Tensor) -> Tensor:
            return agent_attention(**inputs)

    expected = Module()(**inputs)
    torch.testing.assert_close(
        torch.compile(Module(), fullgraph=True, backend="aot_eager")(**inputs), expected
    )
    exported = torch.export.export(Module(), (), inputs)
    torch.testing.assert_close(exported.module()(**inputs), expected)


def test_vmap():
    stacked = [torch.stack([x, x + 1]).detach() for x in packed((1, 3, 4, 2, 8))]
    out = torch.vmap(lambda *x: linear_attention(*x, normalize="injective"))(*stacked)
    for i in range(2):
        torch.testing.assert_close(out[i], linear_attention(*(x[i] for x in stacked), normalize="injective"))


def test_explain():
    inputs = packed((1, 3, 4, 2, 8))
    assert explain(linear_attention, *inputs).backend == "torch"
    agents = inputs[0][:, :2, :2]
    assert explain(agent_attention, inputs[0], agents, *inputs[1:]).operator == "agent_attention"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalize": "softmax"}, "choose one of sum, injective, none"),
        ({"k": torch.zeros(1, 3, 4, 2, 9)}, "k has shape"),
        ({"v": torch.zeros(1, 3, 4, 2, 8).double()}, "v is torch.float64"),
    ],
)
def test_linear_refuses(change, message):
    arguments = dict(zip("qkv", (torch.zeros(1, 3, 4, 2, 8) for _ in range(3))))
    with pytest.raises(ValueError, match=message):
        linear_attention(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agents": torch.zeros(1, 4, 2, 8)}, r"agents must be \[1, rows, columns, 2, 8\]"),
        ({"agents": torch.zeros(2, 2, 2, 2, 8)}, "agents must be"),
        ({"agents": torch.zeros(1, 2, 2, 2, 8).double()}, "agents is torch.float64"),
        ({"bias_in": torch.zeros(2, 12, 4)}, r"needed is \(2, 4, 12\)"),
        ({"bias_out": torch.zeros(2, 4, 12)}, r"needed is \(2, 12, 4\)"),
        ({"bias_out": torch.zeros(2, 12, 4).long()}, "floating-point"),
    ],
)
def test_agents_refuse(change, message):
    arguments = {name: torch.zeros(1, 3, 4, 2, 8) for name in "qkv"}
    arguments["agents"] = torch.zeros(1, 2, 2, 2, 8)
    with pytest.raises(ValueError, match=message):
        agent_attention(**{**arguments, **change})
