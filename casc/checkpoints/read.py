"""Read weights from casc's checkpoints, the reference's and torchvision's, and fit them in.

All three use the same names: the reference's `state_dict`'s. torchvision's ResNets lack the
prefix `backbone.` and have a classifier that nobody needs here. What is in other programs'
checkpoints is turned to casc's conventions as far as their files tell; `casc convert` reports what
it did, and takes what they don't tell.
"""

import fcntl
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from casc.checkpoints import format as checkpoint
from casc.checkpoints.detectron2 import read_detectron2
from casc.checkpoints.foreign import STEM, Stated, to_rgb
from casc.checkpoints.mmdetection import categories_of, settings_of, state_dict_of
from casc.checkpoints.pickles import first_line, load_pickle, load_torch
from casc.checkpoints.published import COCO_CLASSES, PUBLISHED
from casc.checkpoints.shapes import model_of
from casc.checkpoints.torchvision_resnet import CLASSIFIER, is_torchvision
from casc.config import to_json
from casc.data.index import Category
from casc.data.loader_config import RemoteConfig
from casc.data.remote import FetchError, check_address, open_remote
from casc.errors import UserError
from casc.json_files import open_plain, parse_json
from casc.model.detector_config import DetectorConfig
from casc.model.layers import Params, grown
from casc.model.preprocess import ImageConfig
from casc.model.resnet import PREFIX
from casc.printing import redacted

T = TypeVar("T")

MOST_TENSORS = 20_000
MOST_HEADER = 2**25
"""Bytes of a safetensors file's header, names and metadata together."""


@dataclass(frozen=True)
class Weights:
    """Tensors by the reference's names, and what their file says about them."""

    source: str
    kind: Literal["casc", "reference", "torchvision", "timm"]
    tensors: dict[str, Tensor]
    categories: tuple[Category, ...] | None = None
    """The classes in the order of labels; id -1 where the file has names only."""
    recipe: dict[str, Any] | None = None
    """The run's recipe as JSON, from casc's own checkpoints; of the reference's, `model` and
    `image` as far as the config in the file has them."""
    step: int | None = None
    problem: str | None = None
    """What that config asks for and casc's model doesn't have."""
    origin: dict[str, Any] | None = None
    """Where `casc convert` had it from, and the order of colours there."""


class Fit(NamedTuple):
    """How weights met a model."""

    matched: list[str]
    missing: list[str]
    """In the model, not in the file: they keep their initial values."""
    unused: list[str]
    """In the file, not in the model."""
    reshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    """Of another shape in the file: (name, model's shape, file's shape); not taken."""

    def __str__(self) -> str:
        text = f"{len(self.matched)} tensors taken"
        for title, names in (
            ("kept at their initial values", self.missing),
            ("of another shape, kept at their initial values", [n for n, _, _ in self.reshaped]),
            ("in the file but not in the model", self.unused),
        ):
            if names:
                shown = ", ".join(_groups(names))
                text += f"; {len(names)} {title} ({shown})"
        return text


def read_weights(source: str) -> Weights:
    """Read weights.

    Args:
        source: a run's folder (its newest whole checkpoint is taken), a checkpoint's folder,
            a `.safetensors` file, a file of the reference, Detectron2 or torchvision, the http(s)
            URL of one, which is downloaded once (see `download_weights`), `hf://owner/name`
            on the Hugging Face hub, or a name of `casc.checkpoints.published`.

    Raises:
        UserError: it can't be read, or holds none of these.
    """
    if source in PUBLISHED:
        return replace(_from_file(download_weights(PUBLISHED[source].url)), source=source)
    if source.startswith(("mmdet:", "detectron2:")):
        raise UserError(f"{source}: isn't known; `casc weights` lists the names")
    if source.startswith("hf://"):
        from casc.checkpoints.hub import fetch  # it imports this file

        return replace(_from_safetensors(fetch(source)), source=source)
    if "://" in source:
        return replace(_from_file(download_weights(source)), source=redacted(source))
    path = Path(source).expanduser()
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise UserError(
            f"{source}: no such file or folder, and no published checkpoint's name (`casc weights`)"
        )
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    return _from_file(path)


def _from_file(path: Path) -> Weights:
    return _from_torch(str(path), load_pickle(path) if path.suffix == ".pkl" else load_torch(path))


