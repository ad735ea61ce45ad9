"""Pascal VOC: an XML file of boxes for each image, and masks of some as numbered pixels."""

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, ParseError, TreeBuilder
from xml.parsers import expat

from casc.data.decode import ImageError, exif_orientation, open_image, stored_size
from casc.data.segmentation import mask_box
from casc.errors import UserError
from data_tools.images import read_file
from data_tools.texts import BrokenFileError, decode, is_cut
from data_tools.voc_files import VocSplit, ending, file_bytes, images_of
from data_tools.voc_masks import name_objects, pair, read_numbers

_MOST_DEPTH = 64


class VocObject(NamedTuple):
    """An object of an XML file."""

    label: str
    corners: tuple[float, float, float, float]
    """xmin, ymin, xmax and ymax as they are written; where they aren't, the outlines'."""
    difficult: bool
    rings: list[list[float]]
    """Outlines as they are written; the devkit has none, Roboflow and supervision do."""
    boxed: bool
    """Whether the corners are written: where there are outlines alone, pixels count from 0."""


def read_voc(
    part: VocSplit, every: Sequence[VocSplit]
) -> tuple[
    list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]], str, list[tuple[int, str]]
]:
    """Read a split.

    VOC counts pixels from 1 and a box's last one belongs to it; where one of the data set's boxes
    begins at 0 its corners are taken as they are. An outline's corners are points, not pixels: it
    is moved as its box is, and the box ends where it does.

    Args:
        part: which.
        every: all of the data set's, whose classes count.

    Returns:
        images, annotations and categories as COCO has them, the SHA-256 of what was read, and of
        images whose XML files are broken an id and why: these are left out.

    Raises:
        UserError: naming the file that can't be understood.
    """
    labels: set[str] = set()
    first: float = 1
    for other in every:
        labels |= other.classes.names() if other.listed else set()
        first = min(first, other.first)
        for name in other.names:
            try:
                tree = _parse(*_file(other, name))
            except BrokenFileError:  # told below
                continue
            for thing in _objects(tree, ending(other.annotations / name, ".xml")):
                labels.add(thing.label)
                first = min(first, *thing.corners[:2]) if thing.boxed else 0
    offset = 1 if first >= 1 else 0
    classes = sorted(labels)
    digest = hashlib.sha256(repr((classes, offset)).encode())
    images, annotations, broken, ids = [], [], [], itertools.count(1)
    for image_id, name in enumerate(part.names, 1):
        file, data = _file(part, name)
        digest.update(f"{name}\0".encode() + (data or b""))
        try:
            tree = _parse(file, data)
        except BrokenFileError as error:
            broken.append((image_id, str(error)))
            continue
        image = _image_name(tree, name, part.images)
        mask = _mask_file(part.masks, name)
        place = part.images / image
        size = _size(tree, mask if mask and not place.is_file() else place)
        digest.update(f"{image}\0{size}".encode())
        images.append({"id": image_id, "file_name": image, "width": size[0], "height": size[1]})
        things = list(_objects(tree, ending(part.annotations / name, ".xml")))
        found = [_entry(thing, offset) for thing in things]
        found = _with_masks(part, name, size, found, digest)
        for entry in found:
            label = entry.pop("label")
            if label not in labels:
                raise UserError(
                    f"{part.masks}/{name}.png: has a {label}, which is in no XML file; list the"
                    " classes in labelmap.txt as name:r,g,b::"
                )
            about = {"image_id": image_id, "category_id": classes.index(label) + 1}
            annotations.append({"id": next(ids), **about, **entry})
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    return images, annotations, categories, digest.hexdigest(), broken


def _entry(thing: VocObject, offset: int) -> dict[str, Any]:
    x0, y0, x1, y1 = thing.corners
    last = 0 if thing.rings else offset
    return {
        "label": thing.label, "iscrowd": 0, "ignore": int(thing.difficult),
        "bbox": [x0 - offset, y0 - offset, x1 - x0 + last, y1 - y0 + last],
        "segmentation": [[v - offset for v in ring] for ring in thing.rings] or None,
    }  # fmt: skip


def _with_masks(
    part: VocSplit, name: str, size: tuple[int, int], entries: list[dict[str, Any]], digest: Any
) -> list[dict[str, Any]]:
    """Give an image's objects their masks; with those that are in the picture alone."""
    file = _mask_file(part.masks, name)
    if file is None:
        return entries
    data = file_bytes(file)
    digest.update(data)
    numbers = read_numbers(data, file, size)
    paired = pair([entry["bbox"] for entry in entries], numbers)
    for entry, number in zip(entries, paired, strict=True):
        entry["segmentation"] = numbers.masks.get(number) or entry["segmentation"]
    others = [number for number in numbers.masks if number not in paired]
    if not others:
        return entries
    told = _mask_file(part.masks and part.masks.with_name("SegmentationClass"), name)
    if told is None:
        raise UserError(
            f"{file}: object {others[0]} is in no XML file, and there is no SegmentationClass/ that"
            " tells its class; put it there, or the object into the XML file"
        )
    data = file_bytes(told)
    digest.update(data)
    labels = name_objects(others, numbers, data, told, part.classes)
    masks = [numbers.masks[number] for number in others]
    return entries + [
        {
            "label": label,
            "iscrowd": 0,
            "bbox": list(mask_box(rle, *size) or ()),
            "segmentation": rle,
        }
        for label, rle in zip(labels, masks, strict=True)
    ]


def _mask_file(folder: Path | None, name: str) -> Path | None:
    """An image's picture of masks; None without one."""
    names = (name, name.rsplit("/", 1)[-1])
    files = [ending(folder / n, ".png") for n in names] if folder else []
    return next((file for file in files if file.is_file()), None)


