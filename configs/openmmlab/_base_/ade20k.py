"""ADE20K in data/ade/, crops of 512x512."""

_dataset = dict(type="ADE20KDataset", data_root="data/ade/ADEChallengeData2016")
_image = dict(type="LoadImageFromFile")
_truth = dict(type="LoadAnnotations", reduce_zero_label=True)
_loader = dict(num_workers=4, persistent_workers=True)

train_dataloader = dict(
    batch_size=2,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=[
            _image,
            _truth,
            dict(type="RandomResize", scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
            dict(type="RandomCrop", crop_size=(512, 512), cat_max_ratio=0.75),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PhotoMetricDistortion"),
            dict(type="PackSegInputs"),
        ],
        **_dataset,
    ),
    **_loader,
)
val_dataloader = dict(
    batch_size=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=[
            _image,
            dict(type="Resize", scale=(2048, 512), keep_ratio=True),
            _truth,
            dict(type="PackSegInputs"),
        ],
        **_dataset,
    ),
    **_loader,
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
