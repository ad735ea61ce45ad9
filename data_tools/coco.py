"""COCO annotation files: read, checked field by field, and put in order.

What can't be understood is refused, with the file and the field; what can be repaired
without guessing is repaired and reported.
"""

import itertools
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from casc.data.index import Category
from casc.data.record import as_id, is_text_id
from casc.data.segmentation import is_flat
from casc.errors import UserError
from data_tools.json_stream import JsonLists
from data_tools.report import Finding
from data_tools.store import Kept, Store, has_box, is_area, load, own_box, plain, without_texts

_NAME = "a text of whole characters that isn't empty"
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


class Annotations(NamedTuple):
    """An annotation file."""

    images: list[ImageEntry]
    """In the file's order, without copies."""
    by_image: Store
    """Annotations by image id, in the file's order."""
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
        raise UserError(encoding_fault(path) or f"{path}: not valid JSON ({error})") from None


def encoding_fault(path: Path) -> str:
    """What a file that isn't JSON in UTF-8 is, with what to do; empty if that can't be told."""
    with path.open("rb") as stream:
        head = stream.read(4)
    if head.startswith((b"\x1f\x8b", b"PK", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd")):
        return f"{path}: is compressed; unpack it, and give the JSON file"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (any(head) and 0 in head):
        found = "UTF-32" if b"\0\0" in head else "UTF-16"
        return f"{path}: is {found}; save it as UTF-8, as by iconv -f {found} -t UTF-8"
    return ""


class _Parsed:
    """The lists of an object that is parsed already, as `JsonLists` gives them."""

    stamp = 0, 0

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
    elements: Iterable[tuple[str, Any, tuple[int, int] | None]],
    lists: JsonLists | _Parsed,
    file: str,
    skip_invalid: bool = False,
) -> Annotations:
    findings: list[Finding] = []
    images, objects = _Images(file, findings), _Objects(file, lists)
    categories: list[dict[str, Any]] = []
    counts: dict[str, int] = dict.fromkeys(_KEYS, 0)
    faults: list[str] = []
    only_annotations = True
    for key, entry, where in elements:
        place = f"{key}[{counts[key]}]"
        counts[key] += 1
        if isinstance(entry, dict) and "segments_info" in entry and "bbox" not in entry:
            raise UserError(
                f"{file}: is of COCO's panoptic form (segments_info, masks in PNG files), which"
                " isn't read; give the file of instances (instances_*.json), or make one by"
                " panopticapi's converters/panoptic2detection_coco_format.py"
            )
        try:
            if not isinstance(entry, dict):
                raise _error(file, place, "an object", entry)
            if key == "images":
                images.add(entry, place)
            elif key == "annotations":
                objects.add(entry, place, where)
            else:
                categories.append(entry)
        except UserError as error:
            if key == "annotations" and skip_invalid:
                number = entry.get("id") if isinstance(entry, dict) else None
                shown = str(error).removeprefix(f"{file}: ").removesuffix("; mend it")
                known = as_id(number)
                at = counts[key] - 1
                findings.append(Finding("invalid", at if known is None else known, shown))
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
            id=as_id(_field(entry, "id", file, place, _is_id, "an integer")) or 0,
            name=_field(entry, "name", file, place, _is_text, _NAME),
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
        texts = {key: plain(entry.get(key)) for key in ("width", "height")
                 if isinstance(entry.get(key), str)}  # fmt: skip
        entry = {**entry, **texts}
        pixels = "the file's own, a whole number of pixels"
        expected = f"an integer from 0 to {LARGEST_ID}, or a text"
        image = ImageEntry(
            id=as_id(_field(entry, "id", file, place, _is_image_id, expected)) or 0,
            file_name=below(
                _field(_named(entry), "file_name", file, place, _is_name, "a file's name")
            ),
            width=int(_field(entry, "width", file, place, _is_size, pixels)),
            height=int(_field(entry, "height", file, place, _is_size, pixels)),
        )
        if image.width * image.height > MOST_PIXELS:
            raise UserError(
                f"{file}: {place}: {image.width} x {image.height} is too large, expected at most"
                f" {MOST_PIXELS:,} pixels; mend it, or leave the image out"
            )
        fault = _path_fault(image.file_name)
        if fault:
            shown = _shown(image.file_name)
            raise UserError(f"{file}: {place}.file_name: {shown} {fault}; mend it")
        known = self.by_id.setdefault(image.id, image)
        if known is not image:
            if known != image:
                raise UserError(
                    f"{file}: {place}.id: {image.id} is also the id of {_shown(known.file_name)}, "
                    "so its annotations can't be told apart; give each image an id of its own"
                )
            self._findings.append(Finding("duplicate_image", image.id, image.file_name))
            return
        if is_text_id(entry["id"]):
            self._findings.append(Finding("text_image_id", image.id, f"{entry['id']!a:.60}"))
        if texts:
            self._findings.append(Finding("text_size", image.id))
        first = self._names.setdefault(image.file_name, image.id)
        if first != image.id:
            detail = f"{image.file_name} is also image {first}"
            self._findings.append(Finding("duplicate_file_name", image.id, detail))


_ROW = 5
"""Columns of a `Store`."""


class _Objects:
    """Entries of `annotations`, one after another, in whatever order file and images come."""

    def __init__(self, file: str, lists: JsonLists | _Parsed) -> None:
        self._file, self._lists = file, lists
        self._texts = bytearray()
        """Of annotations that are parsed already."""
        self._rows = array("q")
        self._lacks: list[tuple[str, MutableSequence[int]]] = []
        for kind in (
            "missing_area", "missing_iscrowd", "flat_outline", "text_id", "text_number",
            "missing_box", "missing_id",
        ):  # fmt: skip
            self._lacks.append((kind, array("q")))
        self.categories: set[int] = set()

    def add(self, entry: dict[str, Any], place: str, where: tuple[int, int] | None) -> None:
        written, entry = entry, without_texts(entry)
        _check_annotation(entry, self._file, place)
        if where is None:
            text = json.dumps(written).encode()
            where = len(self._texts), len(text)
            self._texts += text
        row = len(self._rows) // _ROW
        lacking = (
            not is_area(entry.get("area")),
            entry.get("iscrowd") is None,
            is_flat(entry.get("segmentation")),
            is_text_id(entry.get("id")),
            entry is not written,
            not has_box(entry),
            entry.get("id") is None,
        )
        for (_, rows), lacks in zip(self._lacks, lacking, strict=True):
            if lacks:
                rows.append(row)
        about = [as_id(entry.get(key)) or 0 for key in ("id", "image_id", "category_id")]
        self._rows.extend((*where, *about))
        self.categories.add(about[2])

    def by_image(self, images: list[ImageEntry], findings: list[Finding]) -> Store:
        """Sort by image, leave out copies, and number anew what shares an id."""
        rows = np.frombuffer(self._rows, np.int64).reshape(-1, _ROW).copy()
        unnumbered = np.array(dict(self._lacks)["missing_id"], np.int64)
        rows[unnumbered, 2] = _fresh_ids(rows[:, 2], len(unnumbered))
        parsed = isinstance(self._lists, _Parsed)
        source = bytes(self._texts) if parsed else Path(self._file)
        copies, clashes = self._repeated(rows, source)
        listed = np.isin(rows[:, 3], np.array([image.id for image in images], np.int64))
        findings += [Finding("duplicate_annotation", number) for number in rows[copies, 2].tolist()]
        unknown = ~listed
        unknown[copies] = False
        findings += [
            Finding("unknown_image", number, f"image {image}")
            for number, image in rows[unknown, 2:4].tolist()
        ]
        # Of what is left out there is nothing more to say.
        kept = listed.copy()
        kept[copies] = False
        for kind, at in self._lacks:
            lacking = np.array(at, np.int64)
            findings += [Finding(kind, n) for n in rows[lacking[kept[lacking]], 2].tolist()]
        # Tools that look annotations up by id would lose all but one of those that share it.
        clashes = [at for at in clashes if kept[at]]
        for at, fresh in zip(clashes, _fresh_ids(rows[:, 2], len(clashes)), strict=True):
            findings.append(Finding("renumbered", int(rows[at, 2]), f"now {fresh}"))
            rows[at, 2] = fresh
        rows = rows[kept]
        rows = rows[np.argsort(rows[:, 3], kind="stable")]
        return Store(source, self._lists.stamp, rows, [image.id for image in images])

    def _repeated(self, rows: np.ndarray, source: Path | bytes) -> tuple[list[int], list[int]]:
        """Which rows are copies of the first one with their id, and which only share it."""
        order = np.argsort(rows[:, 2], kind="stable")
        ids = rows[order, 2]
        again = np.flatnonzero(ids[1:] == ids[:-1]) + 1
        firsts = order[np.searchsorted(ids, ids[again])]
        copies: list[int] = []
        clashes: list[int] = []
        for at, first in sorted(zip(order[again].tolist(), firsts.tolist(), strict=True)):
            pair = Kept(source, self._lists.stamp, rows[[at, first], :3])
            # As text, because NaN isn't equal to itself.
            mine, other = (json.dumps(entry) for entry in load(pair))
            (copies if mine == other else clashes).append(at)
        return copies, clashes


def _fresh_ids(ids: np.ndarray, count: int) -> list[int]:
    """Ids that no annotation has."""
    highest = int(ids.max(initial=0))
    if highest + count < 2**63:
        return list(range(highest + 1, highest + 1 + count))
    taken = set(ids.tolist())
    return list(itertools.islice((i for i in itertools.count(1) if i not in taken), count))


def _check_annotation(entry: dict[str, Any], file: str, place: str) -> None:
    if entry.get("id") is not None:
        _field(entry, "id", file, place, _is_any_id, "an integer or a text")
    _field(entry, "image_id", file, place, _is_any_id, "an integer or a text")
    _field(entry, "category_id", file, place, _is_id, "an integer")
    for key in ("iscrowd", "ignore"):
        if entry.get(key) is not None:
            _field(entry, key, file, place, _is_flag, "0 or 1")
    segmentation = entry.get("segmentation")
    fault = _segmentation_fault(segmentation) if segmentation is not None else None
    if fault:
        where, expected, found = fault
        raise _error(file, f"{place}.segmentation{where}", expected, found)
    expected = f"4 finite numbers up to {FARTHEST}"
    box = own_box(entry)
    if box is None:
        raise UserError(f"{file}: {place}.bbox: missing, expected {expected}, or a mask; mend it")
    if not _is_box(box):
        raise _error(file, f"{place}.bbox", expected, box)


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
    if is_flat(segmentation):
        return None
    for i, part in enumerate(cast("list[Any]", segmentation)):
        if not isinstance(part, list):
            return f"[{i}]", "a list of coordinates", part
        if not set(map(type, part)) <= {int, float}:
            wrong = next(value for value in part if type(value) not in (int, float))
            return f"[{i}]", "numbers only", wrong
    return None


def below(name: str) -> str:
    """Give an absolute path, or one that leads out of a folder, as one that lies below it.

    Exports keep those of the machine that made them: the file is then looked for by its last parts.
    Label Studio's local files are at an address that ends in their path.
    """
    name = re.sub(r"^/data/local-files/\?d=(?=.)", "", name, flags=re.DOTALL)
    parts = re.split(r"[/\\]", name)
    if ".." not in parts and not re.match(r"[/\\]|[A-Za-z]:", name):
        return name
    parts[0] = re.sub(r"^[A-Za-z]:", "", parts[0])
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def _path_fault(name: str) -> str:
    """What makes a file's name unfit to be looked up; empty if nothing does."""
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
    """Whole numbers. No other texts: a class's name in place of its id would be lost silently."""
    return as_id(value) is not None and not is_text_id(value)


def _is_any_id(value: object) -> bool:
    return as_id(value) is not None


def _is_image_id(value: object) -> bool:
    number = as_id(value)
    return number is not None and number >= 0


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(below(value).strip())


def _is_text(value: object) -> bool:
    # Half of a surrogate pair, as cutting a text leaves it, can't be written again.
    return (
        isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)
    )


def _is_size(value: object) -> bool:
    whole = type(value) is int or (isinstance(value, float) and value.is_integer())
    return whole and 1 <= cast("float", value) <= FARTHEST


def _is_coordinate(value: object) -> bool:
    return type(value) in (int, float) and -FARTHEST <= cast("float", value) <= FARTHEST


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_coordinate, value))


def _is_flag(value: object) -> bool:
    return isinstance(value, (int, float)) and value in (0, 1)
