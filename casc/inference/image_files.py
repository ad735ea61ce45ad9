"""Images given as files: which they are, and what their results are called."""

import glob
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from casc.data.index import INDEX_NAME, read_index
from casc.data.loader_config import RemoteConfig
from casc.data.reader import read_shard
from casc.data.record import as_id
from casc.data.remote import check_address, is_local, location
from casc.errors import UserError
from casc.json_files import MOST_COCO_BYTES, read_json

Source = Path | str
"""A file, or a URL."""

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
"""What a folder is searched for; a file named outright may be called anything."""


def suffixes_of(channels: int) -> frozenset[str]:
    """What a folder is searched for where images have so many channels: arrays too, if not RGB."""
    return SUFFIXES if channels == 3 else SUFFIXES | {".npy"}


def find_images(
    paths: Iterable[str | os.PathLike[str]], suffixes: Collection[str] = SUFFIXES
) -> tuple[list[Source], list[tuple[str, str]]]:
    """List the images that paths, folders, patterns and URLs mean, each once.

    A folder means the images in it and in all folders below it; hidden ones are left out.

    Args:
        paths: what is given.
        suffixes: of the files that a folder is searched for, in small letters.

    Returns:
        The files and URLs, and the paths that led to none with the reason.
    """
    files: dict[Source, None] = {}
    failed: list[tuple[str, str]] = []
    for given in paths:
        text, path = os.fspath(given), Path(given)
        matches: Sequence[Source]
        if not text:
            matches, reason = [], "an empty name"
        elif not is_local(text):
            matches, reason = _address(text)
        elif path.is_dir():
            matches, reason = _images_below(path, suffixes), "the folder has no images"
        elif path.exists() or not glob.has_magic(text):
            # A path that leads nowhere fails when it is read, like any other bad image.
            matches, reason = [path], ""
        else:
            found = glob.glob(text, recursive=True)  # noqa: PTH207 - a pattern may be absolute
            matches = sorted(p for p in map(Path, found) if p.is_file())
            reason = "no file matches"
        files.update(dict.fromkeys(matches))
        if not matches:
            failed.append((text or "''", reason))
    return list(files), failed


def _address(url: str) -> tuple[list[Source], str]:
    """A URL that can be asked for, or none and why not."""
    try:
        check_address(url)
    except UserError as error:
        return [], str(error).removeprefix(f"{url}: ")
    return [url], ""


def _images_below(folder: Path, suffixes: Collection[str]) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(place) / name for name in names if not name.startswith("."))
        found += [p for p in paths if p.suffix.lower() in suffixes and p.is_file()]
    return sorted(found)


def base_name(file: Source) -> str:
    """The last part of a path or URL, without a URL's query."""
    return file.name if isinstance(file, Path) else PurePosixPath(urlsplit(file).path).name


def names_of(files: Sequence[Source]) -> list[str]:
    """What `file_name` says: the name, or the path or URL where names aren't enough."""
    distinct = len({base_name(file) for file in files}) == len(files)
    whole = [file.as_posix() if isinstance(file, Path) else file for file in files]
    return [base_name(file) for file in files] if distinct else whole


def image_ids(files: Sequence[Source], listed: Mapping[str, int] | None = None) -> list[int]:
    """Give each file's id: 1, 2, ..., or what `listed` says of its name or the end of its path.

    Raises:
        UserError: a file isn't listed.
    """
    if listed is None:
        return list(range(1, len(files) + 1))
    ids = []
    for file in files:
        parts = (file.as_posix() if isinstance(file, Path) else urlsplit(file).path).split("/")
        # The longest end of the path that is listed: COCO's names may have folders in them.
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        known = next((listed[end] for end in ends if end in listed), None)
        if known is None:
            raise UserError(f"--ids: lists no image of the name {parts[-1]}")
        ids.append(known)
    return ids


def listed_ids(place: str | os.PathLike[str]) -> dict[str, int]:
    """Give the ids by file name of a COCO annotation file, or of all splits of shards.

    Raises:
        UserError: it can't be read, or has a name twice.
    """
    if Path(place).is_file() and Path(place).name != INDEX_NAME:
        pairs = _pairs(place)
    else:
        root, index = location(place), read_index(place)
        shards = (shard for split in index.splits.values() for shard in split.shards)
        records = (
            json.loads(record)
            for shard in shards
            for _, _, record in read_shard(root, shard, RemoteConfig())
        )
        pairs = [(record["file_name"], record["image_id"]) for record in records]
    ids: dict[str, int] = {}
    for name, identity in pairs:
        if ids.setdefault(name, identity) != identity:
            raise UserError(f"--ids {place}: has {name} twice, as {ids[name]} and {identity}")
    return ids


def _pairs(place: str | os.PathLike[str]) -> list[tuple[str, int]]:
    """Names and ids of a COCO annotation file's images, spelt in the ways that sharding takes."""
    images = read_json(place, most_bytes=MOST_COCO_BYTES).get("images")
    if not isinstance(images, list):
        raise UserError(f"{place}: images: expected a list; is this a COCO annotation file?")
    pairs = []
    for i, entry in enumerate(images):
        about = entry if isinstance(entry, dict) else {}
        number, name, url = (about.get(key) for key in ("id", "file_name", "coco_url"))
        known = as_id(number)
        number = number if known is None else known
        if name is None and isinstance(url, str):  # LVIS
            name = "/".join(url.split("/")[-2:])
        for key, value, kind in (("id", number, int), ("file_name", name, str)):
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UserError(
                    f"{place}: images[{i}].{key}: expected {kind.__name__}, got {value!r:.60}"
                )
        pairs.append((str(name).replace("\\", "/"), number))
    return pairs


def targets_of(files: Sequence[Source], folder: Path) -> list[Path]:
    """Where the pictures go; names that several images share are numbered.

    Videos have the same names with another suffix.
    """
    # `Path.resolve` raises where links go round in a circle.
    inputs = {os.path.realpath(file) for file in files if isinstance(file, Path)}
    targets: dict[Path, None] = {}
    for file in files:
        stem = PurePosixPath(base_name(file)).stem or "image"
        target, number = folder / f"{stem}.jpg", 1
        while target in targets:
            number += 1
            target = folder / f"{stem}-{number}.jpg"
        if not inputs.isdisjoint(map(os.path.realpath, (target, target.with_suffix(".mp4")))):
            raise UserError(
                f"{target}: would overwrite an input image; choose another output folder"
            )
        targets[target] = None
    return list(targets)


def reason_of(error: Exception) -> str:
    """What to say of it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
