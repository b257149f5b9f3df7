"""Semantic FPN on BiFormer-S, ADE20K, 80k updates of 32 images: the authors' recipe.

    torchrun --nproc-per-node 8 tools/openmmlab.py train \\
        configs/openmmlab/semantic_fpn_biformer_small_ade20k.py

The authors report 48.9 mIoU. Not run here: it needs ADE20K and the ImageNet weights.
"""

_base_ = ["_base_/semantic_fpn.py", "_base_/ade20k.py", "_base_/mmseg_runtime.py"]

model = dict(
    backbone=dict(
        name="biformer_small",
        kwargs=dict(n_win=8, extra_norms=True, drop_path_rate=0.15),
        checkpoint="checkpoints/biformer_small.pth",
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale=512.0,
    optimizer=dict(type="AdamW", lr=2e-4, weight_decay=1e-4),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="CosineAnnealingLR", eta_min_ratio=1e-8, by_epoch=False, begin=1000, end=80_000),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=80_000, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
