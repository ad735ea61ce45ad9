"""Pascal VOC: an XML file of boxes for each image, and masks of some as numbered pixels.

The devkit has `Annotations/`, `JPEGImages/`, `ImageSets/Main/train.txt` and for the images that
have masks `SegmentationObject/` with `ImageSets/Segmentation/train.txt`. Labelling tools write the
XML files alone, beside the images or in a folder of their own.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, ParseError, TreeBuilder
from xml.parsers import expat

import numpy as np
from pycocotools import mask as coco_mask

from casc.data.decode import ImageError, exif_orientation, open_image, stored_size
from casc.errors import UserError

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SETS = ("train", "val", "valid", "test")
_MOST_BYTES, _MOST_DEPTH = 2**26, 64


class VocSplit(NamedTuple):
    """A split's files."""

    split: str
    annotations: Path
    images: Path
    masks: Path | None
    """SegmentationObject/, where there is one."""
    names: tuple[str, ...]
    """Of the XML files, without .xml."""


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


def find_voc(root: Path) -> list[VocSplit]:
    """Find the splits of a data set; none if it isn't one of VOC's."""
    several = sorted(root.glob("VOC*")), sorted(root.glob("VOCdevkit/VOC*"))
    for places in ([root], *several):
        bases = [(base, _xml_folder(base)) for base in places]
        found = [(base, folder) for base, folder in bases if folder is not None]
        if len(found) > 1:
            names = ", ".join(base.name for base, _ in found)
            raise UserError(
                f"{root}: holds several data sets of VOC's ({names}); give one of these folders, or"
                " copy their files into one folder of this form"
            )
        for base, folder in found:
            return _listed(base, folder)
    folders = {name: _xml_folder(root / name) for name in _SETS}
    return [
        part._replace(split=_split(name))
        for name, folder in folders.items()
        if folder is not None
        for part in _listed(root / name, folder)[:1]
    ]


def _xml_folder(base: Path) -> Path | None:
    folders = [base / name for name in ("Annotations", "annotations", "labels", "xmls", "xml", "")]
    return next((folder for folder in folders if _xml(folder)), None)


def _split(name: str) -> str:
    return "val" if name == "valid" else name


def _listed(base: Path, folder: Path) -> list[VocSplit]:
    present = _xml(folder)
    places = ("JPEGImages", "images", "Images", "imgs", "image", folder.relative_to(base), "")
    folders = [base / place for place in places if (base / place).is_dir()]
    images = next((f for f in folders if any(_images(f, name) for name in present[:20])), folder)
    known = set(present)
    masks = base / "SegmentationObject"
    masks = masks if any(masks.glob("*.png")) else None
    for lists in ("Segmentation", "Main") if masks else ("Main", "Layout", ""):
        found = {}
        for name in (*_SETS, "trainval"):
            file = base / "ImageSets" / lists / f"{name}.txt"
            if file.is_file() and not (name == "trainval" and {"train", "val"} & set(found)):
                lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
                names = [_named(line, known) for line in lines if line.split()]
                found["train" if name == "trainval" else _split(name)] = tuple(names)
        found = {split: names for split, names in found.items() if set(names) & known}
        if found:
            return [VocSplit(split, folder, images, masks, n) for split, n in found.items()]
    return [VocSplit("train", folder, images, masks, present)]


def _named(line: str, known: Set[str]) -> str:
    """Which XML file a line of a list names, without .xml: by its name or its image's path.

    A mark may follow, as in lists of a class; a name with spaces may stand in quotes.
    """
    line = line.strip()
    words = [re.sub(r"\s+-?[01]$", "", line), line, line.split()[0]]
    stems = []
    for word in words:
        name = word.strip("\"'").replace("\\", "/").rsplit("/", 1)[-1]
        stems += [name, name[: -len(Path(name).suffix)] if name.lower().endswith(IMAGES) else name]
    return next((stem for stem in stems if stem in known), stems[-1])


def _images(folder: Path, stem: str) -> list[str]:
    names = [stem + suffix for end in IMAGES for suffix in (end, end.upper())]
    return [name for name in names if (folder / name).is_file()]


def visible(file: Path, root: Path) -> bool:
    """Whether a file is none that macOS (._name), Jupyter (.ipynb_checkpoints) or others hide."""
    return not any(part.startswith(".") for part in file.relative_to(root).parts)


def _xml(folder: Path) -> tuple[str, ...]:
    """Names of the files of VOC's in a folder."""
    files = [file for file in sorted(folder.glob("*.xml")) if visible(file, folder)]
    # Others' XML lies about too: the first few tell.
    if not any(b"<annotation" in _bytes(file)[:4096] for file in files[:5]):
        return ()
    return tuple(file.stem for file in files)


