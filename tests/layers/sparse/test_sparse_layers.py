"""SLA, native sparse attention and attention with a prefix state: formulas, published outputs, transforms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visionattn.kernels import dense_attention, neighborhood_attention, topk_regions
from visionattn.kernels.routed.reference import places
from visionattn.layers import NativeSparseAttention2d, PrefixStateAttention2d, SparseLinearAttention2d

SLA = SparseLinearAttention2d
FIXTURES = Path(__file__).parents[2] / "parity" / "functions" / "selectors"
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "sla": lambda: SparseLinearAttention2d(16, 2, 3, ratio=0.3, skip=0.2),
    "sla, all": lambda: SparseLinearAttention2d(16, 2, (2, 4), ratio=0.3, linear="all", feature_map="elu"),
    "native": lambda: NativeSparseAttention2d(16, 4, 2, 3, topk=3, kernel_size=(3, 5)),
    "prefix": lambda: PrefixStateAttention2d(16, 2),
}


def randomised(layer: nn.Module) -> nn.Module:
    """A layer in float64 of which no parameter is zero."""
    torch.manual_seed(0)
    layer = layer.double()
    for x in layer.parameters():
        nn.init.normal_(x, std=0.3)
    return layer


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [(7, 8), (1, 11), (2, 2)], ids=str)
def test_maps_of_any_size_and_gradients(name: str, size: tuple[int, int]):
    layer = randomised(LAYERS[name]())
    x = torch.randn(2, *size, 16, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    assert out.shape == x.shape
    gradients = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
    assert all(g.isfinite().all() for g in gradients)
    # A tiny step along the gradient raises the sum as it should.
    step = 1e-6 * gradients[0]
    rise = layer(x + step).square().sum() - layer(x - step).square().sum()
    torch.testing.assert_close(rise / 2e-6, gradients[0].square().sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_compiles_whole_and_runs_under_autocast(name: str):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    x = torch.randn(2, 7, 8, 16)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    assert low.isfinite().all()


@pytest.mark.parametrize("fixture", ["sla1_32x16", "sla2_16x32"])
def test_published_outputs_of_sla(fixture: str):
    meta, tensors = parity.load(FIXTURES / f"{fixture}.safetensors")
    build, (q, k, v) = meta["build"], (tensors[name] for name in "qkv")
    options = {name: build[name] for name in ("ratio", "linear", "feature_map")}
    layer = SparseLinearAttention2d(16, 1, tuple(build["region_size"]), **options)
    for out, name in zip(layer.branches(q, k, v), ("sparse", "linear")):
        assert (out - tensors[name]).norm() < 1e-5 * tensors[name].norm()


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
@pytest.mark.parametrize("skip", [0.0, 0.3])
def test_sla_is_linear_over_the_rest(skip: float, feature_map: str):
    layer = SparseLinearAttention2d(8, 2, 3, ratio=0.25, skip=skip, feature_map=feature_map)
    q, k, v = torch.randn(3, 2, 7, 8, 2, 4, dtype=torch.float64)
    order = topk_regions(q, k, 3, 9, per_head=True)[..., 2 : 9 - int(skip * 9)]
    region_of, _ = places((7, 8), (3, 3))
    taken = (order[:, :, region_of][..., None, :] == region_of[:, None]).any(-1)
    maps = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: F.elu(x) + 1, "relu": F.relu}
    features = maps[feature_map]
    query, key = (features(x).flatten(1, 2).transpose(1, 2) for x in (q, k))
    weights = query @ key.transpose(2, 3) * taken
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    expected = (weights @ v.flatten(1, 2).transpose(1, 2)).transpose(1, 2).unflatten(1, (7, 8))
    torch.testing.assert_close(layer.branches(q, k, v)[1], expected)


def test_sla_begins_as_sparse_attention_and_has_no_rest_where_all_is_listed():
    layer = SparseLinearAttention2d(16, 2, 3, ratio=1.0)
    x = torch.randn(1, 6, 7, 16)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, -1)).unbind(3)
    sparse, linear = layer.branches(q, k, v)
    assert not linear.any()
    torch.testing.assert_close(sparse, dense_attention(q, k, v))
    some = SparseLinearAttention2d(16, 2, 3, ratio=0.3)
    some.load_state_dict(layer.state_dict())
    torch.testing.assert_close(some(x), some.proj(some.branches(q, k, v)[0].flatten(3)))


def test_native_is_its_formula():
    layer = randomised(NativeSparseAttention2d(16, 4, 2, 3, topk=3, kernel_size=3))
    size = height, width = 5, 8
    x = torch.randn(1, *size, 16, dtype=torch.float64)
    q = layer.q(x).unflatten(-1, (4, 4))
    kv = layer.kv(x).view(1, *size, 3, 2, 2, 4)
    region_of, place = places(size, (3, 3))
    # The compressed keys and values, region by region; a border region is weighed up by what it lacks.
    compressed = torch.zeros(2, 6, 2, 4, dtype=torch.float64)
    for i, conv in enumerate((layer.compress_k, layer.compress_v)):
        weights = conv.weight.flatten(1).T
        for region in range(6):
            pixels = torch.arange(40)[region_of == region]
            values = kv[0, :, :, 0, i].reshape(40, 8)[pixels]
            compressed[i, region] = (weights[place[pixels]] * values).sum(0).view(2, 4) * 9 / len(pixels)
    keys = compressed[0].repeat_interleave(2, 1)
    weights = torch.einsum("yxhd,rhd->hyxr", q[0], keys).mul(0.5).softmax(-1).flatten(1, 2)
    first = torch.einsum("hnr,rhd->nhd", weights, compressed[1].repeat_interleave(2, 1))
    scores = weights.unflatten(0, (2, 2)).sum(1)
    best = torch.zeros(height * width, 4, 4, dtype=torch.float64)
    for n in range(40):
        for h in range(4):
            ranked = scores[h // 2, n].sort(descending=True, stable=True).indices.tolist()
            own = int(region_of[n])
            chosen = list(dict.fromkeys([*sorted({0, own}), *ranked]))[:3]
            seen = torch.isin(region_of, torch.tensor(chosen))
            k, v = (kv[0, :, :, 1, i, h // 2].reshape(40, 4)[seen] for i in range(2))
            best[n, h] = (k @ q[0].reshape(40, 4, 4)[n, h] * 0.5).softmax(0) @ v
    near = neighborhood_attention(q, *(kv[:, :, :, 2, i].repeat_interleave(2, 3) for i in range(2)), 3)
    gates = layer.gates(x).sigmoid().view(40, 3, 4, 1)
    branches = (first, best, near.reshape(40, 4, 4))
    out = sum(gates[:, i] * branch for i, branch in enumerate(branches))
    torch.testing.assert_close(layer(x), layer.proj(out.reshape(1, *size, 16)))


def test_compression_begins_as_a_mean():
    layer = NativeSparseAttention2d(16, 2, region_size=3)
    k = torch.randn(1, 7, 8, 2, 8)
    compressed = layer._compressed(layer.compress_k, k)
    torch.testing.assert_close(compressed[0, 2, 2], k[0, 6:, 6:].mean((0, 1)))


def test_prefix_is_its_formula():
    layer = randomised(PrefixStateAttention2d(8, 2))
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in layer.qkv(x).unflatten(-1, (3, 2, 4)).unbind(3))
    weights = (q @ k.transpose(2, 3) * 0.5).exp()
    features = F.elu(q * 0.5**0.5) + 1
    total = weights.sum(-1, keepdim=True) + features @ layer.state_sum.clamp(min=0)[..., None]
    out = (weights @ v + features @ layer.state) / total
    torch.testing.assert_close(layer(x), layer.proj(out.transpose(1, 2).reshape(2, 3, 4, 8)))


def test_prefix_begins_as_attention_and_learns():
    torch.manual_seed(0)
    layer = PrefixStateAttention2d(16, 2)
    x = torch.randn(1, 5, 6, 16)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, -1)).unbind(3)
    torch.testing.assert_close(layer(x), layer.proj(dense_attention(q, k, v).flatten(3)))
    gradients = torch.autograd.grad(layer(x).square().sum(), [layer.state, layer.state_sum])
    assert all(g.abs().amax() > 1e-6 for g in gradients)
    # Logits of several hundred: sums of exponentials that float32 cannot hold.
    layer.qkv.weight.data.mul_(40)
    assert layer(x).isfinite().all()


@pytest.mark.parametrize(
    ("message", "build"),
    [
        (r"ratio must be in \(0, 1\] and skip in \[0, 1\), got ratio=0", lambda: SLA(8, 2, ratio=0)),
        (r"linear must be 'rest' or, without skip, 'all'", lambda: SLA(8, 2, linear="all", skip=0.1)),
        (r"feature_map='rel' is unknown; .*relu", lambda: SLA(8, 2, feature_map="rel")),
        (r"dim=8 must be a multiple of num_heads=3", lambda: SLA(8, 3)),
        (r"num_heads=4, and that a multiple of num_kv_heads=3", lambda: NativeSparseAttention2d(8, 4, 3)),
        (r"topk must be at least 1, got 0", lambda: NativeSparseAttention2d(8, 4, topk=0)),
        (r"kernel_size must be one or two integers", lambda: NativeSparseAttention2d(8, 4, kernel_size=0)),
        (r"dim=8 must be a multiple of num_heads=3", lambda: PrefixStateAttention2d(8, 3)),
    ],
)
def test_refusals(message: str, build: Callable[[], Any]):
    with pytest.raises(ValueError, match=message):
        build()


def test_parameters_of_sla_are_those_of_attention_and_a_small_layer():
    sizes = {name: x.numel() for name, x in SparseLinearAttention2d(16, 2).named_parameters()}
    assert sum(sizes.values()) == 16 * 48 + 48 + 16 * 16 + 16 + 8 * 8 + 8
    assert not any(x.any() for x in SparseLinearAttention2d(16, 2).mix.parameters())


def test_layers_take_devices_and_dtypes():
    for build in (SparseLinearAttention2d, NativeSparseAttention2d, PrefixStateAttention2d):
        layer = build(16, 2, device="meta", dtype=torch.float16)
        assert all(x.device.type == "meta" and x.dtype == torch.float16 for x in layer.parameters())
