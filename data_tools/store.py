"""Annotations that stay in their file: of each its place there is held, and what plans go by.

Parsed, a large annotation file takes six times its size, and its processes have no need of all of
it at once.
"""

import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from casc.data.record import as_id
from casc.data.segmentation import is_flat, mask_box
from casc.errors import UserError

Stamp = tuple[int, int]
"""A file's size in bytes and the time of its last change in ns."""


class Kept(NamedTuple):
    """Some annotations, for `load`."""

    source: Path | bytes
    """The file, or the texts themselves."""
    stamp: Stamp
    """The file's."""
    places: np.ndarray
    """`[n, 3]` int64: first byte, bytes and the id that counts of each."""
    corners: bool = False
    """Whether the source's boxes are [x, y, x, y]."""
    objects: bool = False
    """Whether what the source marks as a crowd is an object."""


class Store(Mapping[int, list[dict[str, Any]]]):
    """Annotations by image id, in the file's order: see `normal` for the fields."""

    def __init__(
        self,
        source: Path | bytes,
        stamp: Stamp,
        rows: np.ndarray,
        images: Sequence[int],
        corners: bool = False,
        objects: bool = False,
    ) -> None:
        """Hold what is known of some annotations.

        Args:
            source: the file, or the texts themselves.
            stamp: the file's.
            rows: `[n, 5]` int64, sorted by image: first byte, bytes, id, image and category.
            images: the images' ids, also of those without annotations.
            corners: see `Kept`.
            objects: see `Kept`.
        """
        self._source, self._stamp, self._rows, self._images = source, stamp, rows, images
        self._corners, self._objects = corners, objects
        # Searched in for every image; of the rows' column that would copy it each time.
        self._keys = np.ascontiguousarray(rows[:, 3])

    @classmethod
    def of(cls, by_image: Mapping[int, Sequence[Mapping[str, Any]]]) -> "Store":
        """Store what isn't in a file."""
        data, rows = bytearray(), []
        for number in sorted(by_image):
            for entry in by_image[number]:
                text = json.dumps(entry).encode()
                rows.append([len(data), len(text), entry["id"], number, entry["category_id"]])
                data += text
        return cls(bytes(data), (0, 0), np.array(rows, np.int64).reshape(-1, 5), list(by_image))

    def ids(self, image_id: int) -> list[int]:
        """The ids of an image's annotations."""
        return self._of(image_id)[:, 2].tolist()

    def categories(self, image_id: int) -> list[int]:
        """The category of each of an image's annotations."""
        return self._of(image_id)[:, 4].tolist()

    def every_id(self) -> list[int]:
        """The ids of all annotations."""
        return self._rows[:, 2].tolist()

    def kept(self, image_id: int) -> Kept:
        """An image's annotations, to be loaded in another process."""
        places = self._of(image_id)[:, :3]
        if isinstance(self._source, Path):
            return Kept(self._source, self._stamp, places, self._corners, self._objects)
        texts = [self._source[first : first + size] for first, size, _ in places.tolist()]
        sizes = places[:, 1]
        own = np.stack([np.cumsum(sizes) - sizes, sizes, places[:, 2]], axis=1)
        return Kept(b"".join(texts), self._stamp, own, self._corners, self._objects)

    def only(self, images: Sequence[int]) -> "Store":
        """The annotations of these images."""
        about = self._source, self._stamp, self._rows
        return Store(*about, images, self._corners, self._objects)

    def with_corners(self) -> "Store":
        """The same, whose boxes are [x, y, x, y] in the file."""
        about = self._source, self._stamp, self._rows
        return Store(*about, self._images, True, self._objects)

    def without_crowds(self) -> "Store":
        """The same, in which what the file marks as crowds are objects."""
        about = self._source, self._stamp, self._rows
        return Store(*about, self._images, self._corners, True)

    def _of(self, image_id: int) -> np.ndarray:
        key = np.int64(image_id)
        low, high = (self._keys.searchsorted(key, side) for side in ("left", "right"))
        return self._rows[low:high]

    def __getitem__(self, image_id: int) -> list[dict[str, Any]]:
        return list(load(self.kept(image_id)))

    def __iter__(self) -> Iterator[int]:
        return iter(self._images)

    def __len__(self) -> int:
        return len(self._images)


def load(kept: Kept) -> Iterator[dict[str, Any]]:
    """Give annotations, one by one, in the form of `normal`.

    Raises:
        UserError: when their file isn't what it was.
    """
    for entries in load_each([kept]):
        yield from entries


def load_many(every: Sequence[Kept]) -> list[list[dict[str, Any]]]:
    """Give what `load` gives of each; a file is opened once.

    Raises:
        UserError: see `load`.
    """
    return [list(entries) for entries in load_each(every)]


