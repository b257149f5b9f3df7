"""HSDT: numbers of bands, both kinds of queries, image shapes, and the variants' sizes."""

from __future__ import annotations

import copy
from pathlib import Path

import parity
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import visionattn
from visionattn.models import HSDT
from visionattn.models.hsdt import GuidedSpectralAttention, SpectralSpatialConv, UpConv

FIXTURES = Path(__file__).parents[1] / "parity" / "hsdt"


def network(**kwargs) -> HSDT:
    return timm.create_model("hsdt_4", **{"in_chans": 7, "depth": 3, "downsample": (1,), **kwargs})


def fixture(name: str, **kwargs) -> tuple[HSDT, Tensor, Tensor]:
    meta, stored = parity.load(FIXTURES / f"{name}.safetensors")
    net = timm.create_model(meta["variant"], **kwargs).eval()
    assert not visionattn.load_checkpoint(net, parity.state_dict(meta))
    return net, parity.example(meta), stored["image"]


def test_spectral_spatial_convolution_is_the_official_sum_of_3d_convolutions():
    conv = SpectralSpatialConv(3, 5)
    x = torch.randn(2, 3, 4, 6, 7)
    y = F.leaky_relu(F.conv3d(x, conv.spatial1.weight[:, :, None], padding=(0, 1, 1)))
    y = F.leaky_relu(F.conv3d(y, conv.spatial2.weight[:, :, None], padding=(0, 1, 1)))
    y = y + F.conv3d(x, conv.spectral.weight[..., None], padding=(1, 0, 0))
    torch.testing.assert_close(conv(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3), y)


def test_enlargement_is_the_official_trilinear_one():
    conv = UpConv(4)
    x = torch.randn(2, 4, 3, 5, 6)
    y = F.interpolate(x, scale_factor=(1, 2, 2), mode="trilinear", align_corners=True)
    y = F.conv3d(y, conv.conv.weight, padding=1)
    torch.testing.assert_close(conv(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3), y)


@pytest.mark.parametrize("query", ["learned", "self"])
def test_attention_among_bands(query: str):
    attn = GuidedSpectralAttention(4, 6, query).eval()
    x = torch.randn(2, 6, 3, 5, 4)
    means = x.mean((2, 3))
    logits = attn.queries(means) if query == "learned" else means @ means.transpose(1, 2)
    mixed = torch.einsum("bij,bjhwc->bihwc", logits.softmax(-1), attn.v(x))
    torch.testing.assert_close(attn(x, attn.weights(x)), x + attn.proj(mixed))


def test_self_queries_take_any_number_of_bands_with_the_weights_of_31():
    net, image, expected = fixture("hsdt_m_24bands", query="self")
    with torch.no_grad():
        assert parity.error(net(image), expected) <= 1e-5
        for bands in (1, 3, 31, 40):
            assert net(torch.rand(1, bands, 8, 8)).shape == (1, bands, 8, 8)


def test_learned_queries_refuse_another_number_of_bands():
    with pytest.raises(ValueError, match=r"31 learned queries cannot take 24 bands.*query='self'"):
        timm.create_model("hsdt_4")(torch.rand(1, 24, 8, 8))


@pytest.mark.parametrize("bands", [1, 10])
def test_banks_of_other_sizes(bands: int):
    net = network(in_chans=bands).eval()
    assert net.info.channels == bands
    assert net(torch.rand(2, bands, 8, 12)).shape == (2, bands, 8, 12)
    assert {m.queries.out_features for m in net.modules() if hasattr(m, "queries")} == {bands}


def test_image_with_and_without_an_axis_for_maps():
    net, image, expected = fixture("hsdt_m")
    with torch.no_grad():
        out = net(image[:, 0])
    assert out.shape == image.shape[:1] + image.shape[2:]
    assert parity.error(out, expected) <= 1e-5


@pytest.mark.parametrize("size", [(3, 3), (5, 18), (31, 17)])
def test_odd_sizes_are_padded_by_reflection_and_cropped(size: tuple[int, int]):
    net = network(downsample=(1, 2)).eval()
    x = torch.rand(1, 7, *size)
    padded = F.pad(x, (0, -size[1] % 4, 0, -size[0] % 4), mode="reflect")
    out = net(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out, net(padded)[..., : size[0], : size[1]])


@pytest.mark.parametrize("variant", ["hsdt_s", "hsdt_l"])
def test_too_small_an_image(variant: str):
    net = timm.create_model(variant).eval()
    smallest = net.info.min_size
    assert timm.get_pretrained_cfg(variant).min_input_size == (31, smallest, smallest)
    assert net(torch.rand(1, 31, smallest, smallest)).isfinite().all()
    with pytest.raises(ValueError, match=f"at least {smallest} pixels"):
        net(torch.rand(1, 31, smallest, smallest - 1))


