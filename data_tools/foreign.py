"""Annotations of LabelMe, YOLO and Pascal VOC as COCO has them, for the same checks."""

from collections.abc import Sequence
from pathlib import Path

from data_tools.converted import Converted, Foreign, coco
from data_tools.labelme import convert_labelme, find_labelme
from data_tools.voc import read_voc
from data_tools.voc_files import find_voc
from data_tools.yolo import convert_yolo, find_described, find_yolo


def find_foreign(root: Path) -> list[Foreign]:
    """Find the splits of a data set of LabelMe's, YOLO's or VOC's; none if it is none of them."""
    described = find_described(root)
    if described is not None:
        return described
    voc = find_voc(root)
    if voc:
        return [
            Foreign(part.split, part.annotations, part.images, part, fault=part.fault)
            for part in voc
        ]
    return find_labelme(root) or find_yolo(root)


def convert(part: Foreign, every: Sequence[Foreign]) -> Converted:
    """Read a split.

    Args:
        part: which.
        every: all of the data set's, whose classes count.

    Raises:
        UserError: naming the file that can't be understood.
    """
    if part.voc is not None:
        voc = [other.voc for other in every if other.voc]
        *lists, digest, broken = read_voc(part.voc, voc)
        return Converted(coco(*lists), digest, [], broken)
    if part.source.is_dir():
        return convert_labelme(part, every)
    return convert_yolo(part)
