"""Boxes against the masks that they should enclose: corners in place of sides, or another origin.

COCO's box is [x, y, width, height] from the top left corner. Exports that write [x, y, x, y], or
count y from the bottom, are read without complaint everywhere, and nothing is ever learnt.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from casc.data.segmentation import Box, mask_box
from data_tools.coco import Annotations, ImageEntry
from data_tools.report import Finding

LEAST_IOU = 0.5
"""Below it a box isn't its mask's; where objects are hidden in part boxes may be larger."""
_SURE_IOU = 0.8
_SAMPLE = 2000
"""Annotations that are compared to recognise a file's convention."""
_ENOUGH = 3
_SHARE = 0.9


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """IoU of two boxes [x, y, width, height]; sides below 0 are none."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(w, 0) * max(h, 0)
    union = max(a[2], 0) * max(a[3], 0) + max(b[2], 0) * max(b[3], 0) - common
    return common / union if union > 0 else 0.0


def mismatch(box: Sequence[float], mask: Box, height: float) -> str:
    """How a box isn't its mask's; empty if it is."""
    found = box_iou(box, mask)
    if found >= LEAST_IOU or min(box[2], box[3]) < 1:
        return ""
    x, y, w, h = box
    fits = {
        "it fits as [x, y, x, y]": (x, y, w - x, h - y),
        "it fits with y from the bottom": (x, height - y - h, w, h),
        "it fits as [centre x, centre y, width, height]": (x - w / 2, y - h / 2, w, h),
    }
    found_as = next((s for s, other in fits.items() if box_iou(other, mask) > _SURE_IOU), "")
    return f"IoU {found:.2f}" + (f"; {found_as}" if found_as else "")


def mend_corners(annotations: Annotations) -> Annotations:
    """Turn boxes [x, y, x, y] into COCO's, where they fit the masks of a whole file as such.

    Nothing is changed unless of the boxes with masks, up to 2,000 of them, nine in ten fit so and
    not otherwise.
    """
    compared: list[bool] = []
    step = max(1, len(annotations.images) // _SAMPLE)
    for image in annotations.images[::step]:
        entries = annotations.by_image[image.id]
        fits = [_fit(entry, image) for entry in entries if not entry["iscrowd"]]
        compared += [fit for fit in fits if fit is not None]
        if len(compared) >= _SAMPLE or compared.count(False) > (1 - _SHARE) * _SAMPLE:
            break
    if len(compared) < _ENOUGH or sum(compared) < _SHARE * len(compared):
        return annotations
    mended = annotations.by_image.with_corners()
    findings = [Finding("corners", number) for number in mended.every_id()]
    return annotations._replace(by_image=mended, findings=[*annotations.findings, *findings])


def _fit(entry: Mapping[str, Any], image: ImageEntry) -> bool | None:
    mask = mask_box(entry["segmentation"], image.width, image.height)
    if mask is None or min(mask[2:]) < 2:
        return None
    x, y, w, h = entry["bbox"]
    corners = box_iou((x, y, w - x, h - y), mask)
    return corners > _SURE_IOU and corners > box_iou(entry["bbox"], mask)
