"""Recurrent operators: published outputs and gradients, the PyTorch path against the formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import call_fixtures
import pytest
import torch
from agreement import assert_implementations_agree, values_and_gradients
from torch import Tensor

from visionattn.kernels import (
    additive_decay_attention,
    decay_attention,
    delta_attention,
    explain,
    linear_recurrence,
    selective_scan,
    use_backend,
)

# Batch, height, width, heads: one pixel, a sequence that no chunk divides, one column, no image at all.
SHAPES = [(1, 1, 1, 1), (2, 1, 71, 3), (1, 37, 1, 2), (1, 9, 8, 4), (2, 5, 7, 2), (0, 3, 4, 2)]
MIXED = ("row", "column-reversed", "row-reversed", "column")
DIM, WIDE, STATES = 6, 5, 3

Make = Callable[..., list[Tensor]]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def qkv(shape: tuple[int, ...]) -> list[Tensor]:
    return [random(*shape, DIM, seed=1), random(*shape, DIM, seed=2) / 2, random(*shape, WIDE, seed=3)]


def unit(k: Tensor) -> Tensor:
    return k / k.norm(dim=-1, keepdim=True)


def _scan(*tensors: Tensor, **options: Any) -> Tensor:
    x, delta, A, B, C, D, z, bias = tensors
    return selective_scan(x, delta, -A.exp(), B, C, D=D, z=z, delta_bias=bias, **options)


def _plain_scan(*tensors: Tensor, **options: Any) -> Tensor:
    x, delta, A, B, C = tensors
    return selective_scan(x, delta.exp(), -A.exp(), B, C, delta_softplus=False, **options)


def _scan_inputs(shape: tuple[int, ...]) -> list[Tensor]:
    heads = shape[3]
    x, delta, z = (random(*shape, DIM, seed=i) for i in range(3))
    A, B, C = random(heads, DIM, STATES), random(*shape, STATES, seed=4), random(*shape, STATES, seed=5)
    return [x, delta, A, B, C, random(heads, DIM, seed=6), z, random(heads, DIM, seed=7)]


def _decayed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function of a decay of at most 0."""
    return lambda *tensors, **options: function(*tensors[:-1], -tensors[-1].exp(), **options)


def _delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, **options: Any) -> Tensor:
    return delta_attention(q, unit(k), v, beta.sigmoid(), log_decay=-decay.exp(), **options)


CASES: dict[str, tuple[Callable[..., Tensor], Make]] = {
    "selective": (_scan, _scan_inputs),
    "selective, bare": (_plain_scan, lambda shape: _scan_inputs(shape)[:5]),
    "recurrence": (_decayed(linear_recurrence), lambda s: [random(*s, DIM), random(*s, DIM, seed=1)]),
    "recurrence, one decay": (_decayed(linear_recurrence), lambda s: [random(*s, DIM), random(s[3])]),
    "decay, constant": (_decayed(decay_attention), lambda s: [*qkv(s), random(s[3])]),
    "decay, scalar": (_decayed(decay_attention), lambda s: [*qkv(s), random(*s)]),
    "decay, vector": (_decayed(decay_attention), lambda s: [*qkv(s), random(*s, DIM)]),
    "decay, strong": (_decayed(decay_attention), lambda s: [*qkv(s), random(*s, DIM) + 3]),
    "additive": (lambda *x, **o: additive_decay_attention(*x, causal=True, **o), qkv),
    "additive, rising": (
        lambda *x, **o: additive_decay_attention(*x, causal=True, **o),
        lambda s: [x * factor for x, factor in zip(qkv(s), (1, 60, 1))],
    ),
    "delta, scalar": (_delta, lambda s: [*qkv(s), random(*s), random(*s, 1)]),
    "delta, vector": (_delta, lambda s: [*qkv(s), random(*s), random(*s, DIM)]),
    "delta, strong": (_delta, lambda s: [*qkv(s), random(*s), random(*s, DIM) + 3]),
}


def order_of(heads: int) -> tuple[str, ...]:
    return (MIXED * heads)[:heads]


@pytest.mark.parametrize("path", call_fixtures.fixtures("scan"), ids=lambda path: path.stem)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_published(path: Path, backend: str):
    call_fixtures.check(path, backend)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_plain_path_equals_the_formula(case, shape, restart):
    function, inputs = CASES[case]
    options = {"order": order_of(shape[3]), "restart": restart}
    assert_implementations_agree(lambda *x: function(*x, **options), inputs(shape))


