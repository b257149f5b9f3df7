"""UPerNet on four maps of strides 4 to 32; a configuration adds the backbone and its channels."""

_norm = dict(type="SyncBN", requires_grad=True)
_cross_entropy = dict(type="CrossEntropyLoss", use_sigmoid=False)

model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512),
    ),
    backbone=dict(type="VisionAttnBackbone"),
    decode_head=dict(
        type="UPerHead",
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=_norm,
        align_corners=False,
        loss_decode=dict(loss_weight=1.0, **_cross_entropy),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=_norm,
        align_corners=False,
        loss_decode=dict(loss_weight=0.4, **_cross_entropy),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
