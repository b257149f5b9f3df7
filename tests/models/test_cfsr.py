"""CFSR: its masks, its two forms and the ways between them, and the same-size network."""

from __future__ import annotations

import copy
from pathlib import Path

import parity
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import reparameterize_model
from torch import Tensor, nn

import visionattn
from visionattn.models.cfsr import CFSR, EdgeConv

FIXTURES = Path(__file__).parents[1] / "parity" / "cfsr"
SMALL = {"embed_dim": 8, "depths": (2, 1)}


def network(**kwargs) -> CFSR:
    """A small network with weights that all matter: as created, layer scales of 1e-6 hide the blocks."""
    net = timm.create_model("cfsr_x2", **{**SMALL, **kwargs})
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3))
    return net


def stray_edge_parameters(net: nn.Module) -> list[str]:
    return [name for name in net.state_dict() if "edge" in name or "mask" in name]


def close(ours: Tensor, expected: Tensor) -> bool:
    return (ours - expected).norm() <= 1e-6 * expected.norm()


def test_edge_convolution_is_the_sum_of_four_convolutions():
    conv = EdgeConv(5)
    x = torch.randn(2, 5, 7, 6)
    masks = {
        "sobel_x": [[0, 1, -1], [2, 0, -2], [1, 0, -1]],
        "sobel_y": [[1, 2, 1], [0, 0, 0], [-1, -2, -1]],
        "laplacian": [[1, 0, 0], [1, -4, 1], [0, 1, 0]],
    }
    expected = F.conv2d(x, conv.weight, conv.bias, padding=1, groups=5)
    for i, mask in enumerate(masks.values()):
        kernel = conv.edge_scale[:, i].view(5, 1, 1, 1) * torch.tensor(mask, dtype=torch.float32)
        expected = expected + F.conv2d(x, kernel, conv.edge_bias[:, i], padding=1, groups=5)
    torch.testing.assert_close(conv(x), expected)


def test_masks_are_neither_saved_nor_trained():
    net = network()
    assert not [name for name in net.state_dict() if "mask" in name]
    assert not [name for name, _ in net.named_parameters() if "mask" in name]


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.safetensors")), ids=lambda path: path.stem)
@pytest.mark.parametrize("fused", [False, True])
def test_either_form_of_weights_loads_into_either_form_of_network(path: Path, fused: bool):
    meta, stored = parity.load(path)
    net = timm.create_model(meta["variant"], fused=fused).eval()
    assert not visionattn.load_checkpoint(net, parity.state_dict(meta))
    with torch.no_grad():
        assert parity.error(net(parity.example(meta)), stored["image"]) <= 1e-5
        assert parity.error(net.fuse()(parity.example(meta)), stored["image"]) <= 1e-5


def test_official_masks_in_a_checkpoint_are_dropped():
    meta, _ = parity.load(FIXTURES / "cfsr_x2_unmerged.safetensors")
    weights = parity.state_dict(meta)
    for edge in ("sobel_x", "sobel_y", "laplacian"):
        weights[f"layers.0.blocks.0.mlp.mask_{edge}"] = torch.zeros(96, 1, 3, 3)
    assert not visionattn.load_checkpoint(timm.create_model("cfsr_x2"), weights)


def test_fuse_keeps_the_outputs_and_can_be_repeated():
    net = network().eval()
    x = torch.rand(2, 3, 9, 13)
    expected = net(x)
    assert net.fuse() is net
    assert not stray_edge_parameters(net)
    assert close(net(x), expected)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    net.fuse()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in state.items())


def test_fused_network_has_the_form_of_one_built_fused():
    fused, built = network().fuse(), network(fused=True)
    assert {n: v.shape for n, v in fused.state_dict().items()} == {
        n: v.shape for n, v in built.state_dict().items()
    }
    built.load_state_dict(fused.state_dict())


def test_timm_reparameterizes_it():
    net = network().eval()
    x = torch.rand(1, 3, 9, 13)
    fused = reparameterize_model(net)
    assert stray_edge_parameters(net)
    assert not stray_edge_parameters(fused)
    assert close(fused(x), net(x))


def test_merged_weights_can_be_trained_on():
    merged, net = network(fused=True), network()
    visionattn.load_checkpoint(net, merged.state_dict())
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(net(x), merged(x))
    net(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_every_parameter_gets_a_gradient(fused: bool):
    net = network(fused=fused).train()
    net(torch.rand(1, 3, 9, 11)).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("fused", [False, True])
def test_state_dict_round_trip(fused: bool, tmp_path: Path):
    net, other = network(fused=fused), network(fused=fused)
    visionattn.save_checkpoint(net, tmp_path / "net.safetensors")
    assert not visionattn.load_checkpoint(other, tmp_path / "net.safetensors")
    x = torch.rand(1, 3, 7, 5)
    assert torch.equal(net(x), other(x))


@pytest.mark.parametrize("upscale", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 17), (7, 5), (16, 24)])
def test_any_size(upscale: int, size: tuple[int, int]):
    net = network(upscale=upscale).eval()
    out = net(torch.rand(2, 3, *size))
    assert out.shape == (2, 3, size[0] * upscale, size[1] * upscale)
    assert out.isfinite().all()


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_same_size_network_adds_to_its_input(in_chans: int):
    net = network(upscale=1, in_chans=in_chans, task="jpeg").eval()
    assert (net.info.task, net.info.upscale, net.info.channels) == ("jpeg", 1, in_chans)
    nn.init.zeros_(net.conv_last.weight)
    nn.init.zeros_(net.conv_last.bias)
    x = torch.rand(1, in_chans, 6, 7)
    torch.testing.assert_close(net(x), x)


def test_tiles_that_overlap_by_its_reach_are_exact():
    net = network(depths=(1, 1)).eval()
    x = torch.rand(1, 3, 12, 64)
    reach = 2 * (4 + 1) + 3
    whole, tile = net(x), net(x[..., : 32 + reach])
    torch.testing.assert_close(tile[..., : 2 * 32], whole[..., : 2 * 32], atol=1e-6, rtol=1e-5)
    assert net.info.exact_tiling


def test_gradient_checkpointing_changes_nothing():
    net = network().train()
    other = copy.deepcopy(net)
    other.set_grad_checkpointing()
    x = torch.rand(1, 3, 8, 9)
    net(x).square().mean().backward()
    other(x).square().mean().backward()
    for p, q in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("kwargs", [{"upscale": 0}, {"kernel_size": 4}])
def test_bad_arguments(kwargs: dict[str, int]):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        timm.create_model("cfsr_x2", **SMALL, **kwargs)