@pytest.mark.parametrize("length", [300, 777])
def test_small_states_on_two_levels(length):
    inputs = _scan_inputs((1, 1, length, 2))
    assert_implementations_agree(lambda *x: _scan(*x, order=("row", "row-reversed")), inputs)
    assert_implementations_agree(_decayed(linear_recurrence), [random(1, 1, length, 2, 3), random(2)])


@pytest.mark.parametrize("order", MIXED)
def test_orders_are_those_of_turned_maps(order):
    """Going along columns is going along the rows of the transposed map; backwards, of the flipped one."""
    function, inputs = CASES["decay, scalar"]
    tensors = inputs((2, 5, 7, 1))
    turned = [x.transpose(1, 2) if order.startswith("column") else x for x in tensors]
    if order.endswith("reversed"):
        turned = [x.flip(1, 2) for x in turned]
    expected = function(*turned)
    expected = expected.flip(1, 2) if order.endswith("reversed") else expected
    expected = expected.transpose(1, 2) if order.startswith("column") else expected
    torch.testing.assert_close(function(*tensors, order=order), expected)


@pytest.mark.parametrize("case", CASES)
def test_restart_begins_anew_at_every_line(case):
    """Rows, and columns as rows of the transposed map, one by one."""
    function, inputs = CASES[case]
    tensors = inputs((2, 3, 4, 2))
    out = function(*tensors, order=("row", "column-reversed"), restart=True)
    is_map = [x.dim() >= 4 for x in tensors]
    for head, (order, turned) in enumerate((("row", False), ("row-reversed", True))):
        own = [x.transpose(1, 2) if turned and m else x for x, m in zip(tensors, is_map)]
        lines = [
            function(*(x[:, y : y + 1] if m else x for x, m in zip(own, is_map)), order=order)
            for y in range(own[0].shape[1])
        ]
        whole = torch.cat(lines, 1)
        torch.testing.assert_close(
            out[..., head, :], (whole.transpose(1, 2) if turned else whole)[..., head, :]
        )


@pytest.mark.parametrize("case", CASES)
def test_derivatives(case):
    function, inputs = CASES[case]
    leaves = [x.requires_grad_() for x in inputs((1, 2, 3, 2))]
    options = {"order": ("column", "row-reversed")}
    assert torch.autograd.gradcheck(lambda *x: function(*x, **options), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: function(*x, **options), leaves, fast_mode=True)


@pytest.mark.parametrize("case", CASES)
def test_compiles_and_maps(case):
    function, inputs = CASES[case]
    tensors = inputs((2, 3, 4, 2))
    expected = function(*tensors)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), expected)
    per_head = [i for i, x in enumerate(tensors) if x.shape[0] != 2 or x.dim() < 4]
    dims = tuple(None if i in per_head else 0 for i in range(len(tensors)))
    samples = [x if i in per_head else x.unsqueeze(1) for i, x in enumerate(tensors)]
    mapped = torch.vmap(function, dims)(*samples)
    torch.testing.assert_close(mapped.squeeze(1), expected)


@pytest.mark.parametrize("case", ["selective", "decay, vector", "additive", "delta, scalar", "recurrence"])
def test_exports(case):
    function, inputs = CASES[case]
    tensors = inputs((1, 3, 4, 2))

    class Net(torch.nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            return function(*x)

    program = torch.export.export(Net(), tuple(tensors))
    assert not any("visionattn" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*tensors), function(*tensors))


