"""Where a data set's annotation files and images lie, whoever exported it.

COCO has `annotations/instances_<split>.json` and `<split>/`; Roboflow
`<split>/_annotations.coco.json` among the images; CVAT `annotations/instances_default.json` and
`images/`; Label Studio `result.json` and `images/`; FiftyOne `labels.json` and `data/`. What
matters is only which folder has the files that an annotation file lists. For what isn't in COCO's
format see `data_tools.foreign`.
"""

import difflib
import itertools
import json
import mmap
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from casc.errors import UserError
from data_tools.coco import below, encoding_fault
from data_tools.converted import Foreign
from data_tools.foreign import find_foreign
from data_tools.others import name_other
from data_tools.voc_files import visible

_GENERIC = {"", "annotations", "coco", "data", "default", "export", "instances", "labels", "result"}
"""Names of files and folders that say nothing of a split."""
_SAMPLE = 20
"""Listed files that a folder is tried with."""
_MOST_FOLDERS = 10_000
"""Folders that are tried where none of the usual names holds the images."""
_REMEDY = "give --annotations FILE --images FOLDER --split NAME"


class Part(NamedTuple):
    """A split of a data set."""

    split: str
    file: Path
    images: Path
    foreign: tuple[Foreign, ...] = ()
    """All parts of a data set that isn't in COCO's format."""


def choose_parts(
    root: Path, splits: Sequence[str] | None, say: Callable[[str], None] = print
) -> list[Part]:
    """Find the splits of a data set; those that are asked for, else all.

    Args:
        root: the data set's folder.
        splits: which.
        say: is given a line for each split whose images aren't found.

    Raises:
        UserError: when there is none, or one can't be told from another.
    """
    files = sorted((root / "annotations").glob("instances_*.json"))
    coco = [Part(file.name[10:-5], file, root / file.name[10:-5]) for file in files]
    coco = [part for part in coco if part.split]
    # Others than these are subsets of their images more often than parts of the data set.
    listed = coco
    if not any(part.images.is_dir() for part in coco):
        listed = [_part(file, root) for file in _candidates(root)]
    found = [part for part in listed if part.images.is_dir()]
    without = [part for part in listed if not part.images.is_dir()]
    faults = {
        part.split: encoding_fault(part.file)
        or f"{part.file}: the folder of its images wasn't found; {_REMEDY}"
        for part in without
    }
    if not found:
        foreign = find_foreign(root)
        whole = tuple(part for part in foreign if not part.fault)
        faults |= {part.split: part.fault for part in foreign if part.fault}
        found = [Part(part.split, part.source, part.images, whole) for part in whole]
        if foreign and not found:
            raise UserError(foreign[0].fault)
    by_name: dict[str, Part] = {}
    for part in found:
        first = by_name.setdefault(part.split, part)
        if first is not part:
            raise UserError(f"{root}: {first.file} and {part.file} are one split; {_REMEDY}")
    if splits is not None:
        usual = {
            split: Part(split, root / "annotations" / f"instances_{split}.json", root / split)
            for split in splits
        }
        for split, part in usual.items():
            if split in faults and split not in by_name and not part.file.is_file():
                raise UserError(faults[split])
        return [by_name.get(split, part) for split, part in usual.items()]
    if not found:
        lacking = ", ".join(f"{part.images}/" for part in coco)
        unread = next(filter(None, (encoding_fault(part.file) for part in without)), "")
        other = unread if listed else name_other(root)
        if other:
            raise UserError(other)
        raise UserError(
            f"{root}: no COCO annotation file with its images, nor LabelMe, YOLO or"
            " Pascal VOC;"
            f" is {root} the root of a data set?"
            f" For any other layout {_REMEDY}" + (f"; there is no {lacking}" if lacking else "")
        )
    for split, fault in faults.items():
        if split not in by_name:
            say(f"{split} is left out: {fault}")
    return found


