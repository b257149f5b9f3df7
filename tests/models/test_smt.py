"""SMT: what it shares with no other family."""

from __future__ import annotations

from typing import Any

import families
import pytest
import timm
import torch
from torch import Tensor, nn

from visionattn.checkpoints import CheckpointError, identify, load_checkpoint, official_state_dict
from visionattn.models.registry.zoo import count_macs
from visionattn.models.smt import SMT, Attention, Modulation


def modulation() -> Modulation:
    torch.manual_seed(0)
    layer = Modulation(24, 3, expand_ratio=2, dtype=torch.float64)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.bn.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor), alpha=0.3)
    return layer.eval()


def formula(layer: Modulation, x: Tensor) -> Tensor:
    """The definition, one channel and one pixel at a time where the layer works in bulk."""
    s = layer.s(x).permute(0, 3, 1, 2)
    heads, dim = len(layer.local_convs), x.shape[-1]
    scales = [conv(s[:, i * 8 : (i + 1) * 8]) for i, conv in enumerate(layer.local_convs)]
    groups = torch.cat([scales[i][:, c : c + 1] for c in range(dim // heads) for i in range(heads)], 1)
    mixed = torch.nn.functional.gelu(layer.bn(layer.proj0(groups)))
    return layer.proj(layer.proj1(mixed).permute(0, 2, 3, 1) * layer.v(x))


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (70, 80)])
def test_modulation_is_its_definition(size: tuple[int, int]):
    layer, x = modulation(), torch.randn(2, *size, 24, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), formula(layer, x))
    layer.train()
    buffers = {name: buffer.clone() for name, buffer in layer.bn.named_buffers()}
    found = layer(x)
    layer.bn.load_state_dict(buffers, strict=False)
    torch.testing.assert_close(found, formula(layer, x))


def test_modulation_has_the_gradients_of_its_definition():
    layer, x = modulation(), torch.randn(1, 4, 5, 24, dtype=torch.float64)
    found = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    expected = torch.autograd.grad(formula(layer, x).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "part",
    ["attn.v", "attn.proj0", "attn.bn", "attn.act", "attn.proj1", "mlp.fc1", "mlp.dwconv", "mlp.act", "mlp"],
)
def test_hooks_reach_every_part(part: str):
    net: Any = families.small("smt_t").eval()
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        seen.extend((tensor, tensor.clone()) for tensor in (*inputs, out))

    x = torch.rand(1, 3, 48, 48)
    with torch.inference_mode():
        expected = net(x)
        net.get_submodule(f"stages.0.blocks.0.{part}").register_forward_hook(keep)
        torch.testing.assert_close(net(x), expected)
    assert seen
    # What a hook has seen stays as it was.
    assert all(torch.equal(tensor, copy) for tensor, copy in seen)


def test_stages_alternate():
    net: Any = timm.create_model("smt_s", device="meta")
    kinds = [[type(block.attn) for block in stage.blocks] for stage in net.stages]
    assert kinds[0] == [Modulation] * 3
    assert kinds[1] == [Modulation] * 4
    assert kinds[2] == [Modulation, Attention] * 9
    assert kinds[3] == [Attention] * 2


# The published figures leave out the two products of attention, and give tenths of 10⁹.
@pytest.mark.parametrize(
    ("name", "size", "gmacs"),
    [
        ("smt_t", 224, 2.4),
        ("smt_s", 224, 4.7),
        ("smt_b", 224, 7.7),
        ("smt_l", 224, 17.6),
        ("smt_l", 384, 51.6),
    ],
)
def test_multiply_adds_are_those_published(name: str, size: int, gmacs: float):
    net: Any = timm.create_model(name, device="meta").eval()
    counted = count_macs(net, (1, 3, size, size)) - products_of_attention(net, size)
    assert counted / 1e9 == pytest.approx(gmacs, rel=0.01)


def products_of_attention(net: SMT, size: int) -> int:
    total = 0
    for i, stage in enumerate(net.stages):
        pixels = (size // (4 * 2**i)) ** 2
        layers = [module for module in stage.modules() if isinstance(module, Attention)]
        total += sum(2 * pixels**2 * layer.q.in_features for layer in layers)
    return total


def test_weights_of_the_dense_backbones():
    """Without a classifier, and with another name of the convolution beside attention."""
    net: Any = families.small("smt_t")
    weights = {
        name.replace(".attn.local_conv.", ".attn.dw_conv."): value
        for name, value in official_state_dict(net).items()
        if not name.startswith("head.")
    }
    assert any(".dw_conv." in name for name in weights)
    found = identify(weights)
    assert found.arguments["num_classes"] == 0
    backbone = families.small("smt_t", features_only=True)
    assert not load_checkpoint(backbone, {f"backbone.{name}": value for name, value in weights.items()})
    x = torch.rand(1, 3, 48, 64)
    expected = net.eval().forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(backbone.eval()(x), expected)


def test_a_last_stage_of_another_depth_is_recognised_and_named():
    """The authors' text counts 21 M parameters for SMT-S, which is nearer to one block there than to two."""
    shallow: Any = timm.create_model("smt_s", depths=(3, 4, 18, 1), device="meta")
    assert sum(p.numel() for p in shallow.parameters()) == 20_432_808
    net = families.small("smt_s", depths=(1, 1, 2, 1))
    weights = official_state_dict(net)
    assert identify(weights).arguments["depths"] == (1, 1, 2, 1)
    with pytest.raises(CheckpointError, match=r"does not fit SMT: .*missing \(stages\.3\.blocks\.1\."):
        load_checkpoint(families.small("smt_s", depths=(1, 1, 2, 2)), weights)


def test_layer_scale():
    net: Any = timm.create_model("smt_l", device="meta")
    assert {name for name, _ in net.named_parameters() if name.endswith(".gamma")}
    scaled: Any = families.small("smt_l")
    assert scaled.stages[0].blocks[0].ls2.gamma.tolist() == [pytest.approx(1e-4)] * 16
    assert isinstance(families.small("smt_t").get_submodule("stages.0.blocks.0.ls1"), nn.Identity)


def test_initial_weights_are_the_authors():
    torch.manual_seed(0)
    net: Any = timm.create_model("smt_t", depths=(1, 1, 2, 1))
    attn = net.stages[2].blocks[0].attn
    assert attn.local_convs[1].weight.std().item() == pytest.approx((2 / 25) ** 0.5, rel=0.05)
    assert attn.proj1.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert attn.proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
