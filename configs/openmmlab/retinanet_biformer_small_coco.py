"""RetinaNet on BiFormer-S, COCO 2017, 12 epochs: the authors' recipe.

    torchrun --nproc-per-node 8 tools/openmmlab.py train configs/openmmlab/retinanet_biformer_small_coco.py

The authors report 45.9 box AP. Not run here: it needs COCO and the ImageNet weights.
"""

_base_ = ["_base_/retinanet.py", "_base_/coco.py", "_base_/mmdet_runtime.py"]

model = dict(
    backbone=dict(
        name="biformer_small",
        kwargs=dict(n_win=16, extra_norms=True, drop_path_rate=0.2),
        checkpoint="checkpoints/biformer_small.pth",
        out_indices=(1, 2, 3),
        norm_eval=True,
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale=512.0,
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=1e-4),
)
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
