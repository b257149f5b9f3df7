from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import list_models
from torch import Tensor

import visionattn
from visionattn.layers.overlapping_patches import _overlapping_patches
from visionattn.models.catanet import (
    LAYOUT,
    CATANet,
    LocalAttention,
    TokenAggregation,
)

SMALL: dict[str, Any] = {"patch_sizes": (8, 12), "num_centres": (5, 9), "group_sizes": (32, 20)}


def small(**kwargs: Any) -> CATANet:
    torch.manual_seed(0)
    return timm.create_model("catanet_x2", **{**SMALL, **kwargs})


def image(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def initialised(net: CATANet) -> CATANet:
    for block in net.blocks:
        block.initialised.fill_(True)
    return net


@pytest.mark.parametrize("variant", ["catanet_x2", "catanet_x3", "catanet_x4"])
def test_official_variants(variant: str):
    assert sorted(list_models("catanet*")) == ["catanet_x2", "catanet_x3", "catanet_x4"]
    net = timm.create_model(variant)
    assert net.info.upscale == int(variant[-1])
    cfg = net.pretrained_cfg
    assert cfg["tag"] == "div2k"
    assert cfg["url"].endswith(f"/v0.0/x{variant[-1]}.pth")
    assert cfg["notes"][0].count("/.") == 5


def refine_by_formula(tokens: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """Move each centre to the direction of the sum of the unit tokens nearest to it, over the whole batch."""
    tokens = F.normalize(tokens.flatten(0, 1), dim=-1)
    for _ in range(iterations):
        centres = F.normalize(centres, dim=-1)
        nearest = (tokens @ centres.T).argmax(-1)
        moved = [
            F.normalize(tokens[nearest == j].sum(0), dim=-1) if (nearest == j).any() else centre
            for j, centre in enumerate(centres)
        ]
        centres = torch.stack(moved)
    return centres


def test_centres_in_training():
    torch.manual_seed(0)
    layer = TokenAggregation(40, 36, 4, 96, num_centres=7, group_size=16, iterations=5).double().train()
    x, start = torch.randn(3, 6, 8, 40).double(), torch.randn(7, 40).double()
    # No token is nearest to the opposite of their common direction: this centre keeps its direction.
    with torch.no_grad():
        layer.norm.bias.fill_(3)
    start[2] = -1
    _, centres = layer(x, start, torch.tensor(True))
    expected = refine_by_formula(layer.norm(x).flatten(1, 2), start, 5)
    torch.testing.assert_close(centres, expected)
    torch.testing.assert_close(centres[2], F.normalize(start[2], dim=0))
    assert not centres.requires_grad

    layer.eval()
    _, unmoved = layer(x, start, torch.tensor(True))
    assert torch.equal(unmoved, start)


def test_training_begins_with_means_of_consecutive_tokens():
    torch.manual_seed(0)
    layer = TokenAggregation(40, 36, 4, 96, num_centres=4, group_size=16, iterations=1).double().train()
    x = torch.randn(2, 3, 4, 40).double()
    _, centres = layer(x, torch.zeros(4, 40).double(), torch.tensor(False))
    tokens = layer.norm(x).flatten(1, 2)
    # 12 tokens divide by 4, but a whole segment of mirrored tokens is added all the same.
    filled = torch.cat((tokens, tokens[:, -4:].flip(1)), 1)
    means = torch.stack([filled[:, 4 * j : 4 * j + 4].mean((0, 1)) for j in range(4)])
    torch.testing.assert_close(centres, refine_by_formula(tokens, means, 1))


def test_stored_centres_follow_training_and_stay_in_evaluation():
    net = small().train()
    block = net.blocks[0]
    x = image(2, 3, 16, 20)
    tokens = block.aggregation.norm(net.conv_first(x).permute(0, 2, 3, 1)).flatten(1, 2).detach()
    assert not block.initialised
    net(x)
    assert block.initialised
    # The first step copies, later ones average.
    first = block.centres.clone()
    torch.testing.assert_close(first.norm(dim=1), torch.ones(5))
    net(x)
    expected = 0.999 * first + 0.001 * refine_by_formula(tokens, first, 5)
    torch.testing.assert_close(block.centres, expected)

    before = {name: value.clone() for name, value in net.named_buffers()}
    net.eval()(x)
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


def test_gradients_reach_every_parameter_and_checkpointing_changes_nothing():
    grads, buffers = [], []
    for checkpointing in (False, True):
        net = initialised(small()).train()
        net.set_grad_checkpointing(checkpointing)
        net(image(2, 3, 17, 24)).square().mean().backward()
        grads.append({name: p.grad for name, p in net.named_parameters()})
        buffers.append(dict(net.named_buffers()))
    for name, grad in grads[0].items():
        assert grad is not None, name
        assert grad.isfinite().all(), name
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grads[1][name], grad, msg=name)
    for name, value in buffers[0].items():
        assert torch.equal(buffers[1][name], value), name


def attend_by_formula(layer: TokenAggregation, tokens: Tensor, order: Tensor, centres: Tensor) -> Tensor:
    """One image, one group and one head after the other; `[N, C]`."""
    tokens = tokens[order]
    q, k, v = (m(tokens).unflatten(-1, (4, -1)) for m in (layer.qkv.q, layer.qkv.k, layer.qkv.v))
    far_k, far_v = (m(centres).unflatten(-1, (4, -1)) for m in (layer.centre_kv.k, layer.centre_kv.v))
    count, size = len(tokens), min(len(tokens), layer.group_size)
    groups = -(-count // size)
    # Beyond the end the sequence comes back, and turns round again where it is shorter than that.
    k, v = (torch.cat((t, t.flip(0), t)) for t in (k, v))
    out = torch.empty_like(tokens)
    for g in range(groups):
        own = slice(g * size, min((g + 1) * size, count))
        both = slice(g * size, (g + 2) * size)
        near = torch.einsum("qhd,khd->hqk", q[own], k[both]).div(3).softmax(-1)
        far = torch.einsum("qhd,khd->hqk", q[own], far_k).div(3).softmax(-1)
        values = torch.einsum("hqk,khd->qhd", near, v[both]) + torch.einsum("hqk,khd->qhd", far, far_v)
        out[order[own]] = values.flatten(1)
    return out


@pytest.mark.parametrize("count", [16, 21, 32, 39])
@pytest.mark.parametrize("group_size", [8, 16])
def test_attention_by_content_follows_the_formula(count: int, group_size: int):
    torch.manual_seed(count)
    layer = TokenAggregation(40, 36, 4, 96, num_centres=6, group_size=group_size, iterations=5).double()
    tokens, centres = torch.randn(2, count, 40).double(), torch.randn(6, 40).double()
    order = torch.stack([torch.randperm(count) for _ in range(2)])
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.3)
        actual = layer._attend(tokens, order, centres)
        expected = torch.stack([attend_by_formula(layer, t, o, centres) for t, o in zip(tokens, order)])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_tokens_of_one_centre_stay_in_their_order():
    torch.manual_seed(0)
    layer = TokenAggregation(40, 36, 4, 96, num_centres=1, group_size=8, iterations=5).double().eval()
    x, centres = torch.randn(1, 20, 20, 40).double(), torch.randn(1, 40).double()
    with torch.no_grad():
        out = attend_by_formula(layer, layer.norm(x)[0].flatten(0, 1), torch.arange(400), centres)
        y = x + layer.out(layer.proj(out)).view_as(x)
        torch.testing.assert_close(layer(x, centres, torch.tensor(True))[0], y + layer.mlp(y))


def local_by_formula(layer: LocalAttention, x: Tensor) -> Tensor:
    """Crop, attend, add up, halve: the steps of the official code."""
    height, width = x.shape[1:3]
    patch, step = layer.patch_size, layer.patch_size - 2
    tops, lefts = ([min(i, n - patch) for i in range(0, n - 2, step)] for n in (height, width))
    out = torch.zeros_like(x)
    for top in tops:
        for left in lefts:
            rows, columns = slice(top, top + patch), slice(left, left + patch)
            crop = x[:, rows, columns].flatten(1, 2)
            y = layer.norm(crop)
            projections = (layer.qkv.q, layer.qkv.k, layer.qkv.v)
            q, k, v = (project(y).unflatten(-1, (4, -1)).transpose(1, 2) for project in projections)
            attended = ((q @ k.mT / 3).softmax(-1) @ v).transpose(1, 2).flatten(2)
            out[:, rows, columns] += (crop + layer.proj(attended)).unflatten(1, (patch, patch))
    for i in range(step, height - 2, step):
        out[:, min(i, height - patch) : i + 2] /= 2
    for j in range(step, width - 2, step):
        out[:, :, min(j, width - patch) : j + 2] /= 2
    return out + layer.mlp(out)


@pytest.mark.parametrize("size", [(8, 8), (8, 14), (15, 9), (22, 27)])
def test_local_attention_follows_the_formula(size: tuple[int, int]):
    torch.manual_seed(0)
    layer = LocalAttention(40, 36, 4, 96, patch_size=8).double()
    x = torch.randn(2, *size, 40).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.3)
        torch.testing.assert_close(layer(x), local_by_formula(layer, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("side", "patch"), [(31, 16), (45, 16), (59, 16), (55, 28), (81, 28)])
def test_pixels_of_three_patches_weigh_three_quarters(side: int, patch: int):
    _, times, factor = _overlapping_patches(side, patch, torch.device("cpu"))
    assert (times == 3).any()
    assert set((times * factor).tolist()) == {1.0, 0.75}


@pytest.mark.parametrize("size", [(20, 33), (15, 15), (28, 27)])
def test_small_images_are_reflected_up_to_the_largest_patch(size: tuple[int, int]):
    net = initialised(small(patch_sizes=(16, 28))).eval()
    x = image(1, 3, *size)
    padded = F.pad(x, (0, max(28 - size[1], 0), 0, max(28 - size[0], 0)), mode="reflect")
    with torch.no_grad():
        torch.testing.assert_close(net(x), net(padded)[..., : 2 * size[0], : 2 * size[1]])


def test_too_small_images_are_refused():
    assert timm.create_model("catanet_x2").info.min_size == 15
    with pytest.raises(ValueError, match="each side must be at least 15 pixels"):
        timm.create_model("catanet_x2")(image(1, 3, 14, 40))


def test_settings_for_different_numbers_of_blocks_are_refused():
    with pytest.raises(ValueError, match="got 2, 3 and 2 entries"):
        small(num_centres=(4, 5, 6))


def test_same_size_restoration():
    net = small(upscale=1).eval()
    with torch.no_grad():
        assert net(image(1, 3, 13, 19)).shape == (1, 3, 13, 19)


def test_routing_keeps_float32_under_autocast():
    layer = TokenAggregation(40, 36, 4, 96, num_centres=6, group_size=16, iterations=5).train()
    with torch.autocast("cpu", torch.bfloat16):
        y, centres = layer(torch.randn(1, 6, 6, 40), torch.randn(6, 40), torch.tensor(True))
    assert centres.dtype == torch.float32
    assert y.isfinite().all()


def test_checkpoint_round_trip_and_official_files_without_the_note(tmp_path: Path):
    net, other = initialised(small()).eval(), small().eval()
    visionattn.save_checkpoint(net, tmp_path / "catanet.safetensors")
    visionattn.load_checkpoint(other, tmp_path / "catanet.safetensors")
    assert all(block.initialised for block in other.blocks)
    with torch.no_grad():
        assert torch.equal(other(image(1, 3, 20, 17)), net(image(1, 3, 20, 17)))

    bare = {name: value for name, value in net.state_dict().items() if not name.endswith("initialised")}
    converted = LAYOUT.checkpoint_filter_fn({"params": bare}, net)
    assert converted.keys() == net.state_dict().keys()
    assert all(converted[f"blocks.{i}.initialised"] for i in range(2))
    official = {"blocks.0.0.means": net.blocks[0].centres, "blocks.0.0.initted": torch.tensor(False)}
    assert not LAYOUT.checkpoint_filter_fn(official, net)["blocks.0.initialised"]
