"""YOLO's texts of objects, one of each image, as COCO has them."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from casc.errors import UserError
from data_tools.coco import below
from data_tools.converted import SPLITS, Converted, Foreign, annotation, coco, exists
from data_tools.texts import decode, searchable
from data_tools.voc import image_size
from data_tools.voc_files import IMAGES, ending, visible

_FARTHEST = 2
"""Of YOLO's numbers, which are shares; what is far beyond 1 is pixels."""
_CLASSES = ("classes.txt", "obj.names", "_darknet.labels")
"""Lists of the classes, one a line: Label Studio's and LabelImg's, Darknet's and Roboflow's."""
_NOTHING = (None, "", "~", "null", [])
"""What stands in YAML where nothing is given."""


def is_yolo(source: Path) -> bool:
    """Whether a split's source is one of YOLO's."""
    return source.suffix in (".yaml", ".yml", ".data") or source.name in _CLASSES


def find_described(root: Path) -> list[Foreign] | None:
    """Find the splits that a data.yaml tells of; None if there is none."""
    usual = [root / "data.yaml", root / "dataset.yaml"]
    for file in (*usual, *sorted(root.glob("*.yaml")), *sorted(root.glob("*.yml"))):
        if visible(file, root) and file.is_file() and (file in usual or _is_yolo(file)):
            about = _yaml(file)
            return [
                _yolo_split(file, about, key)
                for key in ("train", "val", "valid", "test")
                if about.get(key) not in _NOTHING
            ]
    return None


def find_yolo(root: Path) -> list[Foreign]:
    """YOLO's labels without a data.yaml: Darknet's *.data, or a list of the classes alone."""
    for file in filter(_is_darknet, sorted(root.glob("*.data"))):
        about = _about(file)
        keys = [key for key in ("train", "valid", "val", "test") if about.get(key)]
        # CVAT names a list of validation, whether there is one or not.
        return [_yolo_split(file, about, key) for key in keys]
    folders = ("", "labels/", "images/", "*/", "*/labels/", "*/*/")
    found = dict.fromkeys(
        file for folder in folders for name in _CLASSES for file in sorted(root.glob(folder + name))
    )
    lists = [file for file in found if visible(file, root) and file.is_file()]
    names = {tuple(_class_names(file)) for file in lists}
    pictures = [f for f in sorted(root.rglob("*")) if f.suffix.lower() in IMAGES]
    pictures = [f for f in pictures if visible(f, root) and f.is_file()]
    labels = (text for text in map(yolo_labels, pictures) if text.is_file())
    text = next((text for text in labels if has_objects(text)), None)
    if text is None:
        return []
    if len(names) > 1:
        raise UserError(
            f"{root}: {lists[0].relative_to(root)} and {lists[-1].relative_to(root)} name other"
            " classes; write a data.yaml with names:, train: and val: at the top"
        )
    if not names:
        raise UserError(
            f"{root}: has labels of YOLO's, such as {text.relative_to(root)}, and no data.yaml or"
            " classes.txt that names the classes; write classes.txt, one name a line"
        )
    splits: dict[str, list[Path]] = {}
    for image in pictures:
        above = (part.lower() for part in image.relative_to(root).parent.parts)
        split = next((part for part in above if part in SPLITS), "train")
        split = "val" if split.startswith("val") else split
        splits.setdefault(split, []).append(image)
    return [Foreign(split, lists[0], root, files=tuple(files)) for split, files in splits.items()]


def has_objects(labels: Path) -> bool:
    """Whether a text is labels of YOLO's; names of classes and lists of images lie among them."""
    with labels.open("rb") as stream:
        head = decode(stream.read(4096), errors="replace")
    # Those with commas or comments, which are refused by name, too.
    return bool(re.match(r"(\s*#.*\n)*\s*\d+([\s,;]+[-+.\deE]+){4}", head))


def yolo_labels(image: Path) -> Path:
    """Where an image's objects are: labels/ in place of the last images/ of its path, .txt.

    If there is nothing, Images/ and labels/ may be spelt in capitals.
    """
    *above, name = image.with_suffix("").parts

    def text(folder: str, labels: str) -> Path:
        at = len(above) - 1 - above[::-1].index(folder)
        return ending(Path(*above[:at], labels, *above[at + 1 :], name), ".txt")

    usual = text("images", "labels") if "images" in above else ending(Path(*above, name), ".txt")
    spelt = [part for part in above[::-1] if part.lower() == "images"][:1]
    if not spelt or usual.is_file():
        return usual
    others = (text(spelt[0], labels) for labels in ("labels", "Labels", "LABELS"))
    return next((other for other in others if other.is_file()), usual)


