"""The published Agent, InLine and L2ViT networks in every host: outputs and gradients are ours."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from benchmarks.models import formulation_of

DEIT: dict[str, Any] = {"img_size": (64, 128), "embed_dim": 32, "num_heads": 2, "depth": 2}
PVT: dict[str, Any] = {
    "img_size": (64, 128),
    "depths": (1,) * 4,
    "embed_dims": (16,) * 4,
    "num_heads": (2,) * 4,
}
# Windows of 2 pixels are shifted on all maps but the last.
SWIN: dict[str, Any] = {
    "img_size": (64, 128),
    "depths": (2,) * 4,
    "embed_dim": 8,
    "num_heads": (2,) * 4,
    "global_blocks": (1, 1, 0, 0),
    "window_size": 2,
}
CSWIN: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (2,) * 4, "stripe": 2}
L2VIT: dict[str, Any] = {"depths": (2,) * 4, "embed_dims": (16,) * 4, "num_heads": (2,) * 4, "window_size": 3}
SMALL = {
    "agent_deit_tiny": DEIT,
    "agent_deit_base": {**DEIT, "global_blocks": 1},
    "agent_pvt_tiny": PVT,
    "agent_swin_tiny": SWIN,
    "agent_cswin_tiny": {**CSWIN, "img_size": (64, 128)},
    "inline_deit_tiny": DEIT,
    "inline_pvt_tiny": PVT,
    "inline_swin_tiny": SWIN,
    "inline_cswin_tiny": CSWIN,
    "l2vit_t": L2VIT,
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_equals_our_network(name: str, train: bool) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5, **SMALL[name]).double().train(train)
    with torch.no_grad():
        for parameter in net.parameters():  # biases as large as what they are added to
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    image = torch.rand(2, 3, 64, 128, dtype=torch.float64)

    def outcome() -> list[torch.Tensor]:
        if not train:
            with torch.inference_mode():
                return [net(image)]
        net.zero_grad()
        out = net(image)
        out.square().mean().backward()
        return [out.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    ours = outcome()
    with formulation_of(name).in_place_of_kernels(net):
        torch.testing.assert_close(outcome(), ours)
