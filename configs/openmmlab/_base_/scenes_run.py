"""600 updates with AdamW, warm-up, a cosine and clipped gradients, for networks that start from nothing."""

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=50, end=600),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=600, val_interval=600)
randomness = dict(seed=0)
