"""The shard index: what is in a folder of shards, and the shapes that training compiles for.

`data_tools shard` writes it, everything that trains or evaluates reads it. It holds facts
about the data only; where the folder lies is known to whoever opened it.
"""

import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from casc.data.files import sync_folder
from casc.data.loader_config import DEFAULT_LOADING, RemoteConfig
from casc.data.remote import is_local, join, location, read_remote
from casc.errors import UserError
from casc.json_files import MOST_BYTES, parse_json, read_plain
from casc.printing import redacted

FORMAT = "casc-shards"
VERSION = 2
INDEX_NAME = "index.json"
ASPECTS = (1 / 1.52, 1 / 1.36, 1.0, 1.36, 1.52)
"""Where the buckets meet that sharding makes by default: width over height, ascending."""
LARGEST = 2**53
"""Of numbers: what JSON's readers all have exactly."""
MOST_EDGES = 2**28
"""Of an image's capacity, instances x edges: four gigabytes."""
MOST_BOXES = 2**22
"""Of an image's capacity for boxes alone, or for regions to ignore."""
MOST_CHANNELS = 64
_MOST = {"boxes": MOST_BOXES, "regions": MOST_BOXES, "channels": MOST_CHANNELS}
LONGEST_SIDE = 1_000_000
MOST_PIXELS = 2**29
"""Of a bucket's canvas, which holds the widest of its images and the tallest."""
LEAST_BYTES = 2048
"""Of a sample in a tar: two members, each a header and at least one block."""
_HALVES = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_REMEDY = "make the shards again with `data_tools shard`"


@dataclass(frozen=True)
class Category:
    """A class. Its position in `Index.categories` is the label that the model learns."""

    id: int
    """COCO's category id."""
    name: str


@dataclass(frozen=True)
class Bucket:
    """Images of similar aspect, which share one canvas and so one compiled step."""

    name: str
    min_aspect: float
    """Width over height is more than this; 0 in the bucket of the tallest images."""
    max_aspect: float | None
    """Width over height is at most this; None (infinity) in that of the widest."""
    height: int
    """Input canvas in pixels: the largest stored height among the bucket's images."""
    width: int
    """Input canvas in pixels: the largest stored width."""
    instances: int
    """Most trainable objects in one image, at least 1: the ground-truth capacity G."""
    edges: int
    """Room for the polygon edges of one image's trainable objects, at least 1: the edge capacity
    E, see `casc.data.sample.edge_room`."""
    samples: int
    """Images of the bucket, evaluation-only ones included."""
    boxes: int | None = None
    """Most objects in one image where no masks are trained, at least 1: those without a usable
    mask are trained on too. None: the shards were made before casc looked for them."""
    regions: int | None = None
    """Most regions to ignore in one image, at least 1: crowds, what is marked as ignore, and what
    has no usable mask. None as above."""
    channels: int = 3
    """Of every image: 3 is RGB, 1 grey, others are planes."""


@dataclass(frozen=True)
class Shard:
    """One tar file, which holds images of one bucket."""

    name: str
    """Path inside the folder of the index, with forward slashes."""
    bucket: int
    """Position in `Split.buckets`."""
    train: bool
    """False where the images are for evaluation only."""
    samples: int
    bytes: int
    sha256: str
    maskless: bool = False
    """Its images have objects, but masks of none: they are trained on where no masks are."""


@dataclass(frozen=True)
class Split:
    """The images that one annotation file lists."""

    samples: int
    train_samples: int
    buckets: tuple[Bucket, ...]
    shards: tuple[Shard, ...]
    report: dict[str, Any] = field(default_factory=dict)
    """What sharding dropped or repaired, as counts and ids."""
    source: str = ""
    """Digest of the annotation file, the images and the settings that the shards come from."""

    @property
    def channels(self) -> int:
        """Of its images: its buckets' are the same."""
        return self.buckets[0].channels if self.buckets else 3