def convert_yolo(part: Foreign) -> Converted:
    """Read a split.

    Raises:
        UserError: naming the file that can't be understood.
    """
    about = _about(part.source)
    by_number: dict[int, str] = about["names"]
    keypoints = _keypoints(about.get("kpt_shape"), part.source)
    digest = hashlib.sha256(json.dumps([*sorted(by_number.items()), keypoints]).encode())
    images, annotations, numbers = [], [], itertools.count(1)
    ids: dict[Path, int] = {}
    for file in part.files:
        below = file.relative_to(part.images)
        again = file in ids
        image_id = ids.setdefault(file, len(ids) + 1)
        width, height = image_size(file)
        images.append(
            {"id": image_id, "file_name": below.as_posix(), "width": width, "height": height}
        )
        if again:  # an entry like the first, which is reported
            digest.update(f"{below}\0again".encode())
            continue
        text = yolo_labels(file)
        lines = _lines(text) if text.is_file() else []
        digest.update(f"{below}\0{lines}\0{width} {height}".encode())
        for number, line in enumerate(lines, 1):
            if line.split():
                place = f"{text}: line {number}"
                category, ring, box = _yolo_line(line, place, by_number, keypoints, width, height)
                made = annotation(next(numbers), image_id, category, [ring] if ring else [], box)
                annotations.append(made)
    if part.split == "train" and ids and not any(yolo_labels(file).is_file() for file in ids):
        raise UserError(
            f"{part.source}: none of the {len(ids)} images of train has labels; put them where"
            f" Ultralytics looks, the first's at {yolo_labels(part.files[0])}"
        )
    categories = [{"id": i, "name": name} for i, name in by_number.items()]
    return Converted(coco(images, annotations, categories), digest.hexdigest(), [], [])


def _is_darknet(file: Path) -> bool:
    text = searchable(file.read_bytes()) if file.is_file() else ""
    return all(re.search(rf"^\s*{key}\s*=", text, re.MULTILINE) for key in ("names", "train"))


def _about(file: Path) -> dict[str, Any]:
    """What a data.yaml says, Darknet's *.data, or a list of classes."""
    if file.suffix in (".yaml", ".yml"):
        return _yaml(file)
    if file.suffix != ".data":
        return {"names": dict(enumerate(_class_names(file)))}
    pairs = (line.partition("=") for line in _lines(file))
    about: dict[str, Any] = {key.strip(): value.strip() for key, _, value in pairs}
    listed = about.get("names") or ""
    tries = [file.parent / listed, *_beside(file, listed)] if listed else []
    names = next((place for place in tries if place.is_file()), None)
    if names is None:
        raise UserError(f"{file}: names: {listed!a}: no such list of classes; mend it")
    return {**about, "names": dict(enumerate(_class_names(names)))}


def _class_names(file: Path) -> list[str]:
    lines = _lines(file)
    while lines and not lines[-1].strip():
        lines.pop()
    return [line.strip() for line in lines]


def _lines(file: Path) -> list[str]:
    return _text(file).splitlines()


def _text(file: Path) -> str:
    try:
        return decode(file.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: isn't in UTF-8 ({error}); save it as that") from None
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror})") from None


def _is_yolo(file: Path) -> bool:
    text = searchable(file.read_bytes())
    return all(re.search(rf"^{key}:", text, re.MULTILINE) for key in ("names", "train"))


