"""COCO annotation files: read, checked field by field, and put in order.

What can't be understood is refused, with the file and the field; what can be repaired
without guessing is repaired and reported.
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from casc.data.index import Category
from casc.errors import UserError
from data_tools.json_stream import JsonLists
from data_tools.report import Finding

LARGEST_ID = 2**63 - 1
"""Largest image id: batches hold it in 64 bits."""

MOST_FAULTS = 10
"""Faults of a file that are named before it is given up."""

FARTHEST = 1_000_000
"""Largest coordinate of a box in pixels; the largest photographs have a tenth of that."""


MOST_PIXELS = 2**28
"""Of an image, by the annotation file: masks of its size are made."""


class ImageEntry(NamedTuple):
    """An entry of `images`."""

    id: int
    file_name: str
    width: int
    height: int


class Packed(Mapping[int, list[dict[str, Any]]]):
    """Annotations by image id, compressed: unpacked, a large file takes six times its size."""

    def __init__(self, packed: dict[int, tuple[bytes, ...]]) -> None:
        self._packed = packed

    @classmethod
    def of(cls, by_image: Mapping[int, Iterable[Mapping[str, Any]]]) -> "Packed":
        """Pack what is unpacked."""
        return cls({i: tuple(map(pack_annotation, entries)) for i, entries in by_image.items()})

    def packed(self, image_id: int) -> tuple[bytes, ...]:
        """An image's annotations as they are held, for `unpack_annotation`."""
        return self._packed[image_id]

    def __getitem__(self, image_id: int) -> list[dict[str, Any]]:
        return [unpack_annotation(data) for data in self._packed[image_id]]

    def __iter__(self) -> Iterator[int]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


def pack_annotation(annotation: Mapping[str, Any], text: str | None = None) -> bytes:
    """Give a checked annotation in few bytes; `text` is its JSON where that is known."""
    return zlib.compress((json.dumps(annotation) if text is None else text).encode(), 1)


def unpack_annotation(data: bytes) -> dict[str, Any]:
    """Give the annotation back, with the fields of `Annotations.by_image`."""
    return _normal(json.loads(zlib.decompress(data)))


class Annotations(NamedTuple):
    """An annotation file."""

    images: list[ImageEntry]
    """In the file's order, without copies."""
    by_image: Packed
    """Annotations by image id, in the file's order: id, image_id, category_id, bbox, area
    (None where not given), iscrowd, ignore where set, segmentation (None where not given)."""
    categories: tuple[Category, ...]
    """By ascending id, as the reference orders labels."""
    listed_images: int
    listed_annotations: int
    findings: list[Finding]


_KEYS = ("images", "annotations", "categories")


def read_annotations(path: Path, *, skip_invalid: bool = False) -> Annotations:
    """Read and check a COCO annotation file, of any size in little memory.

    Args:
        path: the file.
        skip_invalid: leave annotations out that can't be understood, and report them.

    Raises:
        UserError: naming the file, the field and what was expected there.
    """
    lists = JsonLists(path, _KEYS)
    try:
        return _gather(lists, lists, str(path), skip_invalid)
    except UserError:  # which is a ValueError too
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except RecursionError:
        raise UserError(f"{path}: not a COCO file (nested too deeply)") from None
    except MemoryError:
        raise UserError(f"{path}: too large for this machine's memory") from None
    except TypeError:
        raise _no_object(str(path)) from None
    except ValueError as error:  # bad JSON, bad UTF-8, numbers of thousands of digits
        raise UserError(f"{path}: not valid JSON ({error})") from None


