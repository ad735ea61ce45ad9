"""Samples: the images of a shard with what there is to learn from them.

A shard is a plain tar. Each sample is two members that share a key, the image id in 12
digits: the image's own bytes, and a JSON with its annotations:

    image_id, file_name, width, height (as decoded), orientation (EXIF's, that decoding has to
    undo), train (false: for evaluation only), annotations: a list of
        id, category_id, bbox, area, iscrowd, segmentation: COCO's own, for evaluation
        label: 0-based, -1 where the category is unknown
        train: false where the annotation isn't trained on (crowds, degenerate boxes ...)
        box_only: true where training without masks has it all the same
        region: true where it may become a region to ignore
        box: [x0, y0, x1, y1] in pixels
        rings: only where it is trained on and the segmentation is an RLE, or outlines that overlap
            themselves: the mask's boundaries [[x, y, ...], ...]
        mask_iou: of the rings with the mask

Legend: g trainable objects of an image, e polygon edges of an object, h x w stored size,
r regions to ignore.
"""

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np

from casc.data.decode import decode_image
from casc.data.record import AnnotationRecord, parse_record
from casc.errors import UserError
from casc.json_files import open_plain

GRID_LINES = 84
"""Scan lines by which a mask target of 28 cells is rasterised."""
FREE_CROSSINGS = 16
"""Edges of an outline that each of the lines may cross without more room than for the edges."""


class Readable(Protocol):
    """What a tar can be read from."""

    def read(self, count: int, /) -> bytes:
        """At most so many bytes, b"" at the end."""
        ...


class Sample(NamedTuple):
    """A decoded image and its trainable objects, in pixels of the stored image."""

    image: np.ndarray
    """[h, w, C] uint8: RGB, grey or planes."""
    boxes: np.ndarray
    """[g, 4] float32 xyxy, not clipped to the image."""
    labels: np.ndarray
    """[g] int64, 0-based."""
    edges: list[np.ndarray]
    """g arrays [e, 4] float32 (x0, y0, x1, y1); the non-zero winding rule gives the mask."""
    segmentations: list[Any]
    """g COCO segmentations (polygon lists or RLE dicts), for mask targets from bitmaps."""
    image_id: int
    regions: np.ndarray | None = None
    """[r, 4] float32 xyxy, where they are asked for."""


def read_sample(
    image_bytes: bytes,
    json_bytes: bytes,
    *,
    masks: bool = True,
    regions: bool = False,
    channels: int = 3,
) -> Sample:
    """Decode a sample's two members; all that isn't trained on is left out.

    Args:
        image_bytes: the image's file.
        json_bytes: its annotations.
        masks: whether masks are trained. Otherwise objects have no edges, and those that lack
            nothing but a mask are among them.
        regions: also give what is to be ignored: crowds, what is marked so, and with `masks`
            what has no usable one.
        channels: of the image, see `decode_image`.

    Raises:
        ImageError: when the image can't be decoded or has another size than the JSON says.
    """
    record = parse_record(json_bytes)
    image = decode_image(image_bytes, record["orientation"], channels)
    if image.shape[:2] != (record["height"], record["width"]):
        raise UserError(
            f"{record['file_name']}: decodes to {image.shape[1]} x {image.shape[0]}, its JSON "
            f"says {record['width']} x {record['height']}; run `data_tools check`"
        )
    every = record["annotations"]
    objects = [a for a in every if a["train"] or (not masks and a.get("box_only"))]
    ignored = [a["box"] for a in every if a.get("region") and (masks or not a.get("box_only"))]
    return Sample(
        image=image,
        boxes=np.array([a["box"] for a in objects], np.float32).reshape(-1, 4),
        labels=np.array([a["label"] for a in objects], np.int64),
        edges=annotations_edges(objects)
        if masks
        else [np.zeros((0, 4), np.float32)] * len(objects),
        segmentations=[a["segmentation"] for a in objects] if masks else [],
        image_id=record["image_id"],
        regions=np.array(ignored, np.float32).reshape(-1, 4) if regions else None,
    )


def annotation_edges(annotation: AnnotationRecord) -> np.ndarray:
    """Give the polygon edges `[e, 4]` float32 of a sample JSON's annotation.

    Polygons may run either way, so each part is turned to positive area, and the non-zero
    rule gives their union. `rings`, traced from an RLE, say by their direction whether they
    bound the mask (positive area) or a hole in it (negative), and are left as they are.
    """
    return annotations_edges([annotation])[0]


def annotations_edges(annotations: Sequence[AnnotationRecord]) -> list[np.ndarray]:
    """Give each annotation's edges as `annotation_edges` does, all of an image at once."""
    return _edges(
        [a["rings"] if "rings" in a else a["segmentation"] for a in annotations],
        ["rings" in a for a in annotations],
    )


