"""RetinaNet on a small Agent-Swin, on the built-in scenes, from random weights.

python tools/openmmlab.py scenes data/scenes
python tools/openmmlab.py train configs/openmmlab/scenes/retinanet_agent_swin.py --torchvision-operators

Result: box mAP50 0.089 after 600 updates.
"""

_base_ = [
    "../_base_/retinanet.py",
    "../_base_/scenes_detection.py",
    "../_base_/scenes_run.py",
    "../_base_/mmdet_runtime.py",
]

model = dict(
    backbone=dict(
        name="agent_swin_tiny",
        kwargs=dict(depths=(1, 1, 2, 1), embed_dim=32, num_heads=(1, 2, 4, 8), extra_norms=True),
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[64, 128, 256], out_channels=64, num_outs=4),
    bbox_head=dict(
        num_classes=10,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        anchor_generator=dict(strides=[8, 16, 32, 64], octave_base_scale=3),
    ),
)
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
log_processor = dict(by_epoch=False)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=100))
