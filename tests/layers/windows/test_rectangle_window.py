from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.layers.maps import on_nhwc
from visionattn.layers.windows.rectangle_window import DynamicPositionBias, RectangleWindowAttention


def attend_by_formula(layer: RectangleWindowAttention, x: Tensor) -> Tensor:
    """Fill up, roll, cut into windows, mask by regions: one step after the other."""
    height, width = x.shape[1:3]
    qkv = layer.qkv(x)
    local = on_nhwc(layer.lepe, qkv.chunk(3, -1)[2])
    multiple = max(layer.windows[0])
    qkv = F.pad(qkv, (0, 0, 0, -width % multiple, 0, -height % multiple))
    halves = qkv.unflatten(-1, (3, 2, layer.num_heads // 2, -1)).unbind(4)
    out = []
    for half, (rows, columns), bias in zip(halves, layer.windows, layer.position_bias):
        shift = (rows // 2, columns // 2) if layer.shifted else (0, 0)
        rolled = half.roll((-shift[0], -shift[1]), (1, 2))
        windows = rolled.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)
        q, k, v = windows.flatten(3, 4).permute(4, 0, 1, 2, 5, 3, 6)
        logits = q @ k.mT * q.shape[-1] ** -0.5 + bias_by_formula(bias, rows, columns, layer.num_heads // 2)
        if layer.mask_shift:
            # Pixels that the roll brought from the other side are another region.
            y = torch.arange(rolled.shape[1]).add(shift[0]) // rolled.shape[1]
            x_ = torch.arange(rolled.shape[2]).add(shift[1]) // rolled.shape[2]
            region = (2 * y[:, None] + x_).unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
            region = region.transpose(1, 2).flatten(2)
            apart = region[..., :, None] != region[..., None, :]
            logits = logits.masked_fill(apart[None, :, :, None], float("-inf"))
        values = (logits.softmax(-1) @ v).transpose(3, 4).unflatten(3, (rows, columns))
        out.append(values.transpose(2, 3).flatten(3, 4).flatten(1, 2).roll(shift, (1, 2)))
    return layer.proj(torch.cat(out, 3).flatten(3)[:, :height, :width] + local)


def bias_by_formula(bias: DynamicPositionBias, rows: int, columns: int, heads: int) -> Tensor:
    y, x = (n.flatten() for n in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    if bias.width == 1:
        return torch.zeros(heads, rows * columns, rows * columns)
    offsets = torch.stack((y[:, None] - y, x[:, None] - x), -1).to(bias.pos_proj.weight)
    return bias.pos3(bias.pos2(bias.pos1(bias.pos_proj(offsets)))).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (3, 9), (17, 6), (13, 21)])
@pytest.mark.parametrize(("shifted", "mask_shift"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("dim", [32, 64])
def test_values_and_gradients_follow_the_formula(
    size: tuple[int, int], shifted: bool, mask_shift: bool, dim: int
):
    torch.manual_seed(0)
    layer = RectangleWindowAttention(dim, 4, (2, 8), shifted, mask_shift).double()
    x = torch.randn(2, *size, dim).double()
    expected = attend_by_formula(layer, x)
    upstream = torch.randn_like(expected)
    trained = [p for p in layer.parameters() if p.requires_grad]
    expected_grads = torch.autograd.grad((expected * upstream).sum(), trained)
    actual = layer(x)
    actual_grads = torch.autograd.grad((actual * upstream).sum(), trained)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(actual_grads, expected_grads):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_bias_of_width_one_is_the_same_for_every_offset():
    bias = DynamicPositionBias(1, 3, (4, 16))
    assert bias() is None
    assert not any(p.requires_grad for p in bias.parameters())
    offsets = torch.randn(50, 2)
    values = bias.pos3(bias.pos2(bias.pos1(bias.pos_proj(offsets))))
    assert values.std(0).max() == 0


@pytest.mark.parametrize(("dim", "num_heads"), [(30, 3), (32, 6)])
def test_heads_that_do_not_fit_are_refused(dim: int, num_heads: int):
    with pytest.raises(ValueError, match="num_heads must be even and divide the channels"):
        RectangleWindowAttention(dim, num_heads, (2, 8))
