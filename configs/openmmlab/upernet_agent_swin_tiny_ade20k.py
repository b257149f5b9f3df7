"""UPerNet on Agent-Swin-T, ADE20K, 160k updates: the authors' recipe.

    torchrun --nproc-per-node 8 tools/openmmlab.py train configs/openmmlab/upernet_agent_swin_tiny_ade20k.py

The authors report 46.68 mIoU. Not run here: it needs ADE20K and the ImageNet weights.
"""

_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/mmseg_runtime.py"]

model = dict(
    backbone=dict(
        name="agent_swin_tiny",
        kwargs=dict(agent_shapes=[(9, 9), (12, 12), (14, 14), (7, 7)], extra_norms=True, drop_path_rate=0.3),
        checkpoint="checkpoints/agent_swin_tiny.pth",
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    # Norms and the bias tables of the agents are not decayed.
    paramwise_cfg=dict(
        custom_keys={
            name: dict(decay_mult=0.0)
            for name in ("norm", "an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias")
        }
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160_000),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=160_000, val_interval=16_000)
