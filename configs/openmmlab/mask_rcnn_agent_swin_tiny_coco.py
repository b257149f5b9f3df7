"""Mask R-CNN on Agent-Swin-T, COCO 2017, 12 epochs: the authors' recipe, with its many image sizes and crops.

    torchrun --nproc-per-node 8 tools/openmmlab.py train configs/openmmlab/mask_rcnn_agent_swin_tiny_coco.py

The authors report 44.6 box AP. Not run here: it needs COCO and the ImageNet weights.
"""

_base_ = ["_base_/mask_rcnn.py", "_base_/coco.py", "_base_/mmdet_runtime.py"]

model = dict(
    backbone=dict(
        name="agent_swin_tiny",
        kwargs=dict(agent_shapes=[(9, 9), (12, 12), (14, 14), (7, 7)], extra_norms=True, drop_path_rate=0.1),
        checkpoint="checkpoints/agent_swin_tiny.pth",
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
_sides = [(side, 1333) for side in range(480, 801, 32)]
_choose = dict(type="RandomChoiceResize", keep_ratio=True)
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(type="RandomFlip", prob=0.5),
            dict(
                type="RandomChoice",
                transforms=[
                    [dict(scales=_sides, **_choose)],
                    [
                        dict(scales=[(400, 1333), (500, 1333), (600, 1333)], **_choose),
                        dict(
                            type="RandomCrop",
                            crop_type="absolute_range",
                            crop_size=(384, 600),
                            allow_negative_crop=True,
                        ),
                        dict(scales=_sides, **_choose),
                    ],
                ],
            ),
            dict(type="PackDetInputs"),
        ]
    )
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # Norms and the bias tables of the agents are not decayed.
    paramwise_cfg=dict(
        custom_keys={
            name: dict(decay_mult=0.0)
            for name in ("norm", "an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias")
        }
    ),
)
