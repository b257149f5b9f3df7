"""UPerNet on a small BiFormer, on the built-in scenes, from random weights.

python tools/openmmlab.py scenes data/scenes
python tools/openmmlab.py train configs/openmmlab/scenes/upernet_biformer.py

Result: mIoU 16.2 after 600 updates, two minutes on one core.
"""

_base_ = [
    "../_base_/upernet.py",
    "../_base_/scenes_segmentation.py",
    "../_base_/scenes_run.py",
    "../_base_/mmseg_runtime.py",
]

_norm = dict(type="BN")
model = dict(
    data_preprocessor=dict(size=(112, 112)),
    backbone=dict(
        name="biformer_tiny",
        kwargs=dict(depths=(1, 1, 2, 1), embed_dims=(32, 64, 96, 128), n_win=4, topks=(1, 2, 4, -2)),
    ),
    decode_head=dict(in_channels=[32, 64, 96, 128], channels=48, num_classes=11, norm_cfg=_norm),
    auxiliary_head=dict(in_channels=96, channels=48, num_classes=11, norm_cfg=_norm),
)
default_hooks = dict(checkpoint=dict(interval=100))
# With AdamW everything is background for longer than this training lasts.
optim_wrapper = dict(optimizer=dict(_delete_=True, type="timm.optim.Muon", lr=1e-2, weight_decay=0.01))
