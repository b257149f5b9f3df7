"""Recurrent layers and plug-ins: published modules, gradients, orders, wrong arguments."""

from __future__ import annotations

from pathlib import Path

import parity
import pytest
import torch
from torch import Tensor, nn

from visionattn.layers import (
    DecayAttention2d,
    DeltaAttention2d,
    GaussianReweighting,
    LightNetAttention2d,
    LocalLinearAttention2d,
    MapPositions,
    MixtureOfHeads,
    NeighborhoodAttention2d,
    SelectiveScan2d,
    SparseQueryAttention2d,
)
from visionattn.layers.recurrent.decay import decay_slopes
from visionattn.layers.reweighting import HeadGates

FIXTURES = Path(__file__).parents[2] / "parity" / "functions" / "recurrent"

LAYERS = {
    "ss2d": lambda: SelectiveScan2d(16),
    "vim": lambda: SelectiveScan2d.vision_mamba(16, 4),
    "four causal convolutions": lambda: SelectiveScan2d(
        16, orders=("row", "column", "row-reversed", "column-reversed"), conv="sequence", conv_size=4
    ),
    "decay, constant": lambda: DecayAttention2d(16, 4),
    "decay, scalar": lambda: DecayAttention2d(16, 4, "scalar", restart=True),
    "decay, vector": lambda: DecayAttention2d(16, 2, "vector"),
    "delta": lambda: DeltaAttention2d(16, 4),
    "delta, no decay": lambda: DeltaAttention2d(16, 4, None),
    "delta, vector": lambda: DeltaAttention2d(16, 4, "vector"),
    "lightnet": lambda: LightNetAttention2d(16, 2),
    "lightnet, causal": lambda: LightNetAttention2d(16, 2, causal=True),
    "local linear": lambda: LocalLinearAttention2d(16, 2),
    "parallax": lambda: LocalLinearAttention2d(16, 2, projected=True),
    "sqa": lambda: SparseQueryAttention2d(16, 4),
    "gaussian": lambda: GaussianReweighting(3),
    "moh": lambda: MixtureOfHeads(NeighborhoodAttention2d(16, 4, kernel_size=3), 16, 4, shared=1, active=2),
}