def imagenet_weights(depth: int, version: Literal[1, 2] = 1) -> Weights:
    """Read the ResNet of this depth of torchvision; the reference starts from IMAGENET1K_V1.

    torch.hub keeps the file in its cache (`$TORCH_HOME/hub/checkpoints`).

    Raises:
        UserError: it isn't in the cache and can't be downloaded, or has another checksum.
    """
    import torchvision

    url = torchvision.models.get_weight(f"ResNet{depth}_Weights.IMAGENET1K_V{version}").url
    return _from_torch(url, load_torch(download_weights(url)))


def fit_weights(
    params: Params, buffers: Params, tensors: Mapping[str, Tensor]
) -> tuple[Params, Params, Fit]:
    """Put tensors in place of those of the same name and shape.

    The first convolution of RGB images is made to fit images of other channels: see `grown`.

    Returns:
        New parameters and buffers, and a report.
    """
    if STEM in tensors and STEM in params:
        ours, theirs = params[STEM].shape, tensors[STEM].shape
        if ours[1] != 3 and theirs == (ours[0], 3, *ours[2:]):
            tensors = {**tensors, STEM: grown(tensors[STEM], ours[1])}
    fit = Fit([], [], [], [])
    result: tuple[Params, Params] = dict(params), dict(buffers)
    for target in result:
        for name, value in target.items():
            found = tensors.get(name)
            if found is None:
                fit.missing.append(name)
            elif found.shape != value.shape:
                fit.reshaped.append((name, tuple(value.shape), tuple(found.shape)))
            else:
                target[name] = found.to(value.dtype)
                fit.matched.append(name)
    fit.unused.extend(name for name in tensors if name not in params and name not in buffers)
    return *result, fit


def _in_folder(path: Path) -> Path:
    if (path / checkpoint.WEIGHTS).is_file():
        checkpoint.verify(path)
        return path / checkpoint.WEIGHTS
    for folder in (path, path / "checkpoints"):
        torn: list[str] = []
        found = checkpoint.newest(folder, torn.append)
        if found:
            return found / checkpoint.WEIGHTS
        if torn:
            raise UserError(torn[0])
    raise UserError(f"{path}: no checkpoint in this folder")


def _from_safetensors(path: Path) -> Weights:
    try:
        _check_header(path)
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if int(metadata.get("version", checkpoint.VERSION)) > checkpoint.VERSION:
            raise UserError(
                f"{path}: written by a newer version of casc ({metadata.get('casc', 'unknown')});"
                " update casc to read it"
            )
        tensors = load_file(path)
        entries, recipe, step, origin = (
            parse_json(metadata.get(key, "null"), f"{path}: {key}", kind)
            for key, kind in (
                ("classes", list | None), ("recipe", dict | None), ("step", int | None),
                ("origin", dict | None),
            )
        )  # fmt: skip
        recipe = checkpoint.upgrade_recipe(recipe)
        categories = entries and tuple(
            Category(
                _typed(entry, "id", int, f"{path}: classes[{i}]"),
                _typed(entry, "name", str, f"{path}: classes[{i}]"),
            )
            for i, entry in enumerate(entries)
        )
    except UserError:
        raise
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable as safetensors ({first_line(error)})") from None
    if recipe is None:
        return replace(_from_torch(str(path), tensors), categories=categories)
    return Weights(str(path), "casc", tensors, categories, recipe, step, origin=origin)


def _typed(entry: Any, key: str, kind: type[T], where: str) -> T:
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) is not kind:
        raise UserError(f"{where}.{key}: expected {kind.__name__}, got {value!r:.60}")
    return value


def _check_header(path: Path) -> None:
    """Refuse a header that is long to parse. Raises UserError, or OSError as `open_plain`."""
    with open_plain(path) as file:
        size = int.from_bytes(file.read(8), "little")
        count = file.read(min(size, MOST_HEADER)).count(b'"data_offsets"')
    if count > MOST_TENSORS or MOST_HEADER < size < path.stat().st_size:
        raise UserError(
            f"{path}: has {count:,} tensors in the first {min(size, MOST_HEADER):,} bytes of its"
            " header; a detector has some hundreds"
        )