def _yaml(file: Path) -> dict[str, Any]:
    """Read a data.yaml; all that is in it as it is written, so that a class may be called no."""
    try:
        import yaml
    except ImportError:
        raise UserError(f"{file}: reading YOLO's needs PyYAML: pip install pyyaml") from None
    try:
        found = yaml.load(_text(file), yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{file}: not valid YAML ({str(error).splitlines()[0]})") from None
    names = found.get("names") if isinstance(found, dict) else None
    if not isinstance(names, (list, dict)):
        raise UserError(f"{file}: names: expected the classes; is it a data.yaml of YOLO's?")
    by_number = names if isinstance(names, dict) else {str(i): name for i, name in enumerate(names)}
    for number, name in by_number.items():
        if not re.fullmatch(r"\d{1,9}", str(number), re.ASCII) or not isinstance(name, str):
            raise UserError(
                f"{file}: names: expected a name of each class, or names by number,"
                f" got {number!a}: {name!a:.40}; mend it"
            )
    return {**found, "names": {int(number): name for number, name in by_number.items()}}


def _yolo_split(file: Path, about: dict[str, Any], key: str) -> Foreign:
    """What a key of data.yaml names: a folder of images, a text file of their paths, or several."""
    entries: list[object] = about[key] if isinstance(about[key], list) else [about[key]]
    bases = [file.parent / str(about.get("path") or ""), file.parent]
    split = "val" if key == "valid" else key
    found: list[Path] = []
    places: list[Path] = []
    for entry in entries:
        if not isinstance(entry, str):
            raise UserError(
                f"{file}: {key}: expected a folder of images, a .txt list of them, or several of"
                f" these, got {entry!a}"
            )
        tries = [*(base / entry for base in bases), *_beside(file, entry)]
        place = next((place for place in tries if exists(place)), None)
        if place is None:
            fault = f"{file}: {key}: {entry!a}: no such folder or list of images; mend it, or path:"
            return Foreign(split, file, file.parent, fault=fault)
        place = place.resolve()
        places.append(place)
        if place.is_dir():
            files = (f for f in sorted(place.rglob("*")) if visible(f, place))
            found += (f for f in files if f.suffix.lower() in IMAGES)
        else:
            found += _yolo_list(place, bases)
    if len(places) == 1 and places[0].is_dir():
        return Foreign(split, file, places[0], files=tuple(found))
    if not found:
        raise UserError(f"{file}: {key}: there is no image in {', '.join(map(str, places))}")
    common = Path(os.path.commonpath([image.parent for image in found]))
    if common == Path(common.anchor):
        raise UserError(
            f"{file}: {key}: its images, such as {found[0]} and {found[-1]}, have no folder in"
            " common; link them into one"
        )
    return Foreign(split, file, common, files=tuple(found))


def _yolo_list(file: Path, bases: Sequence[Path]) -> list[Path]:
    """The images that a text file lists, one a line.

    With ./ in front they are below its folder, as Ultralytics reads them; else they may also be
    below one of `bases`.
    """
    found = []
    for number, line in enumerate(_lines(file), 1):
        name = line.strip().replace("\\", "/")
        if not name:
            continue
        if "\0" in name or Path(name).suffix.lower() not in IMAGES:
            raise UserError(
                f"{file}: line {number}: expected an image's path ({', '.join(IMAGES)}),"
                f" got {name[:60]!a}; mend or remove it"
            )
        folders = [file.parent] if name.startswith("./") else [file.parent, *bases]
        tries = [Path(os.path.normpath(folder / name)) for folder in folders]
        tries += _beside(file, name)
        found.append(next((path for path in tries if exists(path)), tries[0]))
    return found


def _beside(file: Path, path: str) -> list[Path]:
    """Where a path of another machine may be here: below a file's folder, by its last parts.

    Roboflow writes ../train/images for a folder beside data.yaml. Parts are dropped from the front,
    but not one that tells a split from another.
    """
    parts = below(path.replace("\\", "/")).split("/")
    told = (i for i, part in enumerate(parts) if part.lower().startswith(SPLITS))
    return [file.parent.joinpath(*parts[i:]) for i in range(next(told, len(parts) - 1) + 1)]


def _keypoints(shape: object, file: Path) -> int:
    """How many numbers of keypoints follow a box: in lines of four they would look like points."""
    if shape is None:
        return 0
    try:
        count, size = (int(n) for n in cast("list[Any]", shape if isinstance(shape, list) else []))
    except (TypeError, ValueError):
        raise UserError(
            f"{file}: kpt_shape: expected [keypoints, numbers of each], got {shape!a:.40}; mend it"
        ) from None
    return count * size


def _yolo_line(
    line: str, place: str, names: dict[int, Any], keypoints: int, width: int, height: int
) -> tuple[int, list[float], list[float] | None]:
    try:
        first, *rest = line.split()
        number, values = int(first.removesuffix(".0")), [float(value) for value in rest]
    except ValueError:
        mend = (
            "remove the comment" if "#" in line
            else "write spaces in place of commas" if "," in line
            else "mend or remove the line"
        )  # fmt: skip
        raise UserError(
            f"{place}: expected a class's number and numbers, with spaces between, got"
            f" {line[:40]!a}; {mend}"
        ) from None
    if number not in names:
        raise UserError(
            f"{place}: class {number} isn't among the {len(names)} that are named; name it, or mend"
            " or remove the line"
        )
    if not all(abs(value) <= _FARTHEST for value in values):
        wrong = next(value for value in values if not abs(value) <= _FARTHEST)
        raise UserError(
            f"{place}: expected shares of the image's width and height, 0 to 1, got {wrong};"
            " mend it"
        )
    if keypoints and len(values) == 4 + keypoints:
        values = values[:4]  # keypoints have no area
    if len(values) == 4:
        x, y, w, h = values[0] * width, values[1] * height, values[2] * width, values[3] * height
        return number, [], [x - w / 2, y - h / 2, w, h]
    if len(values) < 6 or len(values) % 2:
        raise UserError(
            f"{place}: expected x y of 3 points or more, got {len(values)} numbers; mend or remove"
            " the line"
        )
    return number, [v * (height if i % 2 else width) for i, v in enumerate(values)], None
