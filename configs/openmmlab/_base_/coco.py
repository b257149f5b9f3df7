"""COCO 2017 with masks in data/coco/, the 1x schedule (12 epochs, 8 GPUs x 2 images) and AdamW."""

_root = "data/coco/"
_image = dict(type="LoadImageFromFile")
_truth = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
_scaled = dict(type="Resize", scale=(1333, 800), keep_ratio=True)
_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
_loader = dict(num_workers=2, persistent_workers=True)

train_dataloader = dict(
    batch_size=2,
    sampler=dict(type="DefaultSampler", shuffle=True),
    batch_sampler=dict(type="AspectRatioBatchSampler"),
    dataset=dict(
        type="CocoDataset",
        data_root=_root,
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017/"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=[_image, _truth, _scaled, dict(type="RandomFlip", prob=0.5), dict(type="PackDetInputs")],
    ),
    **_loader,
)
val_dataloader = dict(
    batch_size=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        data_root=_root,
        ann_file="annotations/instances_val2017.json",
        data_prefix=dict(img="val2017/"),
        test_mode=True,
        pipeline=[_image, _scaled, _truth, dict(type="PackDetInputs", meta_keys=_keys)],
    ),
    **_loader,
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="CocoMetric", ann_file=_root + "annotations/instances_val2017.json", metric=["bbox", "segm"]
)
test_evaluator = val_evaluator

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=12, val_interval=1)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