def polygon_edges(parts: Sequence[Sequence[float]], *, keep_direction: bool = False) -> np.ndarray:
    """Give the edges `[e, 4]` float32 (x0, y0, x1, y1) of closed polygons.

    Edges of no length (a first point repeated at the end) and parts of fewer than three
    points are left out.

    Args:
        parts: polygons as flat lists `[x0, y0, x1, y1, ...]` in pixels.
        keep_direction: leave the direction of parts as it is. Otherwise each part is turned
            to positive area: clockwise as seen on the screen, where y points down.

    Raises:
        ValueError: a part isn't a flat list of an even count of numbers.
    """
    return _edges([parts], [keep_direction])[0]


def edge_room(outlines: Sequence[np.ndarray]) -> int:
    """Give the edge capacity that an image's objects need of a batch.

    It has to hold all edges. Where an outline is so ragged that a horizontal line crosses more
    than `FREE_CROSSINGS` of its edges, it has to hold the crossings with a mask's scan lines too.

    Args:
        outlines: each object's edges `[e, 4]`.
    """
    # As many edges as are free can't cross more often.
    ragged = (edges for edges in outlines if len(edges) > FREE_CROSSINGS)
    most = max((_most_crossings(edges) for edges in ragged), default=0)
    crossings = GRID_LINES * most if most > FREE_CROSSINGS else 0
    return max(sum(map(len, outlines)), crossings)


def _most_crossings(edges: np.ndarray) -> int:
    """How many of the edges `[e, 4]` a horizontal line crosses at most."""
    top, bottom = np.minimum(edges[:, 1], edges[:, 3]), np.maximum(edges[:, 1], edges[:, 3])
    top.sort()
    bottom.sort()
    return int((np.arange(1, len(top) + 1) - bottom.searchsorted(top, "right")).max(initial=0))


