"""UPerNet on BiFormer-S, ADE20K, 160k updates: the authors' recipe.

    torchrun --nproc-per-node 8 tools/openmmlab.py train configs/openmmlab/upernet_biformer_small_ade20k.py

The authors report 49.8 mIoU. Not run here: it needs ADE20K and the ImageNet weights.
"""

_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/mmseg_runtime.py"]

model = dict(
    backbone=dict(
        name="biformer_small",
        kwargs=dict(n_win=8, extra_norms=True, drop_path_rate=0.3),
        checkpoint="checkpoints/biformer_small.pth",
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale=512.0,
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160_000),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=160_000, val_interval=16_000)
