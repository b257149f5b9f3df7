"""Linear layers: what a network does with products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.layers import linear as module
from visionattn.layers.linear import Mlp


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_mlp(mode):
    torch.manual_seed(0)
    mlp: Any = Mlp(8, 20)
    x = torch.randn(3, 8)
    hidden = F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias))
    expected = F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias)
    with mode():
        torch.testing.assert_close(mlp(x), expected)
        seen: list[Tensor] = []
        mlp.act.register_forward_hook(lambda module, args, out: seen.extend([*args, out]))
        torch.testing.assert_close(mlp(x), expected)
    torch.testing.assert_close(seen, [F.linear(x, mlp.fc1.weight, mlp.fc1.bias), hidden])
    mlp.act = nn.GELU("tanh")
    with mode():
        torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh")))
    mlp.act, mlp.fc1 = nn.ReLU(), nn.Linear(8, 20)
    with mode():
        torch.testing.assert_close(mlp(x), mlp.fc2(mlp.fc1(x).relu()))


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (7, 4)])
def test_large_maps_pass_pixelwise_branches_in_pieces(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    sizes = []

    def branch(x: Tensor) -> Tensor:
        sizes.append(x[..., 0].numel())
        return x.square()

    x = torch.randn(shape)
    pixels, expected = x[..., 0].numel(), x + x.square()
    assert torch.equal(module.add_pixelwise(x.clone(), branch, 8, training=False), expected)
    monkeypatch.setattr(module, "_IN_CACHE", 0)
    monkeypatch.setattr(module, "_PIECE", 3)
    assert torch.equal(module.add_pixelwise(x.clone(), branch, 8, training=False), expected)
    with torch.no_grad():
        assert torch.equal(module.add_pixelwise(x.clone(), branch, 8, training=True), expected)
        assert sizes == [pixels] * 3
        strided = x.clone().transpose(0, -2)
        assert torch.equal(
            module.add_pixelwise(strided, branch, 8, training=False), expected.transpose(0, -2)
        )
    assert sum(sizes) == 4 * pixels
    assert max(sizes[3:]) <= 3 * torch.get_num_threads()
