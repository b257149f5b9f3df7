"""Windows that move and stretch: the formula, both ways of reading, and what is held at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.layers import VariedSizeWindowAttention2d, WindowAttention2d
from visionattn.layers.windows import varied_window


def layer(**kwargs: Any) -> VariedSizeWindowAttention2d:
    torch.manual_seed(0)
    made = VariedSizeWindowAttention2d(**{"dim": 12, "num_heads": 3, "window_size": 3, **kwargs}).double()
    for parameter in made.transform.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def formula(attn: VariedSizeWindowAttention2d, x: Tensor) -> Tensor:
    """Every pixel by itself, in coordinates from -1 to 1, as the paper writes it."""
    (batch, height, width, _), window, heads = x.shape, attn.window_size, attn.num_heads
    rows, columns = math.ceil(height / window), math.ceil(width / window)
    bottom, right = rows * window - height, columns * window - width
    top, left = (bottom // 2, right // 2) if attn.centred else (0, 0)
    frame = (0, 0, left, right - left, top, bottom - top)
    units = {
        "padded": (columns, rows),
        "whole": (width // window, height // window),
        "swapped": (height // window, width // window),
    }[attn.unit]
    told = attn.transform(F.pad(x, frame).permute(0, 3, 1, 2)).unflatten(1, (heads, 4))
    q, k, v = (F.pad(t, frame).unflatten(-1, (heads, -1)) for t in attn.qkv(x).chunk(3, -1))
    out = torch.zeros_like(q)
    for b in range(batch):
        for head in range(heads):
            planes = torch.cat([k[b, :, :, head], v[b, :, :, head]], -1).permute(2, 0, 1)[None]
            for row in range(rows):
                for column in range(columns):
                    ox, oy, sx, sy = told[b, head, :, row, column]
                    grid = torch.empty(window, window, 2, dtype=x.dtype)
                    for i in range(window):
                        for j in range(window):
                            side_x, side_y = 2 / (columns * window - 1), 2 / (rows * window - 1)
                            ex, ey = (j - (window - 1) / 2) * side_x, (i - (window - 1) / 2) * side_y
                            px = -1 + (column * window + j) * side_x
                            py = -1 + (row * window + i) * side_y
                            grid[i, j, 0] = px + ex * sx + ox / units[0]
                            grid[i, j, 1] = py + ey * sy + oy / units[1]
                    read = F.grid_sample(planes, grid[None], align_corners=True)[0].flatten(1)
                    keys, values = read.chunk(2)
                    lines = slice(row * window, (row + 1) * window)
                    pixels = slice(column * window, (column + 1) * window)
                    logits = q[b, lines, pixels, head].flatten(0, 1) @ keys * attn.scale
                    for i in range(window**2):
                        for j in range(window**2):
                            dy, dx = j // window - i // window, j % window - i % window
                            table = attn.relative_position_bias_table
                            logits[i, j] = logits[i, j] + table[head, dy + window - 1, dx + window - 1]
                    mixed = logits.softmax(-1) @ values.T
                    out[b, lines, pixels, head] = mixed.view(window, window, -1)
    return attn.proj(out[:, top : top + height, left : left + width].flatten(3))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"unit": "whole", "out_dim": 6},
        {"unit": "swapped", "centred": True},
        {"num_heads": 2, "window_size": 2, "centred": True},
    ],
)
def test_equals_the_formula(kwargs: dict[str, Any]):
    attn = layer(**kwargs)
    x = torch.randn(2, 7, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = formula(attn, x)
        torch.testing.assert_close(attn(x), expected)
    # While gradients are recorded, keys are read in another way.
    torch.testing.assert_close(attn(x), expected)


def test_windows_that_stay_are_those_of_swin():
    attn = layer()
    for parameter in attn.transform.parameters():
        torch.nn.init.zeros_(parameter)
    plain = WindowAttention2d(12, 3, 3).double()
    own = {name: value for name, value in attn.state_dict().items() if "transform" not in name}
    plain.load_state_dict(own)
    x = torch.randn(2, 6, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(attn(x), plain(x))


@pytest.mark.parametrize("far", [0.3, 40.0, 1e9])
def test_both_ways_of_reading_agree(far: float):
    torch.manual_seed(0)
    maps = torch.randn(2, 5, 7, 3, 4, dtype=torch.float64)
    y, x = (torch.randn(2, 2, 3, 3, 4, dtype=torch.float64) * far for _ in range(2))
    y[0, 0, 0, 0, :2] = torch.tensor([-1.0, 4.0])  # beyond the map by one pixel, and its last line
    read = varied_window._sum_rows(maps, y, x)
    assert read.shape == (12, 3, 16, 4)
    torch.testing.assert_close(read, varied_window._grid_sample(maps, y, x), atol=1e-7, rtol=1e-7)


def test_reading_at_pixels_gives_their_numbers():
    maps = torch.randn(1, 4, 6, 2, 3)
    y = torch.arange(4.0).view(1, 1, 1, 1, 4).expand(1, 1, 1, 2, 4)
    read = varied_window.sample(maps, y, y)
    expected = maps[:, :, :4].flatten(1, 2).transpose(1, 2)
    torch.testing.assert_close(read, expected)


@pytest.mark.parametrize("train", [False, True])
def test_keys_of_a_few_heads_are_moved_at_a_time(train: bool, monkeypatch: pytest.MonkeyPatch):
    attn = layer()
    x = torch.randn(1, 6, 9, 12, dtype=torch.float64)
    expected = attn(x).detach()
    seen: list[int] = []
    sample = varied_window.sample

    def noted(maps: Tensor, *places: Tensor) -> Tensor:
        seen.append(maps.shape[3])
        return sample(maps, *places)

    monkeypatch.setattr(varied_window, "sample", noted)
    # So many numbers are the keys and values of two heads.
    monkeypatch.setattr(varied_window, "_ON_CPU", 2 * 2 * 6 * 9 * 4)
    with torch.set_grad_enabled(train):
        out = attn(x)
    torch.testing.assert_close(out, expected)
    assert seen == [2, 1]
    if train:
        # They are not kept for the backward pass, but moved again.
        out.sum().backward()
        assert seen == [2, 1, 1, 2]


def test_gradients():
    attn = layer(dim=4, num_heads=2, window_size=2)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in attn.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(attn, dict(zip(names, parameters)), (x,))

    torch.autograd.gradcheck(run, (x, *attn.parameters()), fast_mode=True, nondet_tol=1e-9)


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="a multiple of num_heads, got 12 and 5"):
        VariedSizeWindowAttention2d(12, 5)
    with pytest.raises(ValueError, match="a map of 2x9 has no whole window of 3 pixels"):
        layer(unit="whole")(torch.randn(1, 2, 9, 12, dtype=torch.float64))
