"""Mask R-CNN on BiFormer-S, COCO 2017, 12 epochs: the authors' recipe.

    torchrun --nproc-per-node 8 tools/openmmlab.py train configs/openmmlab/mask_rcnn_biformer_small_coco.py

The authors report 47.8 box and 43.2 mask AP. Not run here: it needs COCO and the ImageNet weights.
"""

_base_ = ["_base_/mask_rcnn.py", "_base_/coco.py", "_base_/mmdet_runtime.py"]

model = dict(
    backbone=dict(
        name="biformer_small",
        kwargs=dict(n_win=16, extra_norms=True, drop_path_rate=0.2),
        checkpoint="checkpoints/biformer_small.pth",
        norm_eval=True,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
