"""Logits of neighborhoods, and sums by given weights: together they are neighborhood attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import assert_implementations_agree, values_and_gradients
from halves import SHAPES, in_halves, sample, whole
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode
from triton_tools import run_interpreted

from visionattn.kernels import (
    explain,
    neighborhood_aggregation,
    neighborhood_attention,
    neighborhood_bias,
    neighborhood_scores,
    use_backend,
)
from visionattn.kernels.local.library import encode
from visionattn.kernels.local.pattern import Pattern, neighborhood_axis

OPERATORS = torch.ops.visionattn
every_shape = pytest.mark.parametrize("name", SHAPES)


@every_shape
@pytest.mark.parametrize("bias", ["none", "table", "dense"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_both_halves_are_the_attention(name: str, bias: str, backend: str) -> None:
    inputs = sample(name, bias)
    expected, gradients = values_and_gradients(whole(name), inputs, "reference")
    got, ours = values_and_gradients(in_halves(name), inputs, backend)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours, gradients)


@every_shape
def test_each_half_agrees_with_its_formula(name: str) -> None:
    _, kernel, options = SHAPES[name]
    q, k, v = sample(name)
    weights = torch.randn_like(neighborhood_scores(q, k, kernel, **options))
    assert_implementations_agree(lambda q, k: neighborhood_scores(q, k, kernel, **options), [q, k])
    assert_implementations_agree(lambda w, v: neighborhood_aggregation(w, v, kernel, **options), [weights, v])


def test_a_known_sum() -> None:
    # Windows of 3 of a line of 5 move inwards at its ends.
    v = torch.arange(5.0).view(1, 1, 5, 1, 1)
    weights = torch.tensor([1.0, 10.0, 100.0]).expand(1, 1, 5, 1, 3)
    out = neighborhood_aggregation(weights, v, (1, 3))
    assert out.flatten().tolist() == [210.0, 210.0, 321.0, 432.0, 432.0]


def test_scores_of_hidden_keys() -> None:
    x = torch.ones(1, 1, 4, 1, 1)
    scores = neighborhood_scores(x, x, (1, 3), is_causal=(False, True), scale=2.0)
    inf = float("inf")
    assert scores[0, 0, :, 0].tolist() == [[2, -inf, -inf], [2, 2, -inf], [2, 2, 2], [2, 2, 2]]
    weights = torch.full((1, 1, 4, 1, 3), float("nan"))
    weights[scores > 0] = 1
    out = neighborhood_aggregation(weights, x, (1, 3), is_causal=(False, True))
    assert out.flatten().tolist() == [1, 2, 3, 3]


@pytest.mark.parametrize("bias", ["table", "dense"])
def test_bias_is_that_of_the_scores(bias: str) -> None:
    size, kernel, options = SHAPES["all"]
    q, k, _, table = sample("all", bias)
    added = neighborhood_scores(q, k, kernel, **options) + neighborhood_bias(table, size, kernel, **options)
    torch.testing.assert_close(added, neighborhood_scores(q, k, kernel, table, **options))


def test_batches_larger_than_a_part() -> None:
    q, k, v = torch.randn(5, 30, 40, 3, 4, 8, dtype=torch.float64).unbind(3)
    weights = neighborhood_scores(q, k, 11).softmax(-1)
    torch.testing.assert_close(neighborhood_aggregation(weights, v, 11), neighborhood_attention(q, k, v, 11))


@pytest.mark.parametrize("name", ["even", "all"])
def test_empty_batch(name: str) -> None:
    inputs = [x[:0] for x in sample(name)]
    outputs, gradients = values_and_gradients(in_halves(name), inputs, "torch")
    assert outputs[0].shape == inputs[2].shape
    assert all(g.shape == x.shape for g, x in zip(gradients, inputs))


@pytest.mark.parametrize("name", ["even", "strided", "causal"])
def test_second_derivatives(name: str) -> None:
    _, kernel, options = SHAPES[name]
    q, k, v = (x[:1, :, :, :1, :1].detach().clone().requires_grad_() for x in sample(name))
    weights = neighborhood_scores(q, k, kernel, **options).softmax(-1).detach().requires_grad_()

    def score(q: Tensor, k: Tensor) -> Tensor:
        scores = neighborhood_scores(q, k, kernel, **options)
        return scores[scores.isfinite()]

    def aggregate(weights: Tensor, v: Tensor) -> Tensor:
        return neighborhood_aggregation(weights, v, kernel, **options)

    for function, inputs in ((score, (q, k)), (aggregate, (weights, v))):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["even", "all"])
def test_vmap_and_func_grad(name: str) -> None:
    q, k, v = (torch.stack([x, 2 * x, -x], 1) for x in sample(name))
    attend = in_halves(name)
    expected = torch.stack([attend(*(x[:, i] for x in (q, k, v))) for i in range(3)])
    torch.testing.assert_close(torch.vmap(attend, in_dims=1)(q, k, v), expected)
    torch.testing.assert_close(
        torch.vmap(attend, in_dims=(1, None, 1))(q, k[:, 0], v),
        torch.stack([attend(q[:, i], k[:, 0], v[:, i]) for i in range(3)]),
    )
    gradient = torch.func.grad(lambda q: attend(q, k[:, 0], v[:, 0]).square().sum())(q[:, 0])
    leaf = q[:, 0].detach().clone().requires_grad_()
    attend(leaf, k[:, 0], v[:, 0]).square().sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)


def _geometry() -> list[int]:
    return encode(Pattern(neighborhood_axis(7, 4, 1, 1, False), neighborhood_axis(9, 2, 1, 1, True)))


def test_opcheck() -> None:
    q, k, v = (x.requires_grad_() for x in sample("even"))
    weights = torch.randn(2, 7, 9, 2, 8, dtype=torch.float64, requires_grad=True)
    geometry = _geometry()
    torch.library.opcheck(OPERATORS.neighborhood_scores.default, (q, k, geometry, 0.3, "torch"))
    torch.library.opcheck(OPERATORS.neighborhood_aggregation.default, (v, weights, geometry, "torch"))
    tensors = [x.detach() for x in (v, weights)]
    torch.library.opcheck(
        OPERATORS.neighborhood_aggregation_backward.default,
        (torch.ones_like(q), None, *tensors, geometry, "torch", [True, True]),
    )


@pytest.mark.parametrize("name", ["even", "all"])
def test_compiles_whole_with_dynamic_sizes(name: str) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    attend = in_halves(name)
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for batch, height, width in ((4, 24, 26), (3, 29, 30), (5, 36, 17)):
        torch.manual_seed(0)
        packed = torch.randn(batch, height, width, 3, 2, 8, requires_grad=True)
        results = []
        for function in (attend, compiled):
            out = function(*packed.unbind(3))
            results.append((out, *torch.autograd.grad(out.square().sum(), packed)))
        torch.testing.assert_close(results[1], results[0])
    assert counter.frame_count == 1


def test_exports_for_all_sizes() -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = neighborhood_scores(q, k, 5).softmax(-1)
            return neighborhood_aggregation(weights, v, 5)

    def maps(height: int, width: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(2, height, width, 2, 4) for _ in range(3))

    sizes = {1: torch.export.Dim("height", min=5), 2: torch.export.Dim("width", min=5)}
    program = torch.export.export(Attend(), maps(9, 12), dynamic_shapes=[sizes] * 3)
    for size in ((9, 12), (20, 7)):
        inputs = maps(*size)
        torch.testing.assert_close(program.module()(*inputs), neighborhood_attention(*inputs, 5))


def test_flops_are_those_of_the_visible_pairs() -> None:
    q, k, v = (x.requires_grad_() for x in sample("even"))
    pattern = Pattern(neighborhood_axis(7, 4, 1, 1, False), neighborhood_axis(9, 2, 1, 1, False))
    with FlopCounterMode(display=False) as counter:
        in_halves("even")(q, k, v).sum().backward()
    assert counter.get_total_flops() == 2 * pattern.flops(heads=2, head_dim=4) // 2 * (2 + 4)


def test_half_precision_and_autocast() -> None:
    q, k, v = (x.float() for x in sample("even"))
    expected = in_halves("even")(q, k, v)
    out = in_halves("even")(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(in_halves("even")(q, k, v), expected)


def test_leaf_of_fx_and_explain() -> None:
    attend = in_halves("even")
    traced = torch.fx.symbolic_trace(attend, concrete_args={"bias": None})
    inputs = sample("even")
    torch.testing.assert_close(traced(*inputs, None), attend(*inputs))
    assert explain(neighborhood_scores, *inputs[:2], 3).operator == "neighborhood_scores"
    with use_backend("reference"):
        assert explain(neighborhood_scores, *inputs[:2], 3).backend == "reference"


def _maps(**kwargs: Any) -> Tensor:
    return torch.zeros(1, 6, 6, 2, 4, **kwargs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: neighborhood_scores(_maps(), _maps()[:, :5], 3), "k has shape"),
        (lambda: neighborhood_scores(_maps(), _maps(), 7), "needs a height of at least 7, got 6"),
        (lambda: neighborhood_scores(_maps(), _maps(), 3, torch.zeros(2, 3, 3)), "needed is a relative"),
        (lambda: neighborhood_scores(_maps(), _maps(), 3, stride=4), "stride 4 is above kernel_size 3"),
        (lambda: neighborhood_aggregation(torch.zeros(1, 6, 6, 2, 8), _maps(), 3), r"needed is \(1, 6, 6"),
        (lambda: neighborhood_aggregation(torch.zeros(1, 6, 6, 2, 9), _maps()[0], 3), "v must be"),
        (
            lambda: neighborhood_aggregation(torch.zeros(1, 6, 6, 2, 9), _maps(dtype=torch.float64), 3),
            "weights are torch.float32 on cpu, v is torch.float64",
        ),
        (
            lambda: neighborhood_aggregation(*(_maps(dtype=torch.int32),) * 2, (2, 2)),
            "floating-point dtype",
        ),
        (
            lambda: neighborhood_aggregation(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 257), 1),
            "257",
        ),
        (lambda: neighborhood_bias(torch.zeros(2, 5, 4), (6, 6), 3), "needed is a relative table"),
        (lambda: neighborhood_bias(torch.zeros(2, 5, 5), (6, 2), 3), "needs a width of at least 3"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_interpreted() -> None:
    pytest.importorskip("triton")
    run_interpreted(Path(__file__).with_name("interpreted_halves.py"))
