"""Local linear attention, parallax attention and Gaussian reweighting against fixtures and formulas."""

from __future__ import annotations

from pathlib import Path

import call_fixtures
import pytest
import torch
from agreement import assert_implementations_agree
from torch import Tensor

from visionattn.kernels import (
    dense_attention,
    gaussian_reweighting,
    local_linear_attention,
    parallax_attention,
    use_backend,
)
from visionattn.kernels.local_linear.plain import attention as plain

SHAPES = [(1, 1, 1, 1, 4), (2, 1, 23, 3, 8), (1, 7, 5, 2, 6), (0, 3, 2, 1, 4)]


def random(shape: tuple[int, ...], count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return list(torch.randn(count, *shape, dtype=torch.float64, generator=generator).unbind(0))


@pytest.mark.parametrize("path", call_fixtures.fixtures("local"), ids=lambda path: path.stem)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_published(path: Path, backend: str):
    call_fixtures.check(path, backend)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_local_linear_equals_the_formula(shape, causal, monkeypatch):
    inputs = random(shape)
    ridge = torch.rand(shape[:4], dtype=torch.float64) + 0.5
    call = lambda *x: local_linear_attention(*x[:3], ridge=x[3], causal=causal)  # noqa: E731
    assert_implementations_agree(call, [*inputs, ridge])
    assert_implementations_agree(call, [*inputs, ridge[0, 0, 0] if shape[0] else torch.ones(1).double()])
    monkeypatch.setattr(plain, "_AT_ONCE", 128)
    assert_implementations_agree(call, [*inputs, ridge])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parallax_equals_the_formula(shape, causal, monkeypatch):
    inputs = random(shape, 4)
    assert_implementations_agree(lambda *x: parallax_attention(*x, causal=causal), inputs)
    monkeypatch.setattr(plain, "_AT_ONCE", 128)
    assert_implementations_agree(lambda *x: parallax_attention(*x, causal=causal), inputs)


@pytest.mark.parametrize(("ridge", "limit"), [(1.0, 1e-4), (0.1, 1e-3)])
def test_wide_heads_are_solved_by_iterations(ridge, limit):
    q, k, v = (x.float() for x in random((1, 7, 7, 2, 64)))
    with use_backend("reference"):
        expected = local_linear_attention(q.double(), k.double(), v.double(), ridge=ridge)
    out = local_linear_attention(q, k, v, ridge=ridge)
    assert (out - expected).abs().max() / expected.abs().max() < limit


def test_a_large_ridge_is_softmax_attention():
    q, k, v = random((1, 5, 6, 2, 8))
    torch.testing.assert_close(
        local_linear_attention(q, k, v, ridge=1e9), dense_attention(q, k, v), rtol=1e-6, atol=1e-6
    )


def test_linear_functions_are_recovered():
    """Values that are a linear function of the keys come out as that function of the query."""
    q, k, _ = random((1, 6, 6, 1, 4))
    matrix = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = local_linear_attention(q, k, k @ matrix, ridge=1e-9)
    torch.testing.assert_close(out, q @ matrix, rtol=1e-5, atol=1e-5)


def test_derivatives():
    q, k, v, r = (x.requires_grad_() for x in random((1, 2, 3, 1, 3), 4))
    ridge = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    local = lambda q, k, v, ridge: local_linear_attention(q, k, v, ridge=ridge)  # noqa: E731
    for function, inputs in ((local, (q, k, v, ridge)), (parallax_attention, (q, r, k, v))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_compiles_and_maps():
    q, k, v, r = random((2, 3, 4, 2, 4), 4)
    for function, inputs in ((local_linear_attention, (q, k, v)), (parallax_attention, (q, r, k, v))):
        expected = function(*inputs)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), expected)
        mapped = torch.vmap(function)(*(x.unsqueeze(1) for x in inputs)).squeeze(1)
        torch.testing.assert_close(mapped, expected)


@pytest.mark.parametrize("over", ["pixels", "channels"])
def test_gaussian_weights_are_the_published_product(over):
    """Products of normal densities, normalised, for each of three heads; the last takes the rest."""
    x = random((2, 4, 5, 26), 1)[0]
    offset, width = random((3, 2), 2)
    width = width.abs() + 0.5
    flat = x.flatten(1, 2) if over == "pixels" else x.flatten(1, 2).mT
    size, parts = flat.shape[1] // 3, []
    for head, part in enumerate(flat.split([size, size, flat.shape[1] - 2 * size], 1)):
        mean, std = part.mean(1, keepdim=True), (part.var(1, keepdim=True) + 1e-8).sqrt()
        weights = torch.ones_like(part)
        for o, w in zip(offset[head], width[head]):
            weights = weights * torch.distributions.Normal(o / std, w).log_prob((part - mean) / std).exp()
        parts.append(part * weights / weights.sum(1, keepdim=True))
    expected = torch.cat(parts, 1) if over == "pixels" else torch.cat(parts, 1).mT
    out = gaussian_reweighting(x, offset, width, over)
    torch.testing.assert_close(out, expected.reshape(x.shape))


def test_wrong_arguments():
    q, k, v = random((1, 2, 3, 2, 4))
    for change, message in (
        ({"ridge": 0.0}, "ridge must be above 0"),
        ({"ridge": torch.ones(3)}, "ridge has shape"),
        ({"iterations": 0}, "iterations must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            local_linear_attention(q, k, v, **change)
    with pytest.raises(ValueError, match="over='heads' is unknown"):
        gaussian_reweighting(v[..., 0], torch.zeros(1, 1), torch.ones(1, 1), "heads")
    with pytest.raises(ValueError, match="9 heads cannot share 6 pixels: each needs two"):
        gaussian_reweighting(v[..., 0], torch.zeros(9, 1), torch.ones(9, 1))