def _from_torch(source: str, data: Any) -> Weights:
    if not isinstance(data, Mapping):
        raise UserError(f"{source}: holds no state_dict")
    if isinstance(data.get("model"), Mapping):
        return _from_detectron2(source, data)
    tensors = state_dict_of(data) if isinstance(data.get("state_dict", data), Mapping) else {}
    if not tensors:
        raise UserError(f"{source}: holds no state_dict")
    if is_torchvision(tensors):
        tensors = {f"{PREFIX}.{k}": v for k, v in tensors.items() if k not in CLASSIFIER}
        return Weights(source, "torchvision", tensors)
    try:
        model = replace(model_of(tensors, source), roi_align="adaptive")
    except UserError:  # of another detector: `fit_weights` takes what fits
        model = DetectorConfig()
    said = settings_of(data, model, ImageConfig(), source)
    recipe = None
    if said:
        if said.channels and STEM in tensors and tensors[STEM].dim() == 4:
            tensors = to_rgb(tensors, said.channels)
        recipe = {"model": to_json(said.model), "image": to_json(said.image)}
    problem = said.problem if said else None
    return Weights(source, "reference", tensors, categories_of(data), recipe, problem=problem)


def _from_detectron2(source: str, data: Mapping[str, Any]) -> Weights:
    """A Detectron2 model with what is usual there where its file doesn't say."""
    found = read_detectron2(data, source, Stated()).checkpoint
    recipe = {"model": to_json(found.model), "image": to_json(found.image)}
    categories = found.categories
    if categories is None and found.model.classes == len(COCO_CLASSES):
        categories = tuple(Category(-1, name) for name in COCO_CLASSES)
    return Weights(source, "reference", found.tensors, categories, recipe)


def download_weights(url: str) -> Path:
    """A URL's file in torch.hub's cache (`$TORCH_HOME/hub/checkpoints`), downloaded if needed.

    Where the name ends in the file's own hash (`resnet50-0676ba61.pth`), the file has that name
    there. Any other name may be that of many files: it gets a hash of the whole URL in front, and
    the content's SHA-256 is kept beside it, and compared each time. The hash in a name is compared
    when the file has been downloaded. What an interrupted download left is gone on with, and
    processes that want the same file wait for the first.

    Raises:
        UserError: it isn't http(s), can't be downloaded, or has another hash.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise UserError(f"{url}: only http(s) URLs are downloaded; give a local file by its path")
    check_address(url)
    base = Path(parts.path).name or "weights"
    named = re.search(r"-([0-9a-f]{8,64})\.", base)
    name = base if named else f"{hashlib.sha256(url.encode()).hexdigest()[:16]}_{base}"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / name
    kept = folder / f"{name}.sha256"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new = not file.exists() and _download(url, file, named[1] if named else "")
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        expected = kept.read_text().strip() if kept.exists() and not named else digest
        if new and not named:
            expected = digest
            kept.write_text(f"{digest}\n")
    except OSError as error:  # of the disk
        raise UserError(
            f"{url}: could not be had ({first_line(error)}); download it elsewhere to {file},"
            " or give the path of a file with --init"
        ) from None
    except FetchError as error:
        raise UserError(
            f"{error}; or download it elsewhere to {file}, or give the path of a file"
        ) from None
    if not digest.startswith(expected):
        raise UserError(f"{file}: its SHA-256 isn't {expected}; delete it to download {url} again")
    return file


def _download(url: str, file: Path, digest: str) -> bool:
    """Whether this process downloaded the file, or the last part of it."""
    part = file.with_name(f"{file.name}.part")
    with part.open("ab") as target:
        fcntl.flock(target, fcntl.LOCK_EX)
        if file.exists():  # another process had it first
            part.unlink(missing_ok=True)
            return False
        start = target.seek(0, io.SEEK_END)
        with open_remote(url, None, RemoteConfig(), start=start) as stream:
            while some := stream.read1(2**20):  # so that what has come is kept if the rest doesn't
                target.write(some)
        target.flush()
        with part.open("rb") as made:
            found = hashlib.file_digest(made, "sha256").hexdigest()
        if not found.startswith(digest):
            part.unlink()
            raise UserError(f"{url}: its SHA-256 begins {found[:8]}, not {digest}; try again")
        part.rename(file)
    return True


def _groups(names: Sequence[str], most: int = 6) -> list[str]:
    """Names by their first parts, with counts, so that a report stays one line."""
    counts: dict[str, int] = {}
    for name in names:
        key = ".".join(name.split(".")[: 3 if name.startswith("roi_head.") else 2])
        counts[key] = counts.get(key, 0) + 1
    shown = [f"{key}.* x{n}" if n > 1 else key for key, n in counts.items()]
    return shown if len(shown) <= most else [*shown[:most], f"{len(shown) - most} more groups"]
