"""A published BiFormer through the fused kernels in Triton's interpreter; run by `test_biformer.py`."""

from __future__ import annotations

import parity
import torch
from test_parity import TOLERANCE, build, fixtures, outputs

from visionattn.kernels import use_backend


def test_the_dense_fixture() -> None:
    (path,) = (path for path in fixtures() if path.stem == "biformer_tiny_dense_200x264")
    net, stored, image = build(path)
    with torch.inference_mode(), use_backend("triton"):
        ours = outputs(net, image)
    errors = {name: parity.error(ours[name], expected) for name, expected in stored.items()}
    assert all(error <= TOLERANCE for error in errors.values()), errors