class _Parsed:
    """The lists of an object that is parsed already, as `JsonLists` gives them."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.found = {key for key in _KEYS if key in data}
        self.others = {key: data[key] for key in self.found if not isinstance(data[key], list)}
        self._data = data

    def __iter__(self) -> Iterator[tuple[str, Any, None]]:
        for key in _KEYS:
            if key in self.found and key not in self.others:
                yield from ((key, entry, None) for entry in self._data[key])


def check_annotations(data: object, file: str) -> Annotations:
    """Check an annotation file that is parsed already; `file` is what errors call it.

    Raises:
        UserError: see `read_annotations`.
    """
    if not isinstance(data, dict):
        raise _no_object(file)
    lists = _Parsed(cast("dict[str, Any]", data))
    return _gather(lists, lists, file)


def _gather(
    elements: Iterable[tuple[str, Any, str | None]],
    lists: JsonLists | _Parsed,
    file: str,
    skip_invalid: bool = False,
) -> Annotations:
    findings: list[Finding] = []
    images, objects = _Images(file, findings), _Objects(file)
    categories: list[dict[str, Any]] = []
    counts: dict[str, int] = dict.fromkeys(_KEYS, 0)
    faults: list[str] = []
    only_annotations = True
    for key, entry, text in elements:
        place = f"{key}[{counts[key]}]"
        counts[key] += 1
        try:
            if not isinstance(entry, dict):
                raise _error(file, place, "an object", entry)
            if key == "images":
                images.add(entry, place)
            elif key == "annotations":
                objects.add(entry, place, text)
            else:
                categories.append(entry)
        except UserError as error:
            if key == "annotations" and skip_invalid:
                number = entry.get("id") if isinstance(entry, dict) else None
                shown = str(error).removeprefix(f"{file}: ").removesuffix("; mend it")
                known = int(number) if _is_id(number) else counts[key] - 1  # type: ignore[arg-type]
                findings.append(Finding("invalid", known, shown))
                continue
            faults.append(str(error))
            only_annotations &= key == "annotations"
            if len(faults) == MOST_FAULTS:
                break
    if faults:
        more = [fault.removeprefix(f"{file}: ").removesuffix("; mend it") for fault in faults[1:]]
        remedy = ", or --skip-invalid leaves out such annotations" if only_annotations else ""
        raise UserError("; ".join([faults[0] + remedy, *more]))
    for key in _KEYS:
        if key not in lists.found:
            raise UserError(f"{file}: {key}: missing; is this a COCO instances file?")
        if key in lists.others:
            raise _error(file, key, "a list", lists.others[key])
    for key in ("images", "categories"):
        if not counts[key]:
            raise UserError(f"{file}: {key}: empty; there is nothing to make shards of")
    of_categories: list[Finding] = []
    named = _categories(categories, file, of_categories)
    findings[:0] = of_categories
    listed = list(images.by_id.values())
    findings += [
        Finding("unused_category", category.id, category.name)
        for category in named
        if category.id not in objects.categories
    ]
    return Annotations(
        images=listed,
        by_image=objects.by_image(listed, findings),
        categories=named,
        listed_images=counts["images"],
        listed_annotations=counts["annotations"],
        findings=findings,
    )


def _no_object(file: str) -> UserError:
    return UserError(f"{file}: expected an object with images, annotations and categories")


def _categories(
    entries: list[dict[str, Any]], file: str, findings: list[Finding]
) -> tuple[Category, ...]:
    by_id: dict[int, Category] = {}
    for i, entry in enumerate(entries):
        place = f"categories[{i}]"
        category = Category(
            id=int(_field(entry, "id", file, place, _is_id, "an integer")),
            name=_field(entry, "name", file, place, _is_text, "a text that isn't empty"),
        )
        known = by_id.setdefault(category.id, category)
        if known.name != category.name:
            raise UserError(
                f"{file}: {place}.id: {category.id} is {category.name!r} here and "
                f"{known.name!r} before; give each category an id of its own"
            )
        if known is not category:
            findings.append(Finding("duplicate_category", category.id, category.name))
    names: dict[str, int] = {}
    for category in by_id.values():
        first = names.setdefault(category.name, category.id)
        if first != category.id:
            detail = f"{category.name!r} is also the name of {first}"
            findings.append(Finding("duplicate_category_name", category.id, detail))
    return tuple(by_id[i] for i in sorted(by_id))


class _Images:
    """Entries of `images`, one after another."""

    def __init__(self, file: str, findings: list[Finding]) -> None:
        self.by_id: dict[int, ImageEntry] = {}
        self._names: dict[str, int] = {}
        self._file, self._findings = file, findings

    def add(self, entry: dict[str, Any], place: str) -> None:
        file = self._file
        expected = f"an integer from 0 to {LARGEST_ID}"
        image = ImageEntry(
            id=int(_field(entry, "id", file, place, _is_image_id, expected)),
            file_name=_field(_named(entry), "file_name", file, place, _is_text, "a file's name"),
            width=int(_field(entry, "width", file, place, _is_size, "a whole number of pixels")),
            height=int(_field(entry, "height", file, place, _is_size, "a whole number of pixels")),
        )
        if image.width * image.height > MOST_PIXELS:
            raise UserError(
                f"{file}: {place}: {image.width} x {image.height} is too large, expected at most"
                f" {MOST_PIXELS:,} pixels; mend it, or leave the image out"
            )
        fault = _path_fault(image.file_name)
        if fault:
            shown = _shown(image.file_name)
            raise UserError(
                f"{file}: {place}.file_name: {shown} {fault}; "
                "give paths relative to the split's folder"
            )
        known = self.by_id.setdefault(image.id, image)
        if known is not image:
            if known != image:
                raise UserError(
                    f"{file}: {place}.id: {image.id} is also the id of {_shown(known.file_name)}, "
                    "so its annotations can't be told apart; give each image an id of its own"
                )
            self._findings.append(Finding("duplicate_image", image.id, image.file_name))
            return
        first = self._names.setdefault(image.file_name, image.id)
        if first != image.id:
            detail = f"{image.file_name} is also image {first}"
            self._findings.append(Finding("duplicate_file_name", image.id, detail))


class _Objects:
    """Entries of `annotations`, one after another, in whatever order file and images come."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._packed: list[bytes] = []
        self._image: list[int] = []
        self._first: dict[int, int] = {}
        """Where in the list the first annotation of an id is."""
        self._copies: list[int] = []
        self._clashes: list[int] = []
        self._lacks: list[Finding] = []
        self.categories: set[int] = set()

    def add(self, entry: dict[str, Any], place: str, text: str | None) -> None:
        _check_annotation(entry, self._file, place)
        annotation = _normal(entry)
        number, at = annotation["id"], len(self._packed)
        known = self._first.setdefault(number, at)
        if known != at:
            # As text, because NaN isn't equal to itself.
            first = unpack_annotation(self._packed[known])
            if json.dumps(first) == json.dumps(annotation):
                self._copies.append(number)
                return
            self._clashes.append(at)
        self._packed.append(pack_annotation(annotation, text))
        self._image.append(annotation["image_id"])
        self.categories.add(annotation["category_id"])
        for key, kind in (("area", "missing_area"), ("iscrowd", "missing_iscrowd")):
            if entry.get(key) is None:
                self._lacks.append(Finding(kind, number, str(at)))

    def by_image(self, images: list[ImageEntry], findings: list[Finding]) -> Packed:
        """Sort by image, and number anew what shares an id."""
        known = {image.id for image in images}
        # Tools that look annotations up by id would lose all but one of those that share it.
        fresh = max(self._first, default=0)
        renumbered: list[Finding] = []
        for at in self._clashes:
            if self._image[at] not in known:
                continue
            fresh += 1
            annotation = unpack_annotation(self._packed[at])
            renumbered.append(Finding("renumbered", annotation["id"], f"now {fresh}"))
            self._packed[at] = pack_annotation({**annotation, "id": fresh})
        findings += [Finding("duplicate_annotation", number) for number in self._copies]
        sorted_: dict[int, list[bytes]] = {image.id: [] for image in images}
        for image_id, packed in zip(self._image, self._packed, strict=True):
            if image_id in known:
                sorted_[image_id].append(packed)
            else:
                number = unpack_annotation(packed)["id"]
                findings.append(Finding("unknown_image", number, f"image {image_id}"))
        # Of what is left out there is nothing more to say.
        findings += [
            lack._replace(detail="")
            for lack in self._lacks
            if self._image[int(lack.detail)] in known
        ]
        findings += renumbered
        return Packed({i: tuple(entries) for i, entries in sorted_.items()})