def published(name: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Weights, input and output of a published module."""
    meta, stored = parity.load(FIXTURES / f"{name}.safetensors")
    return parity.state_dict(meta), parity.example(meta), stored["output"]


def test_ss2d_is_published():
    weights, image, expected = published("ss2d_96_v05_noz")
    layer = SelectiveScan2d(96)
    ours = {
        "A_log": weights["A_logs"].view(4, 96, 1),
        "D": weights["Ds"].view(4, 96),
        "norm.weight": weights["out_norm.weight"],
        "norm.bias": weights["out_norm.bias"],
        "conv.weight": weights["conv2d.weight"],
        "in_proj.weight": weights["in_proj.weight"],
        "out_proj.weight": weights["out_proj.weight"],
        **{f"x_proj.{i}.weight": w for i, w in enumerate(weights["x_proj_weight"])},
        **{f"dt_proj.{i}.weight": w for i, w in enumerate(weights["dt_projs_weight"])},
        **{f"dt_proj.{i}.bias": b for i, b in enumerate(weights["dt_projs_bias"])},
    }
    layer.load_state_dict(ours)
    out = layer(image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert parity.error(out, expected) < 1e-5


def test_sparse_queries_are_published():
    weights, tokens, expected = published("sqa_128_8_2_4")
    layer = SparseQueryAttention2d(128, 8, 4, 2)
    layer.load_state_dict({name.replace("out_proj", "proj"): w for name, w in weights.items()})
    assert parity.error(layer(tokens[:, None]).squeeze(1), expected) < 1e-5


class TokenAttention(nn.Module):
    """Plain attention, as a mixture of heads may take it over."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(out.unflatten(1, x.shape[1:3]))


def test_mixtures_of_heads_are_published():
    weights, tokens, expected = published("moh_128_8_2_4")
    layer = MixtureOfHeads(TokenAttention(128, 8), 128, 8, shared=2, active=4)
    names = {"qkv": "attention.qkv", "wg": "gates.wg", "wg_0": "gates.wg_0", "wg_1": "gates.wg_1"}
    layer.load_state_dict(
        {".".join([names.get(n.split(".")[0], "proj"), n.split(".")[1]]): w for n, w in weights.items()}
    )
    assert parity.error(layer(tokens[:, None]).squeeze(1), expected) < 1e-5


@pytest.mark.parametrize("name", LAYERS)
def test_layers_train_on_any_map(name):
    """Every parameter gets a finite gradient; batches, sizes and one row are taken."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    for size in ((2, 5, 7, 16), (1, 1, 9, 16)):
        x = torch.randn(size, requires_grad=True)
        out = layer(x)
        assert out.shape == x.shape
        (out * torch.randn_like(out)).sum().backward()
        assert x.grad.isfinite().all()
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", LAYERS)
def test_images_of_a_batch_are_independent(name):
    torch.manual_seed(0)
    layer, x = LAYERS[name]().eval(), torch.randn(3, 4, 5, 16)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]), rtol=1e-5, atol=1e-5)


def test_vision_mamba_goes_both_ways():
    """Both directions with one set of weights: the layer commutes with turning the sequence around."""
    torch.manual_seed(0)
    layer = SelectiveScan2d.vision_mamba(8, 4).double()
    with torch.no_grad():
        for pair in (layer.convs, layer.x_proj, layer.dt_proj):
            pair[1].load_state_dict(pair[0].state_dict())
        x = torch.randn(1, 1, 11, 8, dtype=torch.float64)
        torch.testing.assert_close(layer(x.flip(2)).flip(2), layer(x))
        one_way = SelectiveScan2d.vision_mamba(8, 4, orders=("row",)).double()
        y = x.clone()
        y[:, :, 6:] += 1
        torch.testing.assert_close(one_way(y)[:, :, :6], one_way(x)[:, :, :6])


def test_positions_begin_as_zero_and_are_sums_of_what_came_before():
    layer = MapPositions(8, 2).double()
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    assert not layer(x).any()
    with torch.no_grad():
        nn.init.eye_(layer.tpes[0].o_proj.weight)
        first = layer(x)[:, :, :1]
        # A first pixel is what it was, normalised, times four: the sum of q·k of a head.
        expected = x[:, :, :1] / x[:, :, :1].square().sum(-1, keepdim=True).sqrt() * 8**0.5
        torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)


def test_gates_are_zero_for_heads_that_are_not_used():
    torch.manual_seed(0)
    gates = HeadGates(16, 2, 6, 4)(torch.randn(2, 3, 4, 16))
    assert gates.shape == (2, 3, 4, 8)
    assert ((gates[..., 2:] > 0).sum(-1) == 4).all()
    assert (gates[..., :2] > 0).all()


def test_slopes():
    assert decay_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert decay_slopes(6).tolist() == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DecayAttention2d(10, 4), "dim=10 must be a multiple"),
        (lambda: DecayAttention2d(8, 4, "linear"), "decay='linear' is unknown"),
        (lambda: SelectiveScan2d(8, orders=("up",)), "order='up' is unknown"),
        (lambda: SelectiveScan2d(8, conv="image"), "conv='image' is unknown"),
        (lambda: LocalLinearAttention2d(8, 2, ridge=0), "ridge must be above 0"),
        (lambda: SparseQueryAttention2d(8, 4, 3, 2), "query_heads=3 of key_heads=2"),
        (lambda: HeadGates(8, 1, 4, 5), "must be between 1 and routed"),
        (lambda: MixtureOfHeads(nn.Identity(), 8, 4, 1, 1), "has no projection"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
