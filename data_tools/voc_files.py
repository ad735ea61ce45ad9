"""Where a data set of Pascal VOC's has its files, in the devkit's folders or a tool's.

The devkit has `Annotations/`, `JPEGImages/`, `ImageSets/Main/train.txt` and for the images that
have masks `SegmentationObject/` with `ImageSets/Segmentation/train.txt`. Labelling tools write the
XML files alone, beside the images or in a folder of their own, or the masks without XML files.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from casc.errors import UserError
from data_tools.texts import decode, searchable
from data_tools.voc_masks import Classes, find_classes, voc_classes

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SETS = {
    "train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
}  # fmt: skip
"""Splits by the names of lists and folders."""
_MASKS = {"SegmentationObject", "SegmentationClass", "SegmentationObjectVisualization"}
_DEEPEST = 3
"""Folders down that a data set is looked for."""
_SAMPLE = 5
"""Names of files that folders of images are tried with."""
_MOST_BYTES = 2**26
_XML, _PNG = "*.[xX][mM][lL]", "*.[pP][nN][gG]"


class VocSplit(NamedTuple):
    """A split's files."""

    split: str
    annotations: Path
    images: Path
    masks: Path | None
    """SegmentationObject/, where there is one."""
    names: tuple[str, ...]
    """Of the XML files, or else the masks: paths below their folder without .xml or .png."""
    classes: Classes
    """What pictures of classes mean."""
    listed: bool
    """Whether a file lists these classes, so that all of them count."""
    first: int
    """What pixels are counted from, as far as it can be told: Datumaro, of CVAT, counts from 0."""
    fault: str = ""
    """Why it is left out, where others of the data set are taken."""


def find_voc(root: Path) -> list[VocSplit]:
    """Find the splits of a data set; none if it isn't one of VOC's."""
    places = [root]
    for depth in range(_DEEPEST + 1):
        bases = {
            base: folder
            for base in places
            for folder in [_xml_folder(base) or _mask_folder(base)]
            if folder is not None
        }
        places = sorted(below for place in places for below in _folders(place))
        if not bases:
            continue
        named = [base for base in bases if base.name.lower() in _SETS]
        splits = {_split(base.name) for base in named}
        if depth and len(splits) == len(named) and is_split(splits, len(named) == len(bases)):
            parts = [
                (base, part._replace(split=_split(base.name) if base in named else base.name))
                for base, folder in bases.items()
                for part in _listed(base, folder)[:1]
            ]
            return [
                part if base in named else part._replace(fault=in_no_split([base]))
                for base, part in parts
            ]
        if len(bases) > 1 and bases == {base: base for base in bases} and not named:
            return _listed(root, root)  # XML files beside their images in a folder of each class
        if len(bases) > 1:
            names = ", ".join(base.relative_to(root).as_posix() for base in bases)
            raise UserError(
                f"{root}: holds several data sets of VOC's ({names}); give one of these folders, or"
                " copy their files into one folder of this form"
            )
        return _listed(*next(iter(bases.items())))
    return []


def _folders(place: Path) -> list[Path]:
    with os.scandir(place) as found:
        return [Path(each) for each in found if each.is_dir() and not each.name.startswith(".")]


def _xml_folder(base: Path) -> Path | None:
    for folder in _called(base, ("annotations", "annots", "labels", "xmls", "xml")):
        if _xml(folder, deep=True):
            return folder
    return base if _xml(base) else None


def _called(base: Path, names: Sequence[str]) -> list[Path]:
    """Folders of these names in any case, in their order."""
    found = [folder for folder in sorted(_folders(base)) if folder.name.lower() in names]
    return sorted(found, key=lambda folder: names.index(folder.name.lower()))


def _mask_folder(base: Path) -> Path | None:
    """The folder of masks, where there are no XML files beside."""
    folder = base / "SegmentationObject"
    return folder if _below(folder, _PNG) else None


def is_split(splits: Collection[str], whole: bool) -> bool:
    """Whether folders of these splits are parts of a data set, though more lies beside them.

    A single one may be that of a class: VOC has trains.
    """
    return len(splits) > 1 or (len(splits) == 1 and whole)


def in_no_split(files: Sequence[Path]) -> str:
    """Why files are left out beside those of splits."""
    more = f" and {len(files) - 1} more" if files[1:] else ""
    return (
        f"{files[0]}{more}: in no folder that is called by a split (train, val, test); move the"
        " files that are to be taken into one"
    )


def _split(name: str) -> str:
    return _SETS.get(name.lower(), name)