def _check_annotation(entry: dict[str, Any], file: str, place: str) -> None:
    _field(entry, "bbox", file, place, _is_box, f"4 finite numbers up to {FARTHEST}")
    for key in ("id", "image_id", "category_id"):
        _field(entry, key, file, place, _is_id, "an integer")
    if entry.get("area") is not None:
        _field(entry, "area", file, place, _is_area, "a finite number")
    for key in ("iscrowd", "ignore"):
        if entry.get(key) is not None:
            _field(entry, key, file, place, _is_flag, "0 or 1")
    segmentation = entry.get("segmentation")
    fault = _segmentation_fault(segmentation) if segmentation is not None else None
    if fault:
        where, expected, found = fault
        raise _error(file, f"{place}.segmentation{where}", expected, found)


def _normal(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What counts of an annotation that is checked."""
    annotation: dict[str, Any] = {
        **{key: int(entry[key]) for key in ("id", "image_id", "category_id")},
        "bbox": entry["bbox"],
        "area": entry.get("area"),
        "iscrowd": int(entry.get("iscrowd") or 0),
        "segmentation": entry.get("segmentation"),
    }
    if entry.get("ignore"):
        annotation["ignore"] = 1
    return annotation


def _segmentation_fault(segmentation: object) -> tuple[str, str, object] | None:
    """Where a segmentation isn't of COCO's form. Values that are wrong are found later."""
    if isinstance(segmentation, dict):
        rle = cast("dict[str, Any]", segmentation)
        size, counts = rle.get("size"), rle.get("counts")
        if not (isinstance(size, list) and len(size) == 2 and all(map(_is_integer, size))):
            return ".size", "[height, width]", size
        if isinstance(counts, str):
            return None
        if not isinstance(counts, list) or not all(map(_is_integer, counts)):
            return ".counts", "a compressed RLE's text or a list of integers", counts
        return None
    if not isinstance(segmentation, list):
        return "", "a list of polygons or an RLE", segmentation
    for i, part in enumerate(cast("list[Any]", segmentation)):
        if not isinstance(part, list):
            return f"[{i}]", "a list of coordinates", part
        if not set(map(type, part)) <= {int, float}:
            wrong = next(value for value in part if type(value) not in (int, float))
            return f"[{i}]", "numbers only", wrong
    return None


def _path_fault(name: str) -> str:
    """What makes a file's name unfit to be looked up below a folder; empty if nothing does."""
    if re.match(r"[/\\]|[A-Za-z]:", name):
        return "is an absolute path"
    if ".." in re.split(r"[/\\]", name):
        return "leads out of the folder"
    if "\0" in name:
        return "holds a NUL character"
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return "can't be a file's name here"
    return ""


def _field(
    entry: dict[str, Any],
    key: str,
    file: str,
    place: str,
    test: Callable[[Any], bool],
    expected: str,
) -> Any:
    if key not in entry:
        raise UserError(f"{file}: {place}.{key}: missing, expected {expected}; mend it")
    if not test(entry[key]):
        raise _error(file, f"{place}.{key}", expected, entry[key])
    return entry[key]


def _error(file: str, place: str, expected: str, found: object) -> UserError:
    return UserError(f"{file}: {place}: expected {expected}, got {_shown(found)}; mend it")


def _shown(value: object) -> str:
    """A value in a few ASCII characters; whole it may be endless, or not printable."""
    if isinstance(value, (list, dict)) and len(cast("list[Any]", value)) > 8:
        return f"a {type(value).__name__} of {len(cast('list[Any]', value))}"
    if type(value) is int and abs(value) > 10**20:
        return "a huge integer"
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _named(entry: dict[str, Any]) -> dict[str, Any]:
    """An image's entry with a file's name: LVIS gives an address at COCO's server only."""
    url = entry.get("coco_url")
    if "file_name" in entry or not isinstance(url, str):
        return entry
    return {**entry, "file_name": "/".join(url.split("/")[-2:])}


def _is_integer(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_id(value: object) -> bool:
    """Whole numbers, also those that went through a table of floats: 1.0."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return _is_integer(value)


def _is_image_id(value: object) -> bool:
    return _is_id(value) and 0 <= cast("float", value) <= LARGEST_ID


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_size(value: object) -> bool:
    whole = type(value) is int or (isinstance(value, float) and value.is_integer())
    return whole and 1 <= cast("float", value) <= FARTHEST


def _is_coordinate(value: object) -> bool:
    return type(value) in (int, float) and -FARTHEST <= cast("float", value) <= FARTHEST


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_coordinate, value))


def _is_area(value: object) -> bool:
    return type(value) in (int, float) and abs(cast("float", value)) <= FARTHEST**2


def _is_flag(value: object) -> bool:
    return isinstance(value, (int, float)) and value in (0, 1)