def named_part(file: Path, images: Path | None, split: str | None) -> Part:
    """Give the split of an annotation file that was named outright."""
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    found = _part(file, root) if file.is_file() else Part("train", file, root)
    return Part(split or found.split, file, images or found.images)


def find_files(folder: Path, names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Find files that are listed under another spelling.

    Backslashes, case, Unicode's forms, %20, spaces at the ends, a leading ./ and leading folders
    may differ; what is listed without a folder may be in any, and Label Studio's mark in front of a
    name (`1a2b3c4d-`, `1a2b3c__`) may be there or not. A file is taken if it is the only one that
    fits, and is listed by no other name.

    Returns:
        The file's own name by the listed one, where it has another; and for others that aren't
        there what they may be called.
    """
    lost = [name for name in dict.fromkeys(names) if not _is_file(os.path.join(folder, name))]  # noqa: PTH118 - of each image
    if not lost:
        return {}, {}
    files = [
        Path(above, name).relative_to(folder).as_posix()
        for above, _, below in os.walk(folder)
        for name in below
    ]
    listed = {os.path.normpath(name) for name in names}
    by_key: dict[str, set[str]] = {}
    by_name: dict[str, set[str]] = {}
    by_bare: dict[str, set[str]] = {}
    for file in files:
        if file not in listed:
            for key in {_key(file), _key(unquote(file))}:
                by_key.setdefault(key, set()).add(file)
                last = key.rsplit("/", 1)[-1]
                by_name.setdefault(last, set()).add(file)
                if _bare(last) != last:
                    by_bare.setdefault(_bare(last), set()).add(file)
    found: dict[str, str] = {}
    hints: dict[str, str] = {}
    for name in lost:
        fitting = next(
            (by_key[k] for k in _keys(name) if k in by_key), by_name.get(_key(name), set())
        ) or _marked(name, by_name, by_bare)
        if os.path.islink(os.path.join(folder, name)):  # noqa: PTH114, PTH118 - of each image
            hints[name] = "; it is a link to a file that isn't there"
        elif len(fitting) == 1:
            found[name] = next(iter(fitting))
        elif fitting:
            hints[name] = f"; did you mean {' or '.join(sorted(fitting)[:3])}?"
        elif len(hints) < _SAMPLE:
            near = difflib.get_close_matches(name, files[:5000], n=1, cutoff=0.75)
            hints[name] = f"; did you mean {near[0]}?" if near else ""
    taken = Counter(found.values())
    for name, file in list(found.items()):
        if taken[file] > 1:
            del found[name]
            hints[name] = f"; did you mean {file}, which other names fit too?"
    return found, hints


def _part(file: Path, root: Path) -> Part:
    words = re.sub(r"\s*\(\d+\)$", "", file.stem)  # of a browser that saved it again
    words = re.sub(r"(^_?(annotations?|instances|coco)[._-]+)|([._-]+(annotations?|coco))+$", "",
                   words.lstrip("_"))  # fmt: skip
    above = file.relative_to(root).parent.parts[::-1] if file.is_relative_to(root) else ()
    split = next(
        (word for word in (words, *above[:1], *filter(_use, above[1:]))
         if word.lower() not in _GENERIC and word.lower() != "images"),
        "train",
    )  # fmt: skip
    split = re.sub(r"[^\w.-]", "_", split, flags=re.ASCII).lstrip(".-")
    split = split if re.search(r"[^\W_]", split) else "train"
    folders = [
        above / name
        for above in dict.fromkeys((file.parent, root))
        for name in ("", split, "images", "data", f"images/{split}", "images/default",
                     f"{split}/images", f"{split}2017")
    ]  # fmt: skip
    names = list(itertools.islice(_listed(file), _SAMPLE))
    folders = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]

    def own(folder: Path) -> bool:
        return all(_use(part) in ("", _use(split)) for part in folder.parts)

    def fitting(folder: Path) -> int:
        exact = sum(_is_file(folder / name) for name in names)
        if exact:
            return _SAMPLE * exact
        return sum(own(Path(file).parent) for file in find_files(folder, names)[0].values())

    # The first of the best: names that lead below two of the folders are found from both.
    best = max(folders, key=fitting)
    if fitting(best) < _SAMPLE:  # none of the usual names has the files as they are listed
        walked = (Path(above) for above, _, _ in os.walk(root))
        others = [
            folder
            for folder in itertools.islice(walked, _MOST_FOLDERS)
            if own(folder.relative_to(root))
        ]
        exact = {f: sum(_is_file(f / name) for name in names) for f in others}
        named = max(others, key=lambda folder: exact[folder])
        best = named if exact[named] else best
    return Part(split, file, best if fitting(best) else root / split)


def _use(name: str) -> str:
    """What a folder or split is for; images numbered from 1 are called alike in all of them."""
    return next((use for use in ("train", "val", "test") if name.lower().startswith(use)), "")


def _candidates(root: Path) -> list[Path]:
    folders = ("", "annotations/", "*/", "*/*/")
    files = dict.fromkeys(
        file for folder in folders for file in sorted(root.glob(f"{folder}*.[jJ][sS][oO][nN]"))
    )
    found = [file for file in files if visible(file, root) and _is_coco(file)]
    # Panoptic segments, which aren't read, lie beside the instances of the same images.
    return [file for file in found if not _has(file, "segments_info")] or found


def _is_coco(file: Path) -> bool:
    return (_has(file, "file_name") or _has(file, "coco_url")) and all(
        _has(file, key) for key in ("images", "annotations", "categories")
    )


def _has(file: Path, key: str) -> bool:
    """Whether a key is in a file; in UTF-16 and UTF-32, which are refused by name, too."""
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as m:
            zeros = m[:8].count(0)
            gap = "\0" * (0 if not zeros else 1 if zeros < 5 else 3)
            return m.find(gap.join(f'"{key}"').encode()) >= 0
    except (OSError, ValueError):  # a folder, or an empty file
        return False


def _listed(file: Path) -> Iterator[str]:
    """Names of images, without parsing the whole file."""
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as m:
            key = rb"file_name" if m.find(b'"file_name"') >= 0 else rb"coco_url"
            for match in re.finditer(rb'"%s"\s*:\s*("(?:[^"\\]|\\.)*")' % key, m):
                name = json.loads(match[1])
                if key == rb"coco_url":
                    name = "/".join(name.split("/")[-2:])
                if below(name) and "\0" not in name:
                    yield below(name)
    except (OSError, ValueError):
        return


def _is_file(path: str | Path) -> bool:
    try:
        return os.path.isfile(path)  # noqa: PTH113
    except (OSError, ValueError):
        return False


def _key(name: str) -> str:
    path = os.path.normpath(name.strip("\ufeff \t\r\n").replace("\\", "/")).replace(os.sep, "/")
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _bare(name: str) -> str:
    """A name without the mark that Label Studio puts before it on upload or download."""
    return re.sub(r"^(?:[0-9a-f]{8}-|[0-9a-f]{6,8}__)(?=.)", "", name)


def _marked(
    name: str, by_name: Mapping[str, set[str]], by_bare: Mapping[str, set[str]]
) -> set[str]:
    """Files that have a mark where the listed name has none, or the other way round."""
    last = list(_keys(name))[-1]
    return by_bare.get(last) or by_name.get(_bare(last), set())


def _keys(name: str) -> Iterator[str]:
    """What a file may be known by, the likeliest first: leading folders go last."""
    # Of an address there may be what a server is asked for, which is no part of the file's name.
    bare = re.sub(r"[?#].*", "", name, flags=re.DOTALL)
    whole = list(dict.fromkeys(_key(n) for n in (name, unquote(name), bare, unquote(bare))))
    for depth in range(max(key.count("/") for key in whole) + 1):
        for key in whole:
            if key.count("/") >= depth:
                yield key.split("/", depth)[-1]
