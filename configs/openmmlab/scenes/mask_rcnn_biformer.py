"""Mask R-CNN on a small BiFormer, on the built-in scenes, from random weights.

python tools/openmmlab.py scenes data/scenes
python tools/openmmlab.py train configs/openmmlab/scenes/mask_rcnn_biformer.py --torchvision-operators

Result: box mAP50 0.232, mask mAP50 0.174 after 600 updates.
"""

_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/scenes_detection.py",
    "../_base_/scenes_run.py",
    "../_base_/mmdet_runtime.py",
]

model = dict(
    backbone=dict(
        name="biformer_tiny",
        kwargs=dict(depths=(1, 1, 2, 1), embed_dims=(32, 64, 96, 128), n_win=4, topks=(1, 2, 4, -2)),
    ),
    neck=dict(in_channels=[32, 64, 96, 128], out_channels=48),
    rpn_head=dict(in_channels=48, feat_channels=48, anchor_generator=dict(scales=[6])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=48),
        bbox_head=dict(in_channels=48, fc_out_channels=128, num_classes=10),
        mask_roi_extractor=dict(out_channels=48),
        mask_head=dict(in_channels=48, conv_out_channels=48, num_convs=2, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=500, max_per_img=150),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=30)),
)
log_processor = dict(by_epoch=False)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=100))
