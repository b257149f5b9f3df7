"""NiNformer: images of one size, the identity of the gate, dropout as published."""

from __future__ import annotations

import pytest
import timm
import torch

from visionattn.checkpoints import identify
from visionattn.models.ninformer import NiNformer
from visionattn.models.registry.variants import layout_of


def test_other_sizes_are_refused_with_what_to_do() -> None:
    net = timm.create_model("ninformer_cifar10")
    with pytest.raises(ValueError, match=r"48x32 does not fit.*32x32 pixels.*img_size=\(48, 32\)"):
        net(torch.rand(1, 3, 48, 32))
    assert timm.create_model("ninformer_cifar10", img_size=(48, 32))(torch.rand(1, 3, 48, 32)).shape == (
        1,
        10,
    )


def test_a_block_is_a_gate_and_an_mlp_on_one_norm() -> None:
    torch.manual_seed(0)
    block = NiNformer(embed_dim=8, hidden_dim=12).double().blocks[0]
    x = torch.randn(2, 64, 8, dtype=torch.float64)
    u = block.norm(x)
    tokens = block.mixer.token_mlp
    mixed = u + tokens(block.mixer.norm1(u).mT).mT
    mixed = mixed + block.mixer.channel_mlp(block.mixer.norm2(mixed))
    expected = x + block.proj(u) * mixed
    torch.testing.assert_close(block(x, (8, 8)), expected + block.mlp(block.norm(expected)))


def test_dropout_acts_in_training_only() -> None:
    net = timm.create_model("ninformer_cifar10", proj_drop_rate=0.5)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(net.eval()(x), net(x))
    assert not torch.equal(net.train()(x), net(x))


@pytest.mark.parametrize("size", [32, (16, 40)])
def test_the_size_of_a_checkpoint(size: int | tuple[int, int]) -> None:
    net = timm.create_model("ninformer_cifar10", img_size=size, num_classes=7)
    found = identify(layout_of(net).to_official(net.state_dict(), net))
    again = timm.create_model(found.name, **found.arguments)
    again.load_state_dict(net.state_dict())
    assert found.name == "ninformer_cifar10"
    assert found.arguments == {"num_classes": 7, **({} if size == 32 else {"img_size": (20, 32)})}
    # Of images that are not square no weight tells the sides: the squarest of so many patches are assumed.
    assert again(torch.rand(1, 3, *again.img_size)).shape == (1, 7)
