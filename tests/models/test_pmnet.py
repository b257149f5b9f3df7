"""PMNet: its attention, its intermediate outputs, and sizes."""

from __future__ import annotations

import copy
from pathlib import Path

import parity
import pytest
import timm
import torch
import torch.nn.functional as F

import visionattn
from visionattn.models import PMNet
from visionattn.models.pmnet import (
    AdaptiveFusion,
    ContextualTransformer,
    MultiBranchHybridAttention,
    SeparableHybridAttention,
)

FIXTURE = Path(__file__).parents[1] / "parity" / "pmnet" / "pmnet.safetensors"


def network(**kwargs) -> PMNet:
    return timm.create_model("pmnet_small", **kwargs)


def test_all_outputs_of_the_published_definition():
    meta, stored = parity.load(FIXTURE)
    net = timm.create_model("pmnet").eval()
    assert not visionattn.load_checkpoint(net, parity.state_dict(meta))
    with torch.no_grad():
        out = net.forward_all(parity.example(meta))
    errors = {name: parity.error(getattr(out, name), expected) for name, expected in stored.items()}
    assert set(errors) == {"image", "pseudo", "density"}
    assert max(errors.values()) <= 1e-5, errors


def test_sizes_of_the_modules_agree_with_the_papers_table():
    # 32 channels; the table prints 2.6 K, 22.2 K and 38.3 K.
    modules = SeparableHybridAttention(32), MultiBranchHybridAttention(32), ContextualTransformer(32)
    sha, mha, cot = (sum(p.numel() for p in module.parameters()) for module in modules)
    assert (sha, mha, mha + cot + 1) == (2600, 22152, 38313)


def test_separable_hybrid_attention():
    sha = SeparableHybridAttention(8)
    x = torch.randn(2, 8, 5, 7)
    rows = x.mean(3, keepdim=True) + x.max(3, keepdim=True).values
    columns = x.mean(2, keepdim=True) + x.max(2, keepdim=True).values
    lines = torch.cat((rows, columns.transpose(2, 3)), 2)
    lines = lines.view(2, 4, 2, 12, 1).transpose(1, 2).reshape(2, 8, 12, 1)
    rows, columns = F.relu6(sha.reduce(lines)).split((5, 7), 2)
    gate = sha.expand(rows) * sha.expand(columns.transpose(2, 3))
    torch.testing.assert_close(sha(x), x * gate.sigmoid())


def test_contextual_transformer_averages_nine_predictions():
    cot = ContextualTransformer(8)
    x = torch.randn(2, 8, 5, 6)
    key = F.elu(F.instance_norm(cot.key(x)))
    y = F.elu(F.instance_norm(cot.att1(torch.cat((key, x), 1))))
    logits = cot.att2(y).view(2, 8, 9, 30).mean(2)
    value = F.instance_norm(cot.value(x))
    torch.testing.assert_close(cot(x), key + logits.softmax(-1).view_as(x) * value)


def test_adaptive_fusion():
    fusion, a, b = AdaptiveFusion(), torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(fusion(a, b), (a + b) / 2)
    with torch.no_grad():
        fusion.theta.fill_(30.0)
    torch.testing.assert_close(fusion(a, b), a)


def test_image_alone_or_with_all_outputs():
    net = network().eval()
    x = torch.rand(2, 3, 10, 13)
    out = net.forward_all(x)
    torch.testing.assert_close(net(x), out.image)
    assert [tuple(each.shape) for each in out] == [(2, 3, 10, 13), (2, 3, 10, 13), (2, 1, 10, 13)]
    assert ((out.density > 0) & (out.density < 1)).all()


@pytest.mark.parametrize("size", [(3, 3), (4, 4), (3, 30), (17, 22)])
def test_odd_sizes_are_padded_by_reflection_and_cropped(size: tuple[int, int]):
    net = network().eval()
    x = torch.rand(1, 3, *size)
    padded = F.pad(x, (0, -size[1] % 4, 0, -size[0] % 4), mode="reflect")
    out = net(x)
    assert out.isfinite().all()
    torch.testing.assert_close(out, net(padded)[..., : size[0], : size[1]])


def test_too_small_an_image():
    with pytest.raises(ValueError, match="at least 3 pixels"):
        network()(torch.rand(1, 3, 8, 2))


def test_images_of_a_batch_do_not_mix():
    net = network().train()
    x = torch.rand(2, 3, 8, 12)
    torch.testing.assert_close(net(x)[1:], net(x[1:]))


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_channels(in_chans: int):
    net = network(in_chans=in_chans)
    assert net.info.channels == in_chans
    assert net(torch.rand(1, in_chans, 8, 8)).shape == (1, in_chans, 8, 8)


def test_every_parameter_gets_a_gradient_but_one_bias():
    net = network().train()
    for module in net.modules():
        if isinstance(module, SeparableHybridAttention):
            # The two hidden channels of the small network would otherwise be cut off for some images.
            torch.nn.init.constant_(module.reduce.bias, 2.0)
    net(torch.rand(2, 3, 12, 16)).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        if name.endswith("cot.att2.bias"):  # one number for all positions cancels in their softmax
            assert p.grad.abs().max() < 1e-6, name
        else:
            assert p.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_nothing():
    net = network().train()
    other = copy.deepcopy(net)
    other.set_grad_checkpointing()
    x = torch.rand(1, 3, 8, 12)
    net(x).square().mean().backward()
    other(x).square().mean().backward()
    for p, q in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_state_dict_round_trip(tmp_path: Path):
    net, other = network().eval(), network().eval()
    visionattn.save_checkpoint(net, tmp_path / "net.safetensors")
    assert not visionattn.load_checkpoint(other, tmp_path / "net.safetensors")
    x = torch.rand(1, 3, 9, 8)
    assert torch.equal(net(x), other(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match="multiples of 4"):
        network(deep_dim=6)
