"""The built-in scenes for a detector: `python tools/openmmlab.py scenes data/scenes` writes them."""

_root = "data/scenes/"
_image = dict(type="LoadImageFromFile")
_truth = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
_digits = dict(classes=tuple("0123456789"))
_loader = dict(num_workers=1, persistent_workers=True)
_scaled = dict(type="Resize", scale=(144, 144), keep_ratio=True)

train_dataloader = dict(
    batch_size=4,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="CocoDataset",
        metainfo=_digits,
        data_root=_root,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="images/train/"),
        pipeline=[_image, _truth, _scaled, dict(type="PackDetInputs")],
    ),
    **_loader,
)
val_dataloader = dict(
    batch_size=8,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        metainfo=_digits,
        data_root=_root,
        ann_file="annotations/instances_validation.json",
        data_prefix=dict(img="images/validation/"),
        test_mode=True,
        pipeline=[_image, _scaled, _truth, dict(type="PackDetInputs", meta_keys=_keys)],
    ),
    **_loader,
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="CocoMetric", ann_file=_root + "annotations/instances_validation.json", metric=["bbox", "segm"]
)
test_evaluator = val_evaluator
