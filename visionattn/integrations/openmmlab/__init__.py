"""Every registered backbone inside mmdetection and mmsegmentation, by one line in the configuration.

    custom_imports = dict(imports=["visionattn.integrations.openmmlab"], allow_failed_imports=False)
    model = dict(backbone=dict(type="VisionAttnBackbone", name="biformer_small", checkpoint="biformer.pth"))

Works with the maintained forks, which keep the import names of the originals:

    pip install "visionattn[openmmlab]"

that is onedl-mmcv 2.3.6, onedl-mmengine 0.10.12, onedl-mmdetection 3.5.1 and onedl-mmsegmentation 1.4.2.
Without a compiler mmcv comes without its compiled operators: `use_torchvision_operators` puts torchvision's
in their place. Importing this package lets mmengine read checkpoints without running code from them (see
`checkpoints.py`).
"""

from __future__ import annotations

from visionattn.integrations.openmmlab.versions import check_versions

check_versions()

from visionattn.integrations.openmmlab.backbone import VisionAttnBackbone  # noqa: E402  (needs mmengine, which the check speaks about)
from visionattn.integrations.openmmlab.checkpoints import read_without_code  # noqa: E402
from visionattn.integrations.openmmlab.operators import use_torchvision_operators  # noqa: E402

read_without_code()

__all__ = ["VisionAttnBackbone", "check_versions", "read_without_code", "use_torchvision_operators"]
