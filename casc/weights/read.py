"""Read weights from casc's checkpoints, the reference's and torchvision's, and fit them in.

All three use the same names: the reference's `state_dict`'s. torchvision's ResNets lack the
prefix `backbone.` and have a classifier that nobody needs here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from casc.data.index import Category
from casc.detector import DetectorConfig
from casc.errors import UserError
from casc.layers import Params
from casc.resnet import BLOCKS, PREFIX, ResNetConfig
from casc.train import checkpoint

_CLASSIFIER = ("fc.weight", "fc.bias")


@dataclass(frozen=True)
class Weights:
    """Tensors by the reference's names, and what their file says about them."""

    source: str
    kind: Literal["casc", "reference", "torchvision"]
    tensors: dict[str, Tensor]
    categories: tuple[Category, ...] | None = None
    """The classes in the order of labels; id -1 where the file has names only."""
    recipe: dict[str, Any] | None = None
    """The run's recipe as JSON, from casc's own checkpoints."""
    step: int | None = None


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
            a `.safetensors` file, a `.pth` file of the reference or of torchvision, or the
            URL of one. torch.hub downloads it, once, and checks the hash in its name.

    Raises:
        UserError: it can't be read, or holds none of these.
    """
    if "://" in source:
        return _from_torch(source, _download(source))
    path = Path(source).expanduser()
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise UserError(f"{source}: no such file or folder")
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    try:
        # Nothing but tensors and plain values: a pickle may not run code here.
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises all sorts of things on damaged files
        raise UserError(
            f"{path}: not a file of tensors that torch.load reads safely ({_first_line(error)})"
        ) from None
    return _from_torch(str(path), data)


def imagenet_weights(depth: int) -> Weights:
    """Read the ResNet of this depth of torchvision, IMAGENET1K_V1, as the reference starts from.

    torch.hub keeps the file in its cache (`$TORCH_HOME/hub/checkpoints`).

    Raises:
        UserError: it isn't in the cache and can't be downloaded, or has another checksum.
    """
    import torchvision

    url = torchvision.models.get_weight(f"ResNet{depth}_Weights.IMAGENET1K_V1").url
    return _from_torch(url, _download(url))


def fit_weights(
    params: Params, buffers: Params, tensors: Mapping[str, Tensor]
) -> tuple[Params, Params, Fit]:
    """Put tensors in place of those of the same name and shape.

    Returns:
        New parameters and buffers, and a report.
    """
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


def guess_model(weights: Weights) -> DetectorConfig:
    """The model of a reference checkpoint, from its names and shapes.

    Raises:
        UserError: it isn't a Cascade Mask R-CNN with a ResNet.
    """
    tensors = weights.tensors
    try:
        blocks = tuple(
            len({name.split(".")[2] for name in tensors if name.startswith(f"{PREFIX}.layer{s}.")})
            for s in range(1, 5)
        )
        bottleneck = f"{PREFIX}.layer1.0.conv3.weight" in tensors
        depth: Any = next(d for d, b in BLOCKS.items() if b == blocks and (d >= 50) == bottleneck)
        classes = tensors["roi_head.bbox_head.0.fc_cls.weight"].shape[0] - 1
    except (KeyError, StopIteration, IndexError):
        raise UserError(
            f"{weights.source}: not the weights of a Cascade Mask R-CNN with a ResNet"
        ) from None
    return replace(DetectorConfig(), classes=classes, backbone=ResNetConfig(depth=depth))


def check_classes(weights: Weights, categories: Sequence[Category], where: str) -> None:
    """Refuse weights that were trained on other classes, or on the same in another order.

    Raises:
        UserError: naming the first class that differs.
    """
    if weights.categories is None:
        return
    trained = [_named(c, weights.categories) for c in weights.categories]
    wanted = [_named(c, weights.categories) for c in categories]
    for i, (a, b) in enumerate(zip(trained, wanted, strict=False)):
        if a != b:
            raise UserError(f"{weights.source}: class {i} is {a}, in {where} it is {b}")
    if len(trained) != len(wanted):
        raise UserError(
            f"{weights.source}: trained on {len(trained)} classes, {where} has {len(wanted)}"
        )


def _named(category: Category, like: Sequence[Category]) -> str:
    """Id and name, or the name alone where the file knows no ids."""
    return category.name if like[0].id < 0 else f"{category.name!r} (id {category.id})"


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
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
        entries = json.loads(metadata.get("classes", "null"))
        recipe = json.loads(metadata.get("recipe", "null"))
        step = json.loads(metadata.get("step", "null"))
        categories = entries and tuple(Category(entry["id"], entry["name"]) for entry in entries)
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable as safetensors ({_first_line(error)})") from None
    if recipe is None:
        return replace(_from_torch(str(path), tensors), categories=categories)
    return Weights(str(path), "casc", tensors, categories, recipe, step)


def _from_torch(source: str, data: Any) -> Weights:
    meta = {}
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        meta = data.get("meta") or {}
        data = data["state_dict"]
    if not isinstance(data, Mapping) or not any(isinstance(v, Tensor) for v in data.values()):
        raise UserError(f"{source}: holds no state_dict")
    tensors = {str(k).removeprefix("module."): v for k, v in data.items() if isinstance(v, Tensor)}
    if "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        tensors = {f"{PREFIX}.{k}": v for k, v in tensors.items() if k not in _CLASSIFIER}
        return Weights(source, "torchvision", tensors)
    names = meta.get("CLASSES")
    categories = tuple(Category(-1, str(name)) for name in names) if names else None
    return Weights(source, "reference", tensors, categories)


def _download(url: str) -> Any:
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except Exception as error:  # of the network, of the hash, of the unpickler
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"{url}: could not be had ({_first_line(error)}); download it elsewhere into {cache},"
            " or give the path of a file with --init"
        ) from None


def _groups(names: Sequence[str], most: int = 6) -> list[str]:
    """Names by their first parts, with counts, so that a report stays one line."""
    counts: dict[str, int] = {}
    for name in names:
        key = ".".join(name.split(".")[: 3 if name.startswith("roi_head.") else 2])
        counts[key] = counts.get(key, 0) + 1
    shown = [f"{key}.* x{n}" if n > 1 else key for key, n in counts.items()]
    return shown if len(shown) <= most else [*shown[:most], f"{len(shown) - most} more groups"]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