def training_split(split: Split, *, masks: bool = True, regions: bool = False) -> Split:
    """What of a split is trained on: as it is with masks; else objects and images without, too.

    Args:
        split: as the index has it.
        masks: whether masks are trained.
        regions: whether there are to be regions to ignore.

    Raises:
        UserError: what is asked for was found when sharding, but the shards don't say where, since
            they were made before casc wrote that down.
    """
    found = split.report.get("findings", {})
    for flag, wanted, name, kinds in (
        ("--model.masks none", not masks, "boxes", {"no_mask"}),
        ("--model.ignore crowds", regions, "regions", {"no_mask", "crowd", "ignore"}),
    ):
        known = all(getattr(bucket, name) is not None for bucket in split.buckets)
        if wanted and not known and kinds & set(found):
            raise UserError(
                f"{flag}: the shards are of an earlier casc, which didn't write down what of their"
                f" crowds and objects without a mask that needs; {_REMEDY}"
            )
    if masks:
        return split
    buckets = [replace(b, instances=b.boxes or b.instances, edges=1) for b in split.buckets]
    shards = tuple(replace(shard, train=shard.train or shard.maskless) for shard in split.shards)
    return replace(
        split,
        train_samples=sum(shard.samples for shard in shards if shard.train),
        buckets=tuple(buckets),
        shards=shards,
    )


@dataclass(frozen=True)
class Index:
    """All of `index.json`."""

    categories: tuple[Category, ...]
    splits: dict[str, Split]


def read_index(path: str | os.PathLike[str], loading: RemoteConfig = DEFAULT_LOADING) -> Index:
    """Read `index.json`, given its path or the folder or URL that it lies in.

    Args:
        path: where.
        loading: retries and time-outs for URLs, and whether commands may run.

    Raises:
        UserError: when there is no index, or it isn't one that this version understands.
    """
    place = location(path)
    if not is_local(place):
        if not place.endswith(f"/{INDEX_NAME}"):
            place = join(place, INDEX_NAME)
        return parse_index(read_remote(place, loading).decode("utf-8", "replace"), redacted(place))
    file = Path(place)
    if file.is_dir():
        file = file / INDEX_NAME
    try:
        data = read_plain(file, MOST_BYTES)
        text = data.decode("utf-8") if len(data) <= MOST_BYTES else data
    except FileNotFoundError:
        raise UserError(f"{file}: not found; make shards with `data_tools shard COCO`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: can't be read ({error})") from None
    return parse_index(text, str(file))


def parse_index(text: str | bytes, name: str = INDEX_NAME) -> Index:
    """Parse the text of an index; `name` is what errors call the file.

    Raises:
        UserError: naming the file and the field.
    """
    try:
        data = parse_json(text, name, object)
    except UserError as error:
        raise UserError(f"{error}; {_REMEDY}") from None
    top = _Fields(name, "", data)
    found = top.get("format", str)
    if found != FORMAT:
        raise UserError(f"{name}: format is {found!r:.60}, expected {FORMAT!r}; {_REMEDY}")
    version = top.get("version", int)
    if version != VERSION:
        remedy = "update casc" if version > VERSION else _REMEDY
        raise UserError(f"{name}: version is {version}, this casc reads {VERSION}; {remedy}")
    categories = tuple(
        Category(id=entry.get("id", int), name=entry.get("name", str))
        for entry in top.list("categories")
    )
    if len({category.id for category in categories}) != len(categories):
        raise UserError(f"{name}: categories: an id occurs twice; {_REMEDY}")
    splits = {key: _split(entry) for key, entry in top.dict("splits").items()}
    return Index(categories, splits)


def format_index(index: Index) -> str:
    """Give the text of `index.json`; equal indexes give equal text."""
    data = {"format": FORMAT, "version": VERSION, **asdict(index)}
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"