def _listed(base: Path, folder: Path) -> list[VocSplit]:
    masks = _mask_folder(base)
    present = _below(folder, _PNG) if folder == masks else _xml(folder, deep=True)
    known = {name: name for name in present}
    for name in present:  # what is listed without its folder
        known.setdefault(name.rsplit("/", 1)[-1], name)
    images = _image_folder(base, folder, present)
    classes = find_classes(base) if masks else None
    listed = classes is not None or folder == masks
    first = 0 if (base / "labelmap.txt").is_file() else 1
    about = classes or voc_classes(), listed, first
    for lists in ("Segmentation", "Main") if masks else ("Main", "Layout", ""):
        found: dict[str, tuple[str, ...]] = {}
        for file in sorted((base / "ImageSets" / lists).glob("*.txt")):
            name = file.stem.lower()
            # CVAT's default: of images without XML files it tells those without objects.
            if name in {*_SETS, "trainval"} or (name == "default" and folder == masks):
                lines = decode(file.read_bytes(), errors="replace").splitlines()
                names = tuple(_named(line, known) for line in lines if line.split())
                found[_split(name)] = names
        for whole in ("trainval", "default"):
            both = found.pop(whole, None)
            if both and not {"train", "val"} & set(found):
                found["train"] = both
        found = {split: names for split, names in found.items() if set(names) & set(present)}
        if found:
            order = sorted(found, key=[*_SETS.values()].index)
            return [VocSplit(s, folder, images, masks, found[s], *about) for s in order]
    groups: dict[str, list[str]] = {}
    for name in present:
        groups.setdefault(_SETS.get(name.split("/")[0].lower(), ""), []).append(name)
    others = groups.pop("", [])
    if is_split(groups, not others):
        parts = [VocSplit(s, folder, images, masks, tuple(n), *about) for s, n in groups.items()]
        if others:
            fault = in_no_split([folder / f"{name}.xml" for name in others])
            parts.append(VocSplit(others[0], folder, images, masks, tuple(others), *about, fault))
        return parts
    return [VocSplit("train", folder, images, masks, present, *about)]


def _image_folder(base: Path, folder: Path, names: Sequence[str]) -> Path:
    usual = _called(base, ("jpegimages", "images", "imgs", "image"))
    folders = [f for f in (*usual, folder, base) if f.name not in _MASKS]
    for find in (images_of, _deeper):
        for place in folders:
            if any(find(place, name) for name in names[:_SAMPLE]):
                return place
    return base if folder.name in _MASKS else folder


def _deeper(folder: Path, name: str) -> list[Path]:
    """An image by its own name in any folder below, where it isn't where its XML file is."""
    stem = name.rsplit("/", 1)[-1]
    if any(c in stem for c in "*?["):
        return []
    found = (f for f in folder.rglob(f"{stem}.*") if not _MASKS & set(f.parts))
    return [f for f in found if f.suffix.lower() in IMAGES]


def _named(line: str, known: Mapping[str, str]) -> str:
    """Which XML file a line of a list names, without .xml: by its name or its image's path.

    A mark may follow, as in lists of a class; a name with spaces may stand in quotes.
    """
    line = line.strip()
    words = [re.sub(r"\s+-?[01]$", "", line), line, line.split()[0]]
    stems = []
    for word in words:
        path = word.strip("\"'").replace("\\", "/")
        for name in (path, path.rsplit("/", 1)[-1]):
            bare = name[: -len(Path(name).suffix)] if name.lower().endswith(IMAGES) else name
            stems += [name, bare]
    return next((known[stem] for stem in stems if stem in known), stems[-1])


def images_of(folder: Path, name: str) -> list[str]:
    """An image by its XML file's path or name."""
    stems = dict.fromkeys([name, name.rsplit("/", 1)[-1]])
    names = [stem + suffix for stem in stems for end in IMAGES for suffix in (end, end.upper())]
    return [name for name in names if (folder / name).is_file()]


def visible(file: Path, root: Path) -> bool:
    """Whether a file is none that macOS (._name), Jupyter (.ipynb_checkpoints) or others hide."""
    return not any(part.startswith(".") for part in file.relative_to(root).parts)


def _xml(folder: Path, deep: bool = False) -> tuple[str, ...]:
    """Paths of the files of VOC's in a folder, below it too if asked, without .xml."""
    names = _below(folder, _XML, deep)
    # Others' XML lies about too: the first few tell.
    heads = (file_bytes(ending(folder / name, ".xml"))[:4096] for name in names[:5])
    return names if any(re.search(r"<annotation[\s>]", searchable(head)) for head in heads) else ()


def _below(folder: Path, pattern: str, deep: bool = True) -> tuple[str, ...]:
    files = sorted(folder.rglob(pattern) if deep else folder.glob(pattern))
    shown = (file.relative_to(folder) for file in files if visible(file, folder))
    return tuple(dict.fromkeys(file.with_name(file.name[:-4]).as_posix() for file in shown))


def ending(path: Path, suffix: str) -> Path:
    """The file whose name this is without its suffix, which may be in upper case."""
    tries = [path.with_name(path.name + end) for end in (suffix, suffix.upper())]
    return next((file for file in tries if file.is_file()), tries[0])


def file_bytes(file: Path) -> bytes:
    """Read a file of annotations.

    Raises:
        UserError: when it is huge or can't be read.
    """
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise UserError(f"{file}: too large for an annotation of VOC's")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror})") from None