@pytest.mark.parametrize("case", CASES)
def test_half_precision_keeps_float32_states(case):
    """The only error is that of inputs and output; autocast changes nothing."""
    function, inputs = CASES[case]
    halves = [x.bfloat16() for x in inputs((1, 6, 9, 2))]
    with torch.autocast("cpu", torch.bfloat16):
        out = function(*halves)
    assert out.dtype == torch.bfloat16
    with use_backend("reference"):
        expected = function(*(x.float() for x in halves))
    error = (out.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    assert error < 0.02


def test_step_sizes_of_fifty_and_decays_of_a_thousand():
    """What overflows in sums of logarithms: values and gradients are finite, and those of the formula."""
    x, _, A, B, C, *_ = _scan_inputs((1, 1, 60, 1))
    inputs = [x, torch.full_like(x, 50.0), A, B, C]
    call = lambda x, d, A, B, C: selective_scan(x, d, -A.exp(), B, C)  # noqa: E731
    assert_implementations_agree(call, [t.float() for t in inputs])
    q, k, v = (t.float() for t in qkv((1, 1, 64, 1)))
    for channels in (1, DIM):
        w = torch.full((1, 1, 64, 1, channels), -0.1)
        w[:, :, ::8] = -1000
        _, (_, _, _, slope) = values_and_gradients(decay_attention, [q, k, v, w], "torch")
        assert slope.isfinite().all()
        assert_implementations_agree(decay_attention, [q, k, v, w])


def test_keys_of_deviation_sixteen():
    q, k, v = (t.float() for t in qkv((1, 12, 12, 2)))
    wide = [q, k * 32, v]
    outputs, gradients = values_and_gradients(
        lambda *x: additive_decay_attention(*x, causal=True), wide, "torch"
    )
    assert all(x.isfinite().all() for x in (*outputs, *gradients))
    exact = additive_decay_attention(*(x.double() for x in wide), causal=True)
    torch.testing.assert_close(outputs[0].double(), exact, rtol=1e-5, atol=1e-5)


def test_additive_attention_over_all_pixels():
    q, k, v = qkv((2, 5, 4, 2))
    v = random(*q.shape)
    weights = k.flatten(1, 2).softmax(1).view_as(k)
    expected = torch.einsum("byxhd,bijhd,bijhe->byxhe", q, weights, v)
    torch.testing.assert_close(additive_decay_attention(q, k, v), expected)


def test_a_decay_of_zero_is_linear_attention():
    q, k, v = qkv((1, 4, 4, 2))
    sums = torch.einsum("bihd,bihe->bihde", k.flatten(1, 2), v.flatten(1, 2)).cumsum(1)
    expected = torch.einsum("bihd,bihde->bihe", q.flatten(1, 2), sums).view(*v.shape)
    torch.testing.assert_close(decay_attention(q, k, v, torch.zeros(2).double(), scale=1.0), expected)


def test_runs_are_equal():
    for function, inputs in CASES.values():
        tensors = inputs((1, 9, 8, 2))
        first, second = (values_and_gradients(function, tensors, "torch") for _ in range(2))
        for a, b in zip((*first[0], *first[1]), (*second[0], *second[1])):
            assert torch.equal(a, b)


def test_opcheck():
    for function, inputs in CASES.values():
        leaves = [x.requires_grad_() for x in inputs((1, 2, 3, 2))]
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            function(*leaves).sum().backward()
        assert counter.get_total_flops() > 0
    x, delta, A, B, C, D, z, bias = (x.requires_grad_() for x in _scan_inputs((1, 2, 3, 2)))
    args = (x, delta, B, C, z, A, D, bias, "row,column", True, "torch")
    torch.library.opcheck(torch.ops.visionattn.selective_scan.default, args)
    q, k, v = (x.requires_grad_() for x in qkv((1, 2, 3, 2)))
    w = random(1, 2, 3, 2, 1).requires_grad_()
    torch.library.opcheck(torch.ops.visionattn.decay_attention.default, (v, q, k, w, "row,row", 0.5, "torch"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "diagonal"}, "order='diagonal' is unknown"),
        ({"order": ("row",)}, "order names 1 orders for 2 heads"),
        ({"k": random(1, 3, 4, 2, DIM + 1)}, "k has shape"),
        ({"v": random(1, 3, 4, DIM)}, "v must be"),
        ({"q": random(1, 3, 4, 2, DIM).long()}, "floating-point"),
        ({"log_decay": random(3)}, "log_decay has shape"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_arguments(change, message):
    q, k, v = qkv((1, 3, 4, 2))
    arguments = {"q": q, "k": k, "v": v, "log_decay": torch.zeros(2).double(), **change}
    with pytest.raises(ValueError, match=message):
        decay_attention(**arguments)


def test_wrong_arguments_of_the_scan():
    x, delta, A, B, C, *_ = _scan_inputs((1, 3, 4, 2))
    with pytest.raises(ValueError, match=r"A must be \[2, 6, states\]"):
        selective_scan(x, delta, A[:, :-1], B, C)
    with pytest.raises(ValueError, match="B has shape"):
        selective_scan(x, delta, A, B[..., :-1], C)
    with pytest.raises(ValueError, match="goes with causal"):
        additive_decay_attention(x, x, x, restart=True)


def test_explain():
    x = random(1, 3, 4, 2, DIM)
    assert str(explain(linear_recurrence, x, torch.zeros(2).double())).startswith("linear_recurrence: torch")
