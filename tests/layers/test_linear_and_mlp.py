"""Linear layers: what a network does with products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
