"""HaloNet: the published sizes, timm's own H1 with our attention, and maps that blocks do not divide."""

from __future__ import annotations

import pytest
import timm
import torch
from families import small

import visionattn
from visionattn.layers import HaloAttention2d
from visionattn.models.halonet import HaloNet


def shaken(net: torch.nn.Module) -> torch.nn.Module:
    """Give batch norms statistics."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


# Table 3 of the paper, in millions; H1 is timm's.
@pytest.mark.parametrize(
    ("name", "published"),
    [("h0", 5.5), ("h2", 9.4), ("h3", 11.8), ("h4", 19.1), ("h5", 30.7), ("h6", 43.4), ("h7", 67.4)],
)
def test_published_sizes(name: str, published: float) -> None:
    net = timm.create_model(f"halonet_{name}", device="meta")
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(published, abs=0.06)


def test_timms_h1_loads_and_gives_the_same() -> None:
    torch.manual_seed(0)
    theirs = shaken(timm.create_model("halonet_h1"))
    ours = HaloNet(num_heads=(8, 8, 8, 8)).eval()
    assert not visionattn.load_checkpoint(ours, theirs.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        expected = theirs(x)
        assert (ours(x) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (9, 5), (1, 1), (3, 16)])
def test_attention_is_its_formula(stride: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block, halo, heads = 4, 1, 2
    attn = HaloAttention2d(6, heads, block, halo, value_dim=8, stride=stride).double()
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    out = attn(x)
    rows, columns = (-(-side // stride) for side in size)
    assert out.shape == (2, rows, columns, 8)
    q, kv = attn.q(x).unflatten(-1, (heads, -1)), attn.kv(x).unflatten(-1, (heads, -1))
    k, v = kv.split([3, 4], -1)
    window = block + 2 * halo
    for i, j in ((0, 0), (rows - 1, columns - 1), (rows // 2, columns // 2)):
        y, x_ = i * stride, j * stride
        top, left = y // block * block - halo, x_ // block * block - halo
        query = q[:, y, x_]
        logits, values = [], []
        for row in range(window):
            for column in range(window):
                # Distances count queries: rows and columns of the block that the stride leaves.
                dy = row - y % block // stride + window - 1
                dx = column - x_ % block // stride + window - 1
                inside = 0 <= top + row < size[0] and 0 <= left + column < size[1]
                key = k[:, top + row, left + column] if inside else torch.zeros_like(query)
                value = v[:, top + row, left + column] if inside else torch.zeros_like(v[:, 0, 0])
                relative = attn.height_rel[dy] + attn.width_rel[dx]
                logits.append((query * (key * attn.scale + relative)).sum(-1))
                values.append(value)
        weights = torch.stack(logits, -1).softmax(-1)
        expected = torch.einsum("bhn,bhnd->bhd", weights, torch.stack(values, -2))
        torch.testing.assert_close(out[:, i, j], expected.flatten(1))


def test_what_weights_tell() -> None:
    net = small("halonet_h0", num_classes=3)
    identity = visionattn.identify(net.state_dict())
    assert identity.arguments["value_ratio"] == 1.5
    assert identity.arguments["depths"] == (1, 2, 1, 1)
    full = timm.create_model("halonet_h4", device="meta")
    assert str(visionattn.identify(full.state_dict())).startswith('timm.create_model("halonet_h4")')


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of num_heads"):
        HaloAttention2d(6, 4)
    with pytest.raises(ValueError, match="multiple of stride"):
        HaloAttention2d(6, 2, block_size=5, stride=2)
