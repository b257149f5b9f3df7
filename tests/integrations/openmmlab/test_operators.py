from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torchvision

from visionattn.integrations.openmmlab import use_torchvision_operators

assert use_torchvision_operators()  # before mmcv.ops
from mmcv import ops  # noqa: E402


def test_boxes_are_suppressed_as_torchvision_does() -> None:
    boxes = torch.rand(50, 4) * 40
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.rand(50)
    kept, indices = ops.nms(boxes, scores, 0.5)
    wanted = torchvision.ops.nms(boxes, scores, 0.5)
    assert torch.equal(indices, wanted)
    assert 0 < len(wanted) < 50
    assert torch.equal(kept, torch.cat((boxes, scores[:, None]), 1)[wanted])


def test_an_offset_counts_the_last_pixel_as_inside() -> None:
    # Pixels 0 to 9 and 5 to 14: 5 of 15 in common with the offset, 4 of 14 without.
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [5.0, 0.0, 14.0, 9.0]])
    scores = torch.tensor([0.9, 0.8])
    assert len(ops.nms(boxes, scores, 0.3, offset=0)[1]) == 2
    assert len(ops.nms(boxes, scores, 0.3, offset=1)[1]) == 1


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("aligned", [False, True])
def test_regions_and_their_gradient(sampling_ratio: int, aligned: bool) -> None:
    x = torch.randn(2, 3, 20, 24)
    rois = torch.tensor([[0, 1.5, 2.0, 30.0, 25.0], [1, 4.0, 4.0, 11.0, 39.0], [1, 0.0, 0.0, 47.0, 39.0]])
    weight = torch.randn(3, 3, 5, 7)
    results = []
    for align in (
        lambda z: ops.roi_align(z, rois, (5, 7), 0.5, sampling_ratio, "avg", aligned),
        lambda z: torchvision.ops.roi_align(z, rois, (5, 7), 0.5, sampling_ratio, aligned),
    ):
        z = x.clone().requires_grad_()
        out = align(z)
        (out * weight).sum().backward()
        results.append((out.detach(), z.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_largest_values_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        ops.roi_align(torch.randn(1, 1, 8, 8), torch.tensor([[0.0, 0, 0, 4, 4]]), 2, 1.0, 0, "max", True)


def test_other_operators_say_what_they_need() -> None:
    with pytest.raises(NotImplementedError, match="nms_rotated has no stand-in"):
        ops.nms_rotated(torch.rand(3, 5), torch.rand(3), 0.5)


def test_too_late() -> None:
    code = (
        "import sys, types\n"
        "sys.modules['mmcv.ops'] = types.ModuleType('mmcv.ops')\n"
        "from visionattn.integrations.openmmlab import use_torchvision_operators\n"
        "use_torchvision_operators()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "before mmcv.ops is imported" in done.stderr