def _edges(
    objects: Sequence[Sequence[Sequence[float]]], keep_direction: Sequence[bool]
) -> list[np.ndarray]:
    """`polygon_edges` of many objects: a few array operations in all, not a few per part."""
    used = [[part for part in parts if len(part) >= 6] for parts in objects]
    parts = [part for inner in used for part in inner]
    if not parts:
        return [np.zeros((0, 4), np.float32) for _ in objects]
    values: list[float] = []
    for part in parts:
        values += part
    points = np.array(values, np.float64)
    stop = np.cumsum([len(part) for part in parts])
    if points.shape != (stop[-1],) or (stop & 1).any():
        raise ValueError("a polygon isn't a flat list [x0, y0, x1, y1, ...]")
    points, stop = points.reshape(-1, 2), stop >> 1
    start = np.concatenate([[0], stop[:-1]])
    after = np.arange(1, len(points) + 1)
    after[stop - 1] = start
    following = points[after]

    twice_area = np.add.reduceat(
        points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1], start
    )
    turned = twice_area < 0
    if any(keep_direction):
        turned &= ~np.repeat(keep_direction, [len(inner) for inner in used])
    if turned.any():
        place, length = np.arange(len(points)), stop - start
        mirrored = (start + stop - 1).repeat(length) - place
        points = points[np.where(turned.repeat(length), mirrored, place)]
        following = points[after]
    edges = np.empty((len(points), 4), np.float32)
    edges[:, :2], edges[:, 2:] = points, following

    bounds = list(accumulate((sum(map(len, inner)) // 2 for inner in used), initial=0))
    long = (edges[:, 0] != edges[:, 2]) | (edges[:, 1] != edges[:, 3])
    if not long.all():
        bounds = np.concatenate([[0], np.cumsum(long)])[bounds].tolist()
        edges = edges[long]
    return [edges[low:high] for low, high in pairwise(bounds)]


def signed_area(points: np.ndarray) -> float:
    """Give the area of a polygon `[n, 2]` in pixels squared by the shoelace formula.

    It is positive where the points run clockwise on the screen, where y points down.
    """
    x, y = (points - points[:1]).T
    return float(x @ np.roll(y, -1) - np.roll(x, -1) @ y) / 2


def iter_tar(
    source: str | os.PathLike[str] | Readable,
    *,
    name: str | None = None,
) -> Iterator[tuple[str, bytes, bytes]]:
    """Yield `(key, image bytes, JSON bytes)` of a shard's samples in order.

    The tar is read as a stream, by webdataset, so a pipe or a download will do as `source`.
    As webdataset has it, what isn't a file (folders, links) is passed over.

    Args:
        source: a file's path, or what has its `read`.
        name: what errors call it; by default the path.

    Raises:
        UserError: when the tar is damaged, compressed, ends early, or isn't in pairs of members.
    """
    name = name or ("shard" if hasattr(source, "read") else str(source))
    try:
        opened = open_plain(source) if isinstance(source, (str, os.PathLike)) else source
    except OSError as error:
        raise UserError(f"{name}: can't be opened ({error.strerror})") from None
    stream = _TarStream(opened)
    try:
        yield from _pairs(stream, name)
    except UserError as error:
        error.args = stream.raised or error.args  # webdataset adds to what passes through it
        raise
    except (tarfile.TarError, EOFError, OSError) as error:
        why = error if isinstance(error, OSError) else error.args[0]
        raise UserError(f"{name}: not a complete tar file ({why})") from None
    finally:
        if isinstance(opened, io.BufferedReader) and opened is not source:
            opened.close()


LARGEST_MEMBER = 2**30
"""Bytes. A larger member of a shard is refused, as a larger image is when sharding."""
_LONGEST_NAME = 2**12
_MOST_ATTRIBUTES = 2**16


class _Headers:
    """Looks at the members' headers of a tar that passes by, before they are obeyed.

    A small archive may ask for all memory: by a sparse file, whose holes are made zeros, or by
    a name or attributes of any length.
    """

    def __init__(self) -> None:
        self.part, self.wanted, self.skip = bytearray(), tarfile.BLOCKSIZE, 0
        self.attributes = False

    def see(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            tarfile.ReadError: something that no shard has.
        """
        at = 0
        while at < len(data):
            if self.skip:
                step = min(self.skip, len(data) - at)
                self.skip -= step
                at += step
                continue
            new = data[at : at + self.wanted - len(self.part)]
            self.part += new
            at += len(new)
            if len(self.part) == self.wanted:
                block, self.part = bytes(self.part), bytearray()
                self._look(block)

    def _look(self, block: bytes) -> None:
        if self.attributes:
            self.attributes, self.wanted = False, tarfile.BLOCKSIZE
            if b" GNU.sparse." in block or b" size=" in block:
                raise tarfile.ReadError("a member is sparse, or gives its size twice")
            return
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError:  # the end, or damage that is told by whoever reads it
            self.skip = 2**62
            return
        blocks = -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        named = member.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        extended = member.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if member.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"{member.name[:60]!r} is a sparse file")
        if member.size < 0 or (named and member.size > _LONGEST_NAME):
            raise tarfile.ReadError(f"a member's name has {member.size:,} bytes")
        if extended and member.size > _MOST_ATTRIBUTES:
            raise tarfile.ReadError(f"a member's attributes have {member.size:,} bytes")
        if member.size > LARGEST_MEMBER:
            raise tarfile.ReadError(f"{member.name[:60]!r} has {member.size:,} bytes")
        if extended and blocks:
            self.attributes, self.wanted = True, blocks
        elif member.isreg() or member.type not in tarfile.SUPPORTED_TYPES or named:
            self.skip = blocks


class _TarStream:
    """What webdataset reads a tar from: counts the bytes, and refuses what could fill memory."""

    def __init__(self, source: Readable) -> None:
        self.source, self.at, self.headers = source, 0, _Headers()
        self.raised: tuple[Any, ...] = ()
        """Arguments of the error that reading raised."""

    def __str__(self) -> str:
        return f"byte {self.at:,}"

    def read(self, count: int) -> bytes:
        try:
            data = self.source.read(count)
        except UserError as error:
            self.raised = error.args
            raise
        # A small compressed archive may unpack to more than there is memory.
        if self.at == 0 and data[257:262] != b"ustar":
            raise tarfile.ReadError("it doesn't begin with a tar header")
        self.at += len(data)
        self.headers.see(data)
        return data


def _pairs(stream: _TarStream, name: str) -> Iterator[tuple[str, bytes, bytes]]:
    # Imported late: it brings torch, which most of data_tools does without.
    from webdataset.tariterators import group_by_keys, tar_file_expander

    members = tar_file_expander([{"url": name, "stream": stream}])
    samples = group_by_keys(members, keys=_key_and_extension, lcase=False)
    while True:
        try:
            sample = next(samples, None)
        except UserError:  # of the stream's own kind, such as what a server does
            raise
        except ValueError as error:
            raise UserError(f"{name}: {error.args[0]}") from None
        if sample is None:
            return
        key = sample["__key__"]
        found = [extension for extension in sample if not extension.startswith("__")]
        images = [extension for extension in found if extension != "json"]
        if len(images) != 1 or len(found) != 2:
            raise UserError(
                f"{name}: {key!r} has the members {', '.join(found)}, not one image and one json"
            )
        yield key, sample[images[0]], sample["json"]


def _key_and_extension(name: str) -> tuple[str, str]:
    key, _, extension = name.partition(".")
    return key, extension