def write_index(path: str | os.PathLike[str], index: Index) -> None:
    """Write `index.json`, given its path or folder, so that a reader never sees half of it."""
    file = Path(path)
    if file.is_dir():
        file = file / INDEX_NAME
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(format_index(index))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    sync_folder(file.parent)


def canvas(bucket: Bucket, short: int, long: int, divisor: int = 32) -> tuple[int, int]:
    """Give the canvas `(H, W)` that holds every image of a bucket once it is resized.

    An image is scaled by `min(long / max(w, h), short / min(w, h))`, as the reference does,
    so the canvas follows from the bucket's range of aspects, not from the images in it:
    all data sets sharded alike compile to the same shapes.

    Args:
        bucket: whose aspect range counts.
        short: pixels that the shorter side is scaled to, unless
        long: pixels is exceeded by the longer side.
        divisor: both sides are rounded up to a multiple of it.

    Raises:
        UserError: when `short`, `long` and `divisor` aren't positive or `short > long`.
    """
    if short < 1 or divisor < 1 or long < short:
        raise UserError(
            f"canvas: need 1 <= short <= long and divisor >= 1, "
            f"got short {short}, long {long}, divisor {divisor}"
        )
    widest = math.inf if bucket.max_aspect is None else bucket.max_aspect
    tallest = math.inf if bucket.min_aspect == 0 else 1 / bucket.min_aspect
    return (
        _round_up(_longest(tallest, short, long), divisor),
        _round_up(_longest(widest, short, long), divisor),
    )


def _longest(aspect: float, short: int, long: int) -> float:
    """Longest that a side gets in images where it is up to `aspect` times the other side."""
    return min(long, short * aspect) if aspect >= 1 else min(short, long * aspect)


def _round_up(length: float, divisor: int) -> int:
    # Images are rounded to whole pixels before they are padded. The small term keeps an
    # image whose own arithmetic rounds the other way at exactly half a pixel inside.
    pixels = int(length + 0.5 + 1e-6)
    return max(divisor, math.ceil(pixels / divisor) * divisor)


class _Fields:
    """A JSON object that knows its place in the file, for errors that name the field."""

    def __init__(self, file: str, where: str, data: object) -> None:
        self.file, self.where = file, where
        if not isinstance(data, dict):
            raise self.error("", "an object", data)
        self.data = cast("dict[str, Any]", data)

    def error(self, key: str, expected: str, found: object) -> UserError:
        place = ".".join(part for part in (self.where, key) if part) or "top level"
        shown = repr(found)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return UserError(f"{self.file}: {place}: expected {expected}, got {shown}; {_REMEDY}")

    def get(self, key: str, kind: type, *, least: float | None = None) -> Any:
        if key not in self.data:
            raise self.error(key, f"a field of type {kind.__name__}", None)
        value = self.data[key]
        if kind is float and type(value) is int and abs(value) <= LARGEST:
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(key, kind.__name__, value)
        if least is not None and not least <= value < math.inf:
            raise self.error(key, f"at least {least}", value)
        if isinstance(value, (int, float)) and abs(value) > LARGEST:
            raise self.error(key, f"at most {LARGEST:,}", value)
        if isinstance(value, str) and not value.isascii() and _HALVES.search(value):
            raise self.error(key, "a text of whole characters", value)
        return value

    def list(self, key: str) -> "list[_Fields]":
        entries: list[Any] = self.get(key, list)
        place = ".".join(part for part in (self.where, key) if part)
        return [_Fields(self.file, f"{place}[{i}]", entry) for i, entry in enumerate(entries)]

    def dict(self, key: str) -> "dict[str, _Fields]":
        entries: dict[str, Any] = self.get(key, dict)
        place = ".".join(part for part in (self.where, key) if part)
        return {name: _Fields(self.file, f"{place}.{name}", e) for name, e in entries.items()}


