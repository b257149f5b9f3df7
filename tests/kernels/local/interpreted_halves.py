"""The fused halves of neighborhood attention, interpreted; `test_neighborhood_halves.py` runs it."""

from __future__ import annotations

import pytest
import torch
from agreement import values_and_gradients
from cases import unwritten_is_nan
from halves import SHAPES, in_halves, sample
from torch import Tensor
from triton_tools import interpret_quickly

from visionattn.kernels import explain, neighborhood_aggregation, neighborhood_scores, use_backend

__all__ = ["unwritten_is_nan"]
interpret_quickly()


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "wide"])
def test_equals_the_formula(name: str) -> None:
    inputs = sample(name, "table", dim=5, batch=1, dtype=torch.float32)
    expected, gradients = values_and_gradients(in_halves(name), inputs, "reference")
    got, ours = values_and_gradients(in_halves(name), inputs, "triton")
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours, gradients, rtol=1e-4, atol=1e-5)


def test_weights_beside_the_softmax() -> None:
    # Weights of no softmax, negative ones among them, and maps that are not contiguous.
    _, kernel, options = SHAPES["causal"]
    _, _, v = sample("causal", batch=1, dtype=torch.float32)
    weights = torch.randn(*v.shape[:4], 12)

    def aggregate(weights: Tensor, v: Tensor) -> Tensor:
        return neighborhood_aggregation(weights, v, kernel, **options)

    inputs = [weights.transpose(1, 2).contiguous().transpose(1, 2), v]
    expected, gradients = values_and_gradients(aggregate, inputs, "reference")
    got, ours = values_and_gradients(aggregate, inputs, "triton")
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours, gradients)


def test_second_derivatives() -> None:
    q, k, v = (x[:1, :, :, :1, :1].clone().requires_grad_() for x in sample("even", dtype=torch.float32))
    results = []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            out = in_halves("even")(q, k, v)
            (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
            results.append(torch.autograd.grad(first.square().sum(), (q, k, v)))
    torch.testing.assert_close(results[1], results[0])


def test_half_precision_and_the_choice() -> None:
    q, k, v = sample("even", dtype=torch.float32)
    expected = in_halves("even")(q, k, v)
    with use_backend("triton"):
        out = in_halves("even")(q.half(), k.half(), v.half())
    torch.testing.assert_close(out.float(), expected, atol=5e-3, rtol=5e-3)
    assert explain(neighborhood_scores, q, k, 3).backend == "triton"
    with pytest.raises(ValueError, match="float64"), use_backend("triton"):
        neighborhood_scores(q.double(), k.double(), 3)
