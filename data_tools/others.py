"""Data sets of kinds that aren't read: what they are, and how they become one that is."""

import itertools
import os
import re
from pathlib import Path

from data_tools.texts import searchable
from data_tools.voc_files import visible

_HEAD = 2**16
"""Bytes of a file that are looked at."""
_MOST_FILES = 2000
_COCO = "export it as COCO from there"
_KINDS: list[tuple[str, str, str, str]] = [
    (r"\.json$", r'"shape_attributes"', "VGG Image Annotator's (VIA)",
     "choose Export Annotations (COCO format) there"),
    (r"\.json$", r'"bbox_mode"', "Detectron2's list of dicts",
     "write it as COCO by detectron2.data.datasets.convert_to_coco_json"),
    (r"\.json$", r'"(crop_box|predicted_iou)"', "Segment Anything's, whose masks have no classes",
     "gather the files into one of COCO's with categories, and give an annotation a category_id"),
    (r"\.json$", r'"(classTitle|geometryType)"', "Supervisely's", _COCO),
    (r"\.json$", r'"segments_info"', "of panoptic segments",
     "give the file of instances (instances_*.json)"),
    (r"\.json$", r'"coordinates"\s*:\s*\{', "CreateML's, which has boxes only", _COCO),
    (r"\.json$", r'"(imgHeight|openlabel)"', "of Cityscapes' form",
     "write it as COCO, as MMDetection's tools/dataset_converters/cityscapes.py does"),
    (r"\.json$", r'"items"\s*:', "Datumaro's",
     "write it as COCO by datum convert -if datumaro -f coco_instances"),
    (r"\.json$", r'"(result|completions)"\s*:', "Label Studio's own JSON",
     "export it as COCO from there"),
    (r"\.(nd)?jsonl?$", r'"data_row"', "Labelbox's", _COCO),
    (r"\.json$", r'"score"\s*:', "a list of detections", "give the file of annotations"),
    (r"\.json$", r'"FeatureCollection"', "GeoJSON", "write it as COCO"),
    (r"\.json$", r'"(images|annotations)"\s*:', "which is like COCO's, but deep down, or without"
     " all of images with file_name, annotations and categories",
     "give --annotations FILE --images FOLDER --split NAME, which names what lacks"),
    (r"\.xml$", r"<annotations[\s>]", "CVAT's own XML", "export the task as COCO 1.0 from there"),
    (r"\.csv$", r"(?i)EncodedPixels|\brle\b", "a table of run lengths, as Kaggle's",
     "write it as COCO, whose counts are the lengths of runs off and on the mask in turns"),
    (r"\.csv$", r"MaskPath", "Open Images' table of masks",
     "export it as COCO, as by FiftyOne's COCODetectionDataset"),
    (r"\.csv$", r"(?i)x_?min|\bbbox", "a table of boxes", "write it as COCO"),
    (r"metadata\.(jsonl|csv)$", r"file_name", "Hugging Face's imagefolder", "write it as COCO"),
    (r"\.(parquet|arrow)$", r"", "a table of Hugging Face's datasets", "write it as COCO"),
    (r"\.tfrecord", r"", "TensorFlow's", "write it as COCO"),
    (r"\.(zip|tar|tgz|tar\.gz|7z|rar)$", r"", "an archive", "unpack it"),
    (r"SegmentationClass/[^/]*\.png$", r"", "a picture of classes, in which objects aren't told"
     " apart", "export masks of objects too (SegmentationObject/), or COCO"),
]  # fmt: skip


def name_other(root: Path) -> str:
    """Tell what a folder holds that isn't read, and the way that works; empty if unknown."""
    found = (
        Path(above, name).relative_to(root)
        for above, _, names in os.walk(root)
        for name in sorted(names)
    )
    files = [file for file in itertools.islice(found, _MOST_FILES) if visible(root / file, root)]
    # The order of kinds counts: the first ones are the surest.
    heads = {
        file: _head(root / file)
        for file in files
        if any(re.search(name, file.as_posix()) for name, text, *_ in _KINDS if text)
    }
    for name, text, what, way in _KINDS:
        for file in files:
            if re.search(name, file.as_posix()) and re.search(text, heads.get(file, "")):
                return f"{root}: can't read {file}, {what}; {way}"
    return ""


def _head(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return searchable(stream.read(_HEAD))
    except OSError:
        return ""