def load_each(every: Iterable[Kept]) -> Iterator[Iterator[dict[str, Any]]]:
    """Give what `load` gives of each, to be taken, as far as it is wanted, before the next.

    Raises:
        UserError: see `load`.
    """
    for (source, stamp), some in itertools.groupby(every, lambda kept: (kept.source, kept.stamp)):
        if isinstance(source, bytes):
            yield from (_entries(kept, io.BytesIO(source)) for kept in some)
            continue
        try:
            with source.open("rb") as stream:
                for kept in some:
                    if len(kept.places) and file_stamp(stream.fileno()) != stamp:
                        raise UserError(
                            f"{source}: changed while shards were made; run the command again"
                        )
                    yield _entries(kept, stream)
        except OSError as error:
            raise UserError(f"{source}: can't be read any more ({error.strerror})") from None


def _entries(kept: Kept, stream: BinaryIO) -> Iterator[dict[str, Any]]:
    for first, size, number in kept.places.tolist():
        stream.seek(first)
        listed = json.loads(stream.read(size))
        entry = normal(listed)
        entry["id"] = number
        if kept.objects:
            entry["iscrowd"] = 0
        if kept.corners and has_box(listed):
            x0, y0, x1, y1 = entry["bbox"]
            entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
        yield entry


def file_stamp(file: int | Path) -> Stamp:
    """What tells whether a file was changed; of its path, or while it is open."""
    about = os.stat(file)  # noqa: PTH116 - of a descriptor too
    return about.st_size, about.st_mtime_ns


LARGEST_AREA = 1e12
"""Pixels; no image has as many."""


def is_area(value: object) -> bool:
    """Whether it is a number that can be an area; NaN, infinity and texts aren't."""
    return type(value) in (int, float) and abs(cast("float", value)) <= LARGEST_AREA


_NUMBER = re.compile(r"[-+]?(\d{1,19}\.?\d*|\.\d+)(e[-+]?\d{1,3})?", re.ASCII)
_FLAGS = {"false": 0, "true": 1}
_FAR = 1_000_000
"""Pixels; no image is as wide."""


def plain(value: Any) -> Any:
    """A number for a text of one, and for those in a list; what is no number stays as it is."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if not _NUMBER.fullmatch(text):
        return value
    number = float(text)
    return int(number) if number.is_integer() else number


def without_texts(entry: dict[str, Any]) -> dict[str, Any]:
    """An annotation with numbers in place of texts of these; itself if it has none.

    A list's first value tells whether it is of texts, for there are many lists.
    """
    changed: dict[str, Any] = {}
    for key in ("iscrowd", "ignore"):
        if isinstance(entry.get(key), str):
            changed[key] = _FLAGS.get(entry[key].strip().lower(), plain(entry[key]))
    for key in ("bbox", "segmentation"):
        if isinstance(entry.get(key), list) and _is_text(entry[key]):
            changed[key] = plain(entry[key])
    rle = entry.get("segmentation")
    if isinstance(rle, dict):
        about = {k: v for k, v in cast("dict[str, Any]", rle).items() if isinstance(v, list)}
        if any(map(_is_text, about.values())):
            changed["segmentation"] = {**rle, **{k: plain(v) for k, v in about.items()}}
    return {**entry, **changed} if changed else entry


def _is_text(value: Any) -> bool:
    if isinstance(value, list) and value:
        return any(map(_is_text, value)) if isinstance(value[0], list) else _is_text(value[0])
    return isinstance(value, str)


def has_box(entry: Mapping[str, Any]) -> bool:
    """Whether an annotation's box is given."""
    return entry.get("bbox") not in (None, [])


def own_box(entry: Mapping[str, Any]) -> Any:
    """An annotation's box, or its mask's where none is given; None without either."""
    if has_box(entry):
        return entry["bbox"]
    mask = entry.get("segmentation")
    height, width = mask["size"] if isinstance(mask, dict) else (_FAR, _FAR)
    box = mask_box(mask, width, height)
    return None if box is None else list(box)


def normal(entry: dict[str, Any]) -> dict[str, Any]:
    """What counts of an annotation that is checked.

    Returns:
        id, image_id, category_id, bbox, area (None where no number is given), iscrowd, ignore where
        set, segmentation (None where not given).
    """
    entry = without_texts(entry)
    annotation: dict[str, Any] = {
        "id": as_id(entry.get("id")),
        "image_id": as_id(entry["image_id"]),
        "category_id": as_id(entry["category_id"]),
        "bbox": own_box(entry),
        "area": entry.get("area") if is_area(entry.get("area")) else None,
        "iscrowd": int(entry.get("iscrowd") or 0),
        "segmentation": entry.get("segmentation"),
    }
    if is_flat(annotation["segmentation"]):
        annotation["segmentation"] = [annotation["segmentation"]]
    if entry.get("ignore"):
        annotation["ignore"] = 1
    return annotation
