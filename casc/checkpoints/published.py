"""Trained detectors that others have published, by name, and where their files lie."""

from dataclasses import dataclass

_MMDET = "https://download.openmmlab.com/mmdetection/v2.0/cascade_rcnn"
_D2 = "https://dl.fbaipublicfiles.com/detectron2/Misc"


@dataclass(frozen=True)
class Published:
    """A checkpoint trained on COCO's train2017."""

    name: str
    url: str
    """The file. Its name ends in the beginning of its own SHA-256, where the publisher does so."""
    box_ap: float
    """In percent on val2017, as published; casc hasn't measured it."""
    mask_ap: float
    licence: str = "Apache-2.0"


def _mmdet(name: str, file: str, box_ap: float, mask_ap: float) -> Published:
    model = f"cascade_mask_rcnn_{name}_coco"
    return Published(f"mmdet:{model}", f"{_MMDET}/{model}/{model}_{file}.pth", box_ap, mask_ap)


def _detectron2(model: str, file: str, box_ap: float, mask_ap: float) -> Published:
    url = f"{_D2}/{model}/{file}.pkl"
    return Published(f"detectron2:{model}", url, box_ap, mask_ap, "CC BY-SA 3.0")


PUBLISHED = {
    entry.name: entry
    for entry in (
        _mmdet("r50_fpn_1x", "20200203-9d4dcb24", 41.2, 35.9),
        _mmdet(
            "r50_fpn_20e", "bbox_mAP-0.419__segm_mAP-0.365_20200504_174711-4af8e66e", 41.9, 36.5
        ),
        _mmdet("r50_fpn_mstrain_3x", "20210628_164719-5bdc3824", 44.3, 38.5),
        _mmdet("r101_fpn_1x", "20200203-befdf6ee", 42.9, 37.3),
        _mmdet(
            "r101_fpn_20e", "bbox_mAP-0.434__segm_mAP-0.378_20200504_174836-005947da", 43.4, 37.8
        ),
        _mmdet("r101_fpn_mstrain_3x", "20210628_165236-51a2d363", 45.5, 39.6),
        _detectron2("cascade_mask_rcnn_R_50_FPN_1x", "138602847/model_final_e9d89b", 42.1, 36.4),
        _detectron2("cascade_mask_rcnn_R_50_FPN_3x", "144998488/model_final_480dd8", 44.3, 38.5),
    )
}
"""By name, as `casc.load`, `--init` and `casc weights` take it."""

# Detectron2's files have no names: labels are COCO's 80 classes by rising id.
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote",
    "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