def test_noise_map():
    net = network(noise_map=True).eval()
    x = torch.rand(2, 7, 8, 8)
    levels = torch.tensor([0.1, 0.2]).view(2, 1, 1, 1)
    maps = torch.stack((x, levels.expand_as(x)), 1)
    torch.testing.assert_close(net(x, levels), net(maps)[:, 0])
    torch.testing.assert_close(net(x, 0.1)[0], net(maps)[0, 0])
    torch.testing.assert_close(net(x), net(x, 0.0))
    assert not torch.allclose(net(x), net(x, 0.5))


def test_noise_level_that_has_no_use():
    x = torch.rand(1, 2, 7, 8, 8)
    with pytest.raises(ValueError, match="takes no noise map"):
        network()(x[:, 0], 0.1)
    with pytest.raises(ValueError, match="bring a noise map"):
        network(noise_map=True)(x, 0.1)


@pytest.mark.parametrize("size", [(8, 16), (5, 9)])
def test_spectral_super_resolution_pads_divisible_sides_too(size: tuple[int, int]):
    net = timm.create_model("hsdt_ssr", bands=7, embed_dim=4, depth=3, downsample=(1,)).eval()
    assert (net.info.channels, net.info.out_channels) == (3, 7)
    x = torch.rand(1, 3, *size)
    bands = F.leaky_relu(F.conv2d(x, net.proj.weight))
    padded = F.pad(bands, (0, 8 - size[1] % 8, 0, 8 - size[0] % 8))
    out = net(x)
    assert out.shape == (1, 7, *size)
    torch.testing.assert_close(out, HSDT.forward(net, padded)[..., : size[0], : size[1]])
    assert net.train()(x).shape == (1, 7, *size)


@pytest.mark.parametrize("shape", [(7, 8, 8), (1, 2, 7, 8, 8), (1, 1, 1, 7, 8, 8)])
def test_bad_shapes(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="images must be"):
        network()(torch.rand(shape))


@pytest.mark.parametrize("kwargs", [{"query": "guided"}, {"downsample": (3,)}])
def test_bad_arguments(kwargs: dict):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        network(**kwargs)


@pytest.mark.parametrize("training", [False, True])
def test_every_parameter_gets_a_gradient(training: bool):
    net = network().train(training)
    # Twenty steps: in training, half of the calls leave the learned queries of a block out.
    for _ in range(20 if training else 1):
        net(torch.rand(2, 7, 9, 8)).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


def test_training_draws_learned_queries_half_of_the_time():
    attn = GuidedSpectralAttention(4, 6, "learned")
    x = torch.randn(1, 6, 2, 2, 4)
    attn.eval()
    learned = attn(x, attn.weights(x))
    attn.query = "self"
    itself = attn(x, attn.weights(x))
    attn.train()
    outs = [attn(x, attn.weights(x)) for _ in range(200)]
    draws = [torch.allclose(out, learned) for out in outs]
    assert all(torch.allclose(out, learned if drawn else itself) for out, drawn in zip(outs, draws))
    assert 60 < sum(draws) < 140


def test_gradient_checkpointing_repeats_the_draws():
    net = network().train()
    other = copy.deepcopy(net)
    other.set_grad_checkpointing()
    x = torch.rand(2, 7, 8, 8)
    for each in (net, other):
        torch.manual_seed(3)
        each(x).square().mean().backward()
    for p, q in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_state_dict_round_trip(tmp_path: Path):
    net, other = network().eval(), network().eval()
    visionattn.save_checkpoint(net, tmp_path / "net.safetensors")
    assert not visionattn.load_checkpoint(other, tmp_path / "net.safetensors")
    x = torch.rand(1, 7, 8, 8)
    assert torch.equal(net(x), other(x))


def test_names_without_the_part_around_a_convolution_load():
    net, other = network().eval(), network().eval()
    weights = {name.replace(".conv.conv.", ".conv."): value for name, value in net.state_dict().items()}
    assert weights.keys() != net.state_dict().keys()
    assert not visionattn.load_checkpoint(other, weights)
    x = torch.rand(1, 7, 8, 8)
    assert torch.equal(net(x), other(x))


def test_official_wrapper_is_removed():
    meta, _ = parity.load(FIXTURES / "hsdt_m.safetensors")
    visionattn.load_checkpoint(
        timm.create_model("hsdt_m"), {"net": parity.state_dict(meta), "epoch": 80, "iteration": 1}
    )


def test_official_results_are_stated():
    for size in ("s", "m", "l"):
        assert len(timm.get_pretrained_cfg(f"hsdt_{size}.icvl_gaussian").notes) == 4
        assert len(timm.get_pretrained_cfg(f"hsdt_{size}.icvl_complex").notes) == 5