def _bytes(file: Path) -> bytes:
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise UserError(f"{file}: too large for an annotation of VOC's")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror})") from None


def read_voc(
    part: VocSplit, every: Sequence[VocSplit]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]], str]:
    """Read a split.

    VOC counts pixels from 1 and a box's last one belongs to it; where one of the data set's boxes
    begins at 0 its corners are taken as they are. An outline's corners are points, not pixels: it
    is moved as its box is, and the box ends where it does.

    Args:
        part: which.
        every: all of the data set's, whose classes count.

    Returns:
        images, annotations and categories as COCO has them, and the SHA-256 of what was read.

    Raises:
        UserError: naming the file that can't be understood.
    """
    labels: set[str] = set()
    first = 1.0
    for other in every:
        for file in _files(other):
            for thing in _objects(_parse(file, _bytes(file)), file):
                labels.add(thing.label)
                first = min(first, *thing.corners[:2]) if thing.boxed else 0
    offset = 1 if first >= 1 else 0
    classes = sorted(labels)
    digest = hashlib.sha256(repr((classes, offset)).encode())
    images, annotations, numbers = [], [], itertools.count(1)
    for image_id, file in enumerate(_files(part), 1):
        data = _bytes(file)
        digest.update(f"{file.name}\0".encode() + data)
        tree = _parse(file, data)
        name = _image_name(tree, file, part.images)
        size = _size(tree, part.images / name)
        digest.update(f"{name}\0{size}".encode())
        images.append({"id": image_id, "file_name": name, "width": size[0], "height": size[1]})
        masks = _masks(part.masks / f"{file.stem}.png", size, digest) if part.masks else None
        for number, thing in enumerate(_objects(tree, file), 1):
            x0, y0, x1, y1 = thing.corners
            last = 0 if thing.rings else offset
            mask = None if masks is None else masks == number
            outlines = [[v - offset for v in ring] for ring in thing.rings] or None
            annotations.append({
                "id": next(numbers), "image_id": image_id, "iscrowd": 0,
                "category_id": classes.index(thing.label) + 1,
                "bbox": [x0 - offset, y0 - offset, x1 - x0 + last, y1 - y0 + last],
                "ignore": int(thing.difficult),
                "segmentation": _rle(mask) if mask is not None and mask.any() else outlines,
            })  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    return images, annotations, categories, digest.hexdigest()


def _files(part: VocSplit) -> Iterator[Path]:
    for name in part.names:
        file = part.annotations / f"{name}.xml"
        if not file.is_file():
            raise UserError(f"{file}: not found; the list of {part.split}'s images names it")
        yield file


def _parse(file: Path, data: bytes) -> Element:
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    depth = 0

    def refuse(*_: object) -> None:
        # What a document type may declare grows without end.
        raise UserError(f"{file}: has a document type, which no annotation of VOC's needs")

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

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(data, True)
        return builder.close()
    except (expat.ExpatError, ParseError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not valid XML ({error})") from None


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


def _image_name(tree: Element, file: Path, images: Path) -> str:
    """The image's, below its folder: what is listed is often another file's or a path."""
    listed = (tree.findtext("filename") or "").strip().replace("\\", "/").rsplit("/", 1)[-1]
    names = _images(images, file.stem)
    # The XML file is named after its image, whatever it says.
    names = [listed, *names] if Path(listed).stem == file.stem else [*names, listed]
    return next((n for n in names if n and (images / n).is_file()), listed or f"{file.stem}.jpg")


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
        with open_image(file.read_bytes()) as image:
            width, height = stored_size(image)
            return (height, width) if exif_orientation(image) >= 5 else (width, height)
    except (ImageError, OSError):
        return 1, 1  # told when it is read in full


def _masks(file: Path, size: tuple[int, int], digest: Any) -> np.ndarray | None:
    """`[h, w]` numbers of the objects, in the order of the XML file; None without a file."""
    if not file.is_file():
        return None
    data = _bytes(file)
    digest.update(data)
    try:
        with open_image(data) as image:
            mode, numbers = image.mode, np.asarray(image)
    except (ImageError, OSError) as error:
        raise UserError(f"{file}: {error}") from None
    if mode not in ("P", "L") or numbers.shape != size[::-1]:
        found = f"{mode}, {numbers.shape[1]} x {numbers.shape[0]}"
        raise UserError(
            f"{file}: expected a palette image of {size[0]} x {size[1]} that numbers the objects,"
            f" got {found}"
        )
    return numbers


def _rle(mask: np.ndarray) -> dict[str, Any]:
    packed: Any = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": packed["counts"].decode("ascii")}