def _split(fields: _Fields) -> Split:
    buckets = tuple(_bucket(entry) for entry in fields.list("buckets"))
    shards = tuple(_shard(entry, len(buckets)) for entry in fields.list("shards"))
    if len({shard.name for shard in shards}) != len(shards):
        raise UserError(f"{fields.file}: {fields.where}.shards: a name occurs twice; {_REMEDY}")
    if len({bucket.channels for bucket in buckets}) > 1:
        raise UserError(f"{fields.file}: {fields.where}.buckets: channels differ; {_REMEDY}")
    split = Split(
        samples=fields.get("samples", int, least=0),
        train_samples=fields.get("train_samples", int, least=0),
        buckets=buckets,
        shards=shards,
        report=fields.get("report", dict),
        source=fields.get("source", str) if "source" in fields.data else "",
    )
    listed = sum(shard.samples for shard in shards)
    if listed != split.samples:
        raise fields.error("samples", f"{listed}, the sum over the shards", split.samples)
    trained = sum(shard.samples for shard in shards if shard.train)
    if trained != split.train_samples:
        expected = f"{trained}, the sum over the shards to train on"
        raise fields.error("train_samples", expected, split.train_samples)
    return split


def _bucket(fields: _Fields) -> Bucket:
    last = fields.data.get("max_aspect", 0) is None
    low = fields.get("min_aspect", float, least=0)
    high = None if last else fields.get("max_aspect", float, least=0)
    if high is not None and high <= low:
        raise fields.error("max_aspect", f"more than min_aspect {low}", high)
    capacity = fields.get("instances", int, least=1) * fields.get("edges", int, least=1)
    if capacity > MOST_EDGES:
        found = f"{fields.data['instances']} x {fields.data['edges']}"
        raise fields.error("instances x edges", f"at most {MOST_EDGES:,}", found)
    side = max(fields.get("height", int, least=1), fields.get("width", int, least=1))
    if side > LONGEST_SIDE:
        raise fields.error("height or width", f"at most {LONGEST_SIDE:,} pixels", side)
    area = fields.data["height"] * fields.data["width"]
    if area > MOST_PIXELS:
        raise fields.error("height x width", f"at most {MOST_PIXELS:,} pixels", area)
    more = {key: fields.get(key, int, least=1) for key in _MOST if fields.data.get(key) is not None}
    for key, value in more.items():
        if value > _MOST[key]:
            raise fields.error(key, f"at most {_MOST[key]:,}", value)
    return Bucket(
        name=fields.get("name", str),
        min_aspect=low,
        max_aspect=high,
        height=fields.get("height", int, least=1),
        width=fields.get("width", int, least=1),
        instances=fields.get("instances", int, least=1),
        edges=fields.get("edges", int, least=1),
        samples=fields.get("samples", int, least=0),
        **more,
    )


def _shard(fields: _Fields, buckets: int) -> Shard:
    name = fields.get("name", str)
    # An index may come from elsewhere; it must not make anybody read outside its folder.
    printable = name.isprintable() or not _CONTROL.search(name)
    if not printable or not name or "\\" in name or name.startswith("/") or ".." in name.split("/"):
        raise fields.error("name", "a path inside the folder", name)
    bucket = fields.get("bucket", int, least=0)
    if bucket >= buckets:
        raise fields.error("bucket", f"less than {buckets}, the number of buckets", bucket)
    samples, size = fields.get("samples", int, least=1), fields.get("bytes", int, least=1)
    if samples * LEAST_BYTES > size:
        raise fields.error("samples", f"at most {size // LEAST_BYTES} in {size} bytes", samples)
    sha256 = fields.get("sha256", str)
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise fields.error("sha256", "64 hexadecimal digits", sha256)
    return Shard(
        name=name,
        bucket=bucket,
        train=fields.get("train", bool),
        samples=samples,
        bytes=size,
        sha256=sha256,
        maskless=fields.get("maskless", bool) if "maskless" in fields.data else False,
    )
