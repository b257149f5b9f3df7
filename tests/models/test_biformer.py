"""BiFormer under every implementation of its attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from visionattn.kernels import topk_regions, use_backend
from visionattn.layers import BiLevelRoutingAttention

SMALL = {"depths": (1, 1, 2, 1), "embed_dims": (32, 64, 64, 64), "n_win": 3, "topks": (1, 2, 3, -2)}


def test_every_backend_takes_the_same_decisions(monkeypatch: pytest.MonkeyPatch):
    net = timm.create_model("biformer_tiny", **SMALL).eval()
    # A trained network tells its regions apart; a fresh one hardly does.
    for name, p in net.named_parameters():
        if "qkv" in name:
            torch.nn.init.normal_(p, std=0.5)
    decisions: list[Tensor] = []

    def noted(*args, **options) -> Tensor:
        decisions.append(topk_regions(*args, **options))
        return decisions[-1]

    for module in net.modules():
        if isinstance(module, BiLevelRoutingAttention):
            monkeypatch.setattr(module, "selector", module.selector._replace(regions=noted))
    image = torch.rand(2, 3, 96, 72)
    with torch.inference_mode():
        for backend in ("reference", "torch"):
            with use_backend(backend):
                net(image)
    ours, theirs = decisions[:4], decisions[4:]
    assert len(theirs) == 4
    assert all(map(torch.equal, ours, theirs))
    assert len({tuple(row) for row in decisions[1].flatten(0, 2).tolist()}) > 1


@pytest.mark.slow  # the interpreter takes minutes for the thousands of tiles of a network
def test_the_fused_kernels_reproduce_a_fixture(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "kernels"))
    from triton_tools import run_interpreted

    run_interpreted(Path(__file__).with_name("interpreted_biformer.py"))
