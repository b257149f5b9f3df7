"""Backbones of any kind under the heads of detectors and segmenters, and their weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.data import resolve_data_config
from torch import Tensor, nn

from visionattn.checkpoints import LoadReport, load_checkpoint, read_checkpoint, unwrap_state_dict
from visionattn.engine.config import ModelConfig, Section
from visionattn.engine.network import create_network, evaluating
from visionattn.errors import InputError, as_input_error
from visionattn.tasks.dense.data import DenseData

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class BackboneOptions(Section):
    """How the network is used as a backbone."""

    out_indices: list[int] | None = Field(
        default=None, min_length=1, description="its maps in use; null: the last of every stride in use"
    )
    size_divisor: int | None = Field(
        default=None,
        gt=0,
        description="images are filled up to multiples of it; null: where the network needs it",
    )
    norm_eval: bool = Field(default=False, description="keep the statistics of its batch norms as they are")
    no_decay: list[str] = Field(
        default=[],
        description="parameters without weight decay, by parts of their names, beside its own choice",
    )


class DenseBackbone(nn.Module):
    """A network's maps at several resolutions, for images of any size.

    Images are filled up with zeros on the right and bottom to what the network needs; the maps cover the
    image alone, `ceil(side / stride)` per side.

    Args:
        body: a network made by timm with `features_only=True`.
        options: how it is used.

    Attributes:
        channels: of each map, the finest first.
        strides: of each map in pixels.
    """

    def __init__(self, body: Any, options: BackboneOptions) -> None:
        super().__init__()
        self.body = body
        self.channels: list[int] = body.feature_info.channels()
        self.strides: list[int] = body.feature_info.reduction()
        self.norm_eval, self.no_decay = options.norm_eval, options.no_decay
        stated: int | None = getattr(getattr(body, "model", body), "min_size", None)
        self.min_size = stated or 1
        self.size_divisor = options.size_divisor or self._needed_divisor(stated)
        self.train()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images `[B, 3, H, W]` to maps `[B, C_i, ceil(H / s_i), ceil(W / s_i)]`."""
        height, width = images.shape[-2:]
        bottom, right = (self._filled(side) - side for side in (height, width))
        maps = self.body(F.pad(images, (0, right, 0, bottom)))
        return [
            x[..., : math.ceil(height / stride), : math.ceil(width / stride)]
            for x, stride in zip(maps, self.strides, strict=True)
        ]

    def train(self, mode: bool = True) -> DenseBackbone:
        """Training or evaluation mode, which batch norms do not follow where they are to be kept."""
        super().train(mode)
        if self.norm_eval:
            for module in self.body.modules():
                if isinstance(module, _BATCH_NORMS):
                    module.eval()
        return self

    def undecayed(self) -> set[str]:
        """Names of its parameters that are not decayed: by the network's own choice and by the options."""
        network = getattr(self.body, "model", self.body)
        own = network.no_weight_decay() if hasattr(network, "no_weight_decay") else set()
        prefix = "body." if network is self.body else "body.model."
        return {prefix + name for name in own} | {
            name
            for name, _ in self.body.named_parameters(prefix="body")
            if any(part in name for part in self.no_decay)
        }

    def _filled(self, side: int) -> int:
        return self.size_divisor * math.ceil(max(side, self.min_size) / self.size_divisor)

    def _needed_divisor(self, min_size: int | None) -> int:
        """1 where the network rounds the sizes of its maps up, as most of ours do."""
        if min_size is None:
            return max(self.strides)
        side = max(min_size, *self.strides) + 1
        with evaluating(self.body):
            maps = self.body(torch.zeros(1, 3, side, side))
        rounds_up = all(x.shape[-1] == math.ceil(side / s) for x, s in zip(maps, self.strides, strict=True))
        return 1 if rounds_up else max(self.strides)


def create_body(model: ModelConfig, options: BackboneOptions, min_stride: int = 4) -> nn.Module:
    """The network of a configuration with `features_only=True`, without the weights of its checkpoint.

    Args:
        model: name and arguments of the network.
        options: how it is used. By default its last map of every stride from `min_stride` on is.
        min_stride: in pixels.

    Raises:
        InputError: there is no such network, it does not take the arguments, or has no such maps.
    """
    start = model.model_copy(update={"checkpoint": None})
    facts = getattr(create_network(start.model_copy(update={"pretrained": False})), "feature_info", None)
    if facts is None:
        raise InputError(f"{model.name} is no backbone: it gives no feature maps")
    last = {info["reduction"]: index for index, info in enumerate(facts)}
    chosen = options.out_indices or [index for stride, index in last.items() if stride >= min_stride]
    kwargs: dict[str, Any] = {"features_only": True, "out_indices": sorted(chosen)}
    if model.pretrained and model.kwargs.get("extra_norms"):
        kwargs["pretrained_strict"] = False  # the published weights have no such norms
    with as_input_error(
        f"cannot use {model.name} as a backbone with out_indices {chosen}", AssertionError, IndexError
    ):
        return create_network(start, **kwargs)


def pixel_statistics(body: Any, data: DenseData) -> tuple[list[float], list[float]]:
    """Mean and deviation per channel by which images in [0, 1] are normalised for a network."""
    own = resolve_data_config(pretrained_cfg=body.pretrained_cfg)
    return list(data.mean or own["mean"]), list(data.std or own["std"])


def load_dense_checkpoint(model: Any, source: str | Path, strict: bool = True) -> LoadReport:
    """Load a checkpoint into a detector or segmenter whose backbone is a `DenseBackbone`.

    One with weights of its heads is loaded as a whole, any other into the backbone alone. Names may be those
    of the authors, as in checkpoints of MMSegmentation.

    Args:
        model: the detector or segmenter.
        source: the file.
        strict: refuse what does not fit; otherwise that is left as it is.

    Returns:
        What did not fit.

    Raises:
        InputError: the file is missing, unreadable, or does not fit.
    """
    with as_input_error("cannot load the weights", ValueError, OSError):
        weights = unwrap_state_dict(read_checkpoint(source))
        own = {name: x for name, x in model.state_dict().items() if not name.startswith("backbone.body.")}
        if not any(name in own and not name.startswith(("backbone.", "neck.")) for name in weights):
            return load_checkpoint(model.backbone.body, weights, strict)
        of_body = {name: x for name, x in weights.items() if name.startswith("backbone.") and name not in own}
        # The auxiliary head serves training alone, so that a model may be without it.
        optional = () if hasattr(model, "auxiliary_head") else ("auxiliary_head.",)
        heads = {
            name: x for name, x in weights.items() if name not in of_body and not name.startswith(optional)
        }
        mismatched = [name for name in own if name in heads and own[name].shape != heads[name].shape]
        report = LoadReport(
            missing=tuple(n for n in own if n not in heads and not n.endswith("num_batches_tracked")),
            unexpected=tuple(name for name in heads if name not in own),
            mismatched=tuple(f"{n}: {tuple(heads[n].shape)}, {tuple(own[n].shape)}" for n in mismatched),
        )
        if report and strict:
            raise ValueError(f"{source} does not fit: {report}")
        of_backbone = load_checkpoint(model.backbone.body, of_body, strict)
        fitting = {name: x for name, x in heads.items() if name in own and name not in mismatched}
        model.load_state_dict(fitting, strict=False)
    return LoadReport(
        of_backbone.missing + report.missing,
        of_backbone.unexpected + report.unexpected,
        of_backbone.mismatched + report.mismatched,
    )