def _file(part: VocSplit, name: str) -> tuple[Path, bytes | None]:
    """An image's XML file and what it holds; None where there are masks alone."""
    file = ending(part.annotations / name, ".xml")
    if part.masks == part.annotations:
        return file, None
    if not file.is_file():
        raise UserError(
            f"{file}: not found; the list of {part.split}'s images names it: put it there, or take"
            " it from the list"
        )
    return file, file_bytes(file)


def _parse(file: Path, data: bytes | None) -> Element:
    if data is None:
        return Element("annotation")
    builder = TreeBuilder()
    parser = expat.ParserCreate("utf-8")
    depth = 0

    def refuse(_name: str, _system: str | None, _public: str | None, declares: int) -> None:
        # What a document type declares may grow without end; what it names is never read.
        if declares:
            raise UserError(
                f"{file}: has a document type with declarations, which no annotation of VOC's"
                " needs; remove <!DOCTYPE ...>"
            )

    def lacking(entity: str, _: int) -> None:
        raise UserError(
            f"{file}: &{entity}; is declared elsewhere, which isn't read; write the character"
            " itself"
        )

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _MOST_DEPTH:
            raise UserError(f"{file}: not an annotation of VOC's (nested too deeply)")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    parser.StartDoctypeDeclHandler, parser.SkippedEntityHandler = refuse, lacking
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(_text(data).encode(), True)
        return builder.close()
    except (LookupError, UnicodeError) as error:
        if is_cut(error):
            raise BrokenFileError(f"{file}: not valid XML ({error})") from None
        raise UserError(
            f"{file}: not in the encoding that it should be ({error}); save it as UTF-8"
        ) from None
    except (expat.ExpatError, ParseError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise BrokenFileError(f"{file}: not valid XML ({error})") from None


def _text(data: bytes) -> str:
    """A file's text. Of encodings expat knows but four, and what a file declares isn't always so.

    .NET's writers of strings declare UTF-16, whatever the text becomes.
    """
    known = re.match(rb"""\s*<\?xml[^>]*encoding\s*=\s*["']([\w.-]+)""", data)
    declared = known[1].decode().lower() if known else "utf-8"
    if declared.startswith(("utf", "ucs", "iso-10646")):
        return decode(data)
    # What is called GB2312 is mostly what came after it.
    return data.decode({"gb2312": "gb18030", "gbk": "gb18030"}.get(declared, declared))


def _objects(tree: Element, file: Path) -> Iterator[VocObject]:
    for i, element in enumerate(tree.iterfind("object")):
        place = f"{file}: object {i + 1}"
        if (element.findtext("deleted") or "").strip() == "1":
            continue  # LabelMe's web tool keeps what was taken away
        label = (element.findtext("name") or "").strip()
        if not label:
            raise UserError(f"{place}: name: missing; mend it")
        rings = [_ring(polygon, place) for polygon in element.iterfind("polygon")]
        texts = [element.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        boxed = not any(rings) or element.find("bndbox") is not None
        try:
            x0, y0, x1, y1 = (float(text or "") for text in texts) if boxed else _bounds(rings)
        except ValueError:
            raise UserError(
                f"{place}: bndbox: expected xmin, ymin, xmax and ymax, got {texts}; mend it"
            ) from None
        difficult = (element.findtext("difficult") or "0").strip() == "1"
        yield VocObject(label, (x0, y0, x1, y1), difficult, rings, boxed)


def _ring(polygon: Element, place: str) -> list[float]:
    """An outline: x1, y1, x2, ... as Roboflow writes it, or points as LabelMe's web tool does."""
    numbers = [child.tag[1:] for child in polygon if re.fullmatch(r"x\d{1,9}", child.tag, re.ASCII)]
    texts = [polygon.findtext(axis + number) for number in numbers for axis in "xy"]
    texts += [point.findtext(axis) for point in polygon.iterfind("pt") for axis in "xy"]
    try:
        return [float(text or "") for text in texts]
    except ValueError:
        raise UserError(
            f"{place}: polygon: expected x1, y1, x2, y2, ..., got {texts!a:.60}; mend it"
        ) from None


def _bounds(rings: list[list[float]]) -> tuple[float, float, float, float]:
    xs, ys = ([v for ring in rings for v in ring[axis::2]] for axis in (0, 1))
    return min(xs), min(ys), max(xs), max(ys)


def _image_name(tree: Element, name: str, images: Path) -> str:
    """The image's, below its folder: what is listed is often another file's or a path."""
    listed = (tree.findtext("filename") or "").strip().replace("\\", "/").rsplit("/", 1)[-1]
    above, _, stem = name.rpartition("/")
    places = [f"{above}/{listed}", listed] if listed and above else [listed]
    # The XML file is named after its image, whatever it says.
    names = images_of(images, name)
    names = [*places, *names] if Path(listed).stem == stem else [*names, *places]
    return next((n for n in names if n and (images / n).is_file()), listed or f"{stem}.jpg")


def _size(tree: Element, image: Path) -> tuple[int, int]:
    """Width and height; tools that don't know them write 0."""
    try:
        width, height = (int(float(tree.findtext(f"size/{k}") or 0)) for k in ("width", "height"))
    except (ValueError, OverflowError):
        width = height = 0
    return (width, height) if width > 0 and height > 0 else image_size(image)


def image_size(file: Path) -> tuple[int, int]:
    """Give an image file's width and height, upright; 1 and 1 if it can't be read."""
    try:
        with open_image(read_file(file)) as image:
            width, height = stored_size(image)
            return (height, width) if exif_orientation(image) >= 5 else (width, height)
    except (ImageError, OSError):
        return 1, 1  # told when it is read in full
