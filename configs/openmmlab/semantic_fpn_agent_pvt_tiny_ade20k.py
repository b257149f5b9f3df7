"""Semantic FPN on Agent-PVT-T, ADE20K, 40k updates: the authors' recipe.

    torchrun --nproc-per-node 8 tools/openmmlab.py train \\
        configs/openmmlab/semantic_fpn_agent_pvt_tiny_ade20k.py

The authors report 40.18 mIoU. Not run here: it needs ADE20K and the ImageNet weights.
"""

_base_ = ["_base_/semantic_fpn.py", "_base_/ade20k.py", "_base_/mmseg_runtime.py"]

model = dict(
    backbone=dict(
        name="agent_pvt_tiny",
        kwargs=dict(agent_shapes=[(12, 12), (16, 16), (28, 28), (28, 28)], drop_path_rate=0.1),
        checkpoint="checkpoints/agent_pvt_tiny.pth",
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=2e-4, weight_decay=1e-4))
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=40_000)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=40_000, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
