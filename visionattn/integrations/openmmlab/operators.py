"""torchvision's operators in place of mmcv's compiled ones, for installations without a compiler."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torchvision
from torch import Tensor

_NAME = "mmcv._ext"


def use_torchvision_operators() -> bool:
    """Let mmcv suppress boxes and align regions with torchvision, where it has no compiled operators.

    Call it before anything imports `mmcv.ops`, as mmdetection does. The results are those of mmcv's own
    operators on the CPU. Every other operator raises when it is called.

    Returns:
        Whether torchvision's operators are in use; False where mmcv has its own, which stay.

    Raises:
        RuntimeError: `mmcv.ops` was imported before.
    """
    if isinstance(sys.modules.get(_NAME), _Operators):
        return True
    if find_spec(_NAME) is not None:
        return False
    if "mmcv.ops" in sys.modules:
        raise RuntimeError("call use_torchvision_operators() before mmcv.ops is imported")
    sys.modules[_NAME] = _Operators(_NAME)
    return True


class _Operators(ModuleType):
    """A stand-in for mmcv's compiled module; mmcv asks it for every operator's name at import."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _OPERATORS.get(name) or _missing(name)


def _missing(name: str) -> Callable[..., Any]:
    def raise_error(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(
            f"{name} has no stand-in in torchvision; it needs mmcv's compiled operators"
        )

    return raise_error


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes `[N, 4]` that are kept, best first; `offset` 1 counts the last pixel as inside."""
    if offset:
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), 1)
    return torchvision.ops.nms(boxes, scores, iou_threshold)


def _roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    _only_average(pool_mode)
    size = (aligned_height, aligned_width)
    output.copy_(torchvision.ops.roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned))


def _roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    _only_average(pool_mode)
    with torch.enable_grad():
        # The operator is linear in its input: its gradient does not depend on where it is taken.
        anywhere = torch.zeros_like(grad_input, requires_grad=True)
        size = (aligned_height, aligned_width)
        out = torchvision.ops.roi_align(anywhere, rois, size, spatial_scale, sampling_ratio, aligned)
        grad_input.copy_(torch.autograd.grad(out, anywhere, grad_output)[0])


def _only_average(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError("torchvision's RoI align averages; pool_mode='max' needs mmcv's operators")


_OPERATORS: dict[str, Callable[..., Any]] = {
    "nms": _nms,
    "roi_align_forward": _roi_align_forward,
    "roi_align_backward": _roi_align_backward,
}
