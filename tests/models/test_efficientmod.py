"""EfficientMod: what it shares with no other family."""

from __future__ import annotations

from typing import Any

import families
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.checkpoints import identify, load_checkpoint, official_state_dict
from visionattn.models.efficientmod import Attention, ModulationBlock, ModulationMlp
from visionattn.models.registry.zoo import count_macs


def formula(block: ModulationBlock, x: Tensor) -> Tensor:
    """The definition, with the context repeated for every group of hidden channels."""
    mlp = block.mlp
    y = block.norm(x)
    context = mlp.context_conv(mlp.context_in(y).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    context = mlp.context_out(F.gelu(context)).repeat(1, 1, 1, mlp.ratio)
    hidden = mlp.fc1(y)
    hidden = hidden if mlp.ratio == 1 else F.gelu(hidden)
    return x + block.ls.gamma * mlp.fc2(hidden * context)


@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize("size", [(1, 1), (6, 9), (90, 80)])
def test_modulation_is_its_definition(ratio: int, size: tuple[int, int]):
    torch.manual_seed(0)
    block = ModulationBlock(16, ratio, layer_scale=0.5, dtype=torch.float64)
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    before = x.clone()
    torch.testing.assert_close(block(x), formula(block, x))
    with torch.inference_mode():
        torch.testing.assert_close(block.eval()(x), formula(block, x))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "part", ["context_in", "context_conv", "context_act", "context_out", "fc1", "act", "fc2"]
)
def test_hooks_reach_every_part(part: str):
    net: Any = families.small("efficientmod_s").eval()
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        seen.extend((tensor, tensor.clone()) for tensor in (*inputs, out))

    x = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        expected = net(x)
        net.get_submodule(f"stages.2.blocks.1.mlp.{part}").register_forward_hook(keep)
        torch.testing.assert_close(net(x), expected)
    assert seen
    # What a hook has seen stays as it was.
    assert all(torch.equal(tensor, copy) for tensor, copy in seen)


def test_blocks_of_every_stage():
    net: Any = timm.create_model("efficientmod_xs", device="meta")
    blocks = net.stages[2].blocks
    assert [block.mlp.ratio for block in blocks[:4]] == [1, 4, 1, 4]
    # A stage begins again with 1.
    assert [block.mlp.ratio for block in net.stages[0].blocks] == [1, 4, 1]
    assert [type(block.attn) for block in blocks[4:]] == [Attention] * 3
    heads = {dim: Attention(dim, device="meta").proj.in_features for dim in (128, 144, 288, 312)}
    assert heads == {128: 256, 144: 256, 288: 288, 312: 312}
    assert not any(isinstance(m, Attention) for m in timm.create_model("efficientmod_s_conv").modules())


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        ("efficientmod_xxs", 0.58),
        ("efficientmod_xs", 0.77),
        ("efficientmod_s", 1.40),
        ("efficientmod_s_conv", 1.47),
    ],
)
def test_multiply_adds_are_those_published(name: str, gmacs: float):
    net: Any = timm.create_model(name, device="meta").eval()
    assert round(count_macs(net, (1, 3, 224, 224)) / 1e9, 2) == gmacs


def test_averaged_weights_of_the_authors_files_come_first():
    net, other = families.small("efficientmod_s"), families.small("efficientmod_s")
    with torch.no_grad():
        other.get_parameter("head.fc.bias").add_(1)
    file = {"state_dict": official_state_dict(other), "state_dict_ema": official_state_dict(net)}
    found = identify(file)
    assert found.wrapper == "state_dict_ema"
    assert not load_checkpoint(other, file)
    assert torch.equal(other.get_parameter("head.fc.bias"), net.get_parameter("head.fc.bias"))


def test_an_unactivated_mlp_has_no_activation():
    torch.manual_seed(0)
    mlp = ModulationMlp(8, 1)
    x = torch.randn(1, 2, 2, 8)
    with torch.no_grad():
        mlp.fc1.bias.zero_()
        mlp.context_in.weight.zero_()
        mlp.fc2.bias.zero_()
        torch.testing.assert_close(mlp(-x), -mlp(x))
