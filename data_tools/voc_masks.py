"""Masks of Pascal VOC's form: a picture that numbers the objects, and one that has their classes.

The devkit's pictures have a palette, and the number is the object's place in its XML file. What
Datumaro and CVAT write ("Segmentation mask", "Pascal VOC") is RGB, painted with the devkit's
palette, Supervisely's with colours of its own; these number apart from the XML files, which may
have boxes of other objects, or not be there. A class's colour is in labelmap.txt then.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from casc.data.decode import ImageError, open_image
from casc.errors import UserError
from data_tools.boxes import LEAST_IOU, box_iou
from data_tools.texts import decode

_VOC = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
]  # fmt: skip
_BORDER = 255
"""Around objects, and what is to be ignored."""
_MOST_COLOURS = 2500
_LISTS = ("labelmap.txt", "class_names.txt")


def _palette() -> list[int]:
    """The devkit's colours, 0xRRGGBB: bits of the number, three by three, from the highest down."""
    return [
        sum(
            ((i >> (3 * k + channel)) & 1) << (7 - k + 8 * (2 - channel))
            for k in range(8)
            for channel in range(3)
        )
        for i in range(256)
    ]


PALETTE = _palette()


class Numbers(NamedTuple):
    """The objects of an image."""

    pixels: np.ndarray
    """`[h, w]`, an object's number; 0 and `_BORDER` are none."""
    masks: dict[int, dict[str, Any]]
    """RLE by number."""
    devkit: bool
    """Whether they are surely numbered in the order of the XML file."""


class Classes(NamedTuple):
    """What pictures of classes mean."""

    by_number: list[str]
    by_colour: dict[int, str]

    def names(self) -> set[str]:
        """All but the background."""
        return {name for name in self.by_colour.values() if name}


def read_numbers(data: bytes, file: Path, size: tuple[int, int]) -> Numbers:
    """Read the picture that numbers an image's objects.

    Args:
        data: the file's bytes.
        file: which, for errors.
        size: width and height that it should have.
    """
    mode, pixels = _read(data, file, size)
    if pixels.ndim == 3:
        pixels = _numbered(pixels, file)
    present = (int(n) for n in np.unique(pixels) if n not in (0, _BORDER))
    return Numbers(pixels, {n: _rle(pixels == n) for n in present}, mode == "P")


def pair(boxes: Sequence[Sequence[float]], numbers: Numbers) -> list[int]:
    """Tell which object of the picture each of an XML file's is; 0 where it is none of them.

    Args:
        boxes: the XML file's, [x, y, width, height].
        numbers: the picture's.
    """
    own = {n: coco_mask.toBbox(rle).tolist() for n, rle in numbers.masks.items()}  # type: ignore[arg-type]
    fits = {(i, n): box_iou(box, mask) for i, box in enumerate(boxes) for n, mask in own.items()}
    by_order = [i + 1 if i + 1 in own else 0 for i in range(len(boxes))]
    both = [fits[i, n] >= LEAST_IOU for i, n in enumerate(by_order) if n]
    if numbers.devkit or (both and 2 * sum(both) >= len(both)):
        return by_order
    found = [0] * len(boxes)
    for (i, n), iou in sorted(fits.items(), key=lambda item: -item[1]):
        if iou >= LEAST_IOU and not found[i] and n not in found:
            found[i] = n
    return found


def find_classes(base: Path) -> Classes | None:
    """Read the list of classes beside the folders of masks; None where there is none."""
    file = next((base / name for name in _LISTS if (base / name).is_file()), None)
    if file is None:
        return None
    by_number, by_colour = [], {}
    for i, line in enumerate(_lines(file)):
        name, *rest = line.split(":")
        colour = [int(n) for n in re.findall(r"\d{1,3}", rest[0])] if rest else []
        known = len(colour) == 3 and max(colour) < 256
        code = int.from_bytes(bytes(colour)) if known else PALETTE[i % 256]
        # Whatever the background is called, it is black, or the first.
        name = "" if code == 0 or (i == 0 and not known) else name.strip()
        by_number.append(name)
        by_colour[code] = name
    return Classes(by_number, by_colour)


def voc_classes() -> Classes:
    """The devkit's own twenty."""
    return Classes(["", *_VOC], dict(zip(PALETTE, ["", *_VOC], strict=False)))


def name_objects(
    wanted: Sequence[int], numbers: Numbers, data: bytes, file: Path, classes: Classes
) -> list[str]:
    """Tell the classes of objects by the picture of classes.

    Args:
        wanted: numbers of the objects.
        numbers: the picture of the objects.
        data: the bytes of the picture of classes.
        file: which, for errors.
        classes: what it means.
    """
    height, width = numbers.pixels.shape
    _, pixels = _read(data, file, (width, height))
    known: Mapping[int, str] = dict(enumerate(classes.by_number))
    if pixels.ndim == 3:
        known, pixels = classes.by_colour, _codes(pixels)
    names = []
    for number in wanted:
        values, counts = np.unique(pixels[numbers.pixels == number], return_counts=True)
        value = int(values[counts.argmax()])
        if not known.get(value):
            shown = f"#{value:06x}" if known is classes.by_colour else f"number {value}"
            raise UserError(
                f"{file}: object {number} has {shown}, which is no class's; list it in labelmap.txt"
                " as name:r,g,b::"
            )
        names.append(known[value])
    return names


def _read(data: bytes, file: Path, size: tuple[int, int]) -> tuple[str, np.ndarray]:
    try:
        with open_image(data) as image:
            mode = image.mode
            pixels = np.asarray(image.convert("RGB") if mode in ("RGBA", "RGB") else image)
    except (ImageError, OSError) as error:
        raise UserError(f"{file}: {error}") from None
    if mode not in ("P", "L", "RGB", "RGBA") or pixels.shape[:2] != size[::-1]:
        found = f"{mode}, {pixels.shape[1]} x {pixels.shape[0]}"
        raise UserError(
            f"{file}: expected a palette image of {size[0]} x {size[1]} that numbers the objects,"
            f" or an RGB one with a colour of each, got {found}"
        )
    return mode, pixels


def _codes(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)


def _numbered(pixels: np.ndarray, file: Path) -> np.ndarray:
    """Numbers for colours: the devkit's, else any."""
    colours, where = np.unique(_codes(pixels), return_inverse=True)
    if len(colours) > _MOST_COLOURS:
        raise UserError(
            f"{file}: has {len(colours):,} colours, expected one of each object; write it without"
            " smoothing and as PNG"
        )
    place = {colour: i for i, colour in enumerate(PALETTE)}
    if all(colour in place for colour in colours.tolist()):
        numbers = [place[colour] for colour in colours.tolist()]
    else:
        none = {0: 0, PALETTE[_BORDER]: _BORDER}
        free = (n for n in range(1, 2 * _MOST_COLOURS) if n != _BORDER)
        numbers = [none[c] if c in none else next(free) for c in colours.tolist()]
    return np.array(numbers, np.int32)[where].reshape(pixels.shape[:2])


def _lines(file: Path) -> list[str]:
    text = decode(file.read_bytes(), errors="replace")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _rle(mask: np.ndarray) -> dict[str, Any]:
    packed: Any = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": packed["counts"].decode("ascii")}
