"""Every configuration builds, fits its backbone and runs one step on made-up images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from visionattn.integrations.openmmlab import use_torchvision_operators
from visionattn.integrations.openmmlab.runs import read_config

assert use_torchvision_operators()  # before mmdetection is imported
import mmdet.models  # noqa: E402, F401
import mmseg.models  # noqa: E402, F401
from mmdet.testing import demo_mm_inputs  # noqa: E402
from mmengine.structures import PixelData  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402

FOLDER = Path(__file__).parents[3] / "configs" / "openmmlab"
CONFIGS = sorted(
    path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.py") if "_base_" not in str(path)
)


def batch(config: Any, classes: int) -> dict[str, Any]:
    """Two images of 128x96 with made-up objects or class maps."""
    if config.default_scope == "mmdet":
        return demo_mm_inputs(2, [[3, 128, 96]] * 2, num_classes=classes, num_items=[2, 1], with_mask=True)
    samples = [SegDataSample(metainfo={"img_shape": (128, 96)}) for _ in range(2)]
    for sample in samples:
        sample.gt_sem_seg = PixelData(data=torch.randint(classes, (1, 128, 96)))
    return {"inputs": [torch.randint(256, (3, 128, 96)).byte() for _ in samples], "data_samples": samples}


@pytest.mark.parametrize("file", CONFIGS)
def test_one_step(file: str) -> None:
    config = read_config(FOLDER / file)
    assert Path(FOLDER, file).read_text().startswith('"""')
    config.model.backbone.pop("checkpoint", None)  # it is not here
    if config.default_scope == "mmseg":
        config.model.data_preprocessor.size = (128, 96)
    classes = 10 if "scenes" in file else 80
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(revert_sync_norm(config.model)).train()
        if config.default_scope == "mmseg":
            classes = model.decode_head.num_classes
        data = model.data_preprocessor(batch(config, classes), training=True)
        losses = model(**data, mode="loss")
    loss, _ = model.parse_losses(losses)
    loss.backward()
    without = [n for n, p in model.backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert loss.isfinite()
    assert not without


def revert_sync_norm(model: Any) -> Any:
    """Batch norms of one process, as the runner makes them where there is one."""
    for part in ("decode_head", "auxiliary_head"):
        if part in model:
            model[part].norm_cfg = {"type": "BN"}
    return model
