from __future__ import annotations

import torch
from torch import nn

from visionattn.inference.ensemble import self_ensemble


def test_the_ensemble_is_the_mean_of_eight_and_equivariant():
    network = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.GELU(), nn.PixelShuffle(2)).double().eval()
    x = torch.rand(1, 3, 7, 10, dtype=torch.float64)
    with torch.no_grad():
        y = self_ensemble(network, x)
        outputs = []
        for turns in range(4):
            for flip in (False, True):
                turned = x.rot90(turns, (-2, -1)).flip(-1) if flip else x.rot90(turns, (-2, -1))
                out = network(turned)
                outputs.append((out.flip(-1) if flip else out).rot90(-turns, (-2, -1)))
        torch.testing.assert_close(y, torch.stack(outputs).mean(0).float())
        for change in (
            lambda z: z.flip(-1),
            lambda z: z.flip(-2),
            lambda z: z.transpose(-1, -2),
            lambda z: z.rot90(1, (-2, -1)),
        ):
            torch.testing.assert_close(self_ensemble(network, change(x)), change(y))
    assert not torch.allclose(network(x.flip(-1)), network(x).flip(-1))
