"""RetinaNet on Agent-PVT-T, COCO 2017, 12 epochs: the authors' recipe.

    torchrun --nproc-per-node 8 tools/openmmlab.py train configs/openmmlab/retinanet_agent_pvt_tiny_coco.py

Not run here: it needs COCO and the ImageNet weights.
"""

_base_ = ["_base_/retinanet.py", "_base_/coco.py", "_base_/mmdet_runtime.py"]

model = dict(
    backbone=dict(
        name="agent_pvt_tiny",
        kwargs=dict(agent_shapes=[(12, 12), (16, 16), (28, 28), (28, 28)], drop_path_rate=0.1),
        checkpoint="checkpoints/agent_pvt_tiny.pth",
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[128, 320, 512]),
)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-4, weight_decay=1e-4))
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
