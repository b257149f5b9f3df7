"""The built-in scenes for a segmenter: `python tools/openmmlab.py scenes data/scenes` writes them."""

_dataset = dict(
    type="BaseSegDataset",
    metainfo=dict(classes=("background", *"0123456789")),
    data_root="data/scenes",
    img_suffix=".png",
)
_image = dict(type="LoadImageFromFile")
_loader = dict(num_workers=1, persistent_workers=True)

train_dataloader = dict(
    batch_size=8,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path="images/train", seg_map_path="annotations/train"),
        pipeline=[
            _image,
            dict(type="LoadAnnotations"),
            dict(type="RandomCrop", crop_size=(112, 112)),
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
        pipeline=[_image, dict(type="LoadAnnotations"), dict(type="PackSegInputs")],
        **_dataset,
    ),
    **_loader,
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
