"""From one program's checkpoint to another's: read, put in order, write, and say what was done."""

import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import casc
from casc.checkpoints.classes import in_order_of
from casc.checkpoints.detectron2 import read_detectron2
from casc.checkpoints.detectron2_write import write_detectron2
from casc.checkpoints.foreign import Checkpoint, Read, Stated, Written, complete
from casc.checkpoints.format import VERSION, WEIGHTS_FORMAT
from casc.checkpoints.mmdetection import read_mmdetection, write_mmdetection
from casc.checkpoints.pickles import load_pickle, load_torch
from casc.checkpoints.read import Weights, read_weights
from casc.checkpoints.report import Convention, Report, Row, chain
from casc.checkpoints.torchvision_resnet import is_torchvision, read_torchvision, write_torchvision
from casc.config import from_json, to_json
from casc.data.index import Category
from casc.errors import UserError
from casc.model.detector_config import DetectorConfig
from casc.model.preprocess import ImageConfig
from casc.model.resnet import PREFIX

Kind = Literal["casc", "mmdetection", "detectron2", "torchvision"]
SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "casc": (".safetensors",),
    "mmdetection": (".pth",),
    "detectron2": (".pkl", ".pth"),
    "torchvision": (".pth",),
}
_READERS: dict[Kind, Callable[[Mapping[str, Any], str, Stated], Read]] = {
    "mmdetection": read_mmdetection,
    "detectron2": read_detectron2,
    "torchvision": read_torchvision,
}


def convert(
    source: str,
    out: Path,
    to: Kind,
    stated: Stated,
    *,
    categories: tuple[Category, ...] | None = None,
    where: str = "",
    mask_stage: int | None = None,
    accept_differences: bool = False,
    overwrite: bool = False,
) -> Report:
    """Convert a checkpoint; nothing is written unless all of it can be.

    Args:
        source: a run's or checkpoint's folder, or a file of any of the programs.
        out: the file to write.
        to: for which program.
        stated: what the source's file doesn't say.
        categories: classes to put the labels in the order of; None leaves them.
        where: what reports call these.
        mask_stage: for Detectron2, the stage whose mask head to keep.
        accept_differences: write even what the other program can't compute in quite the same way.
        overwrite: replace `out` if it is there.

    Raises:
        UserError: it can't be read, or not be said there, or not be written.
    """
    if out.suffix not in SUFFIXES[to]:
        raise UserError(f"{out}: a file for {to} is named *{' or *'.join(SUFFIXES[to])}")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}")
    if out.is_dir():
        raise UserError(f"{out}: is a folder")
    if out.exists() and out.samefile(source):
        raise UserError(f"{out}: is what is to be read; give the result another name")
    if out.exists() and not overwrite:
        raise UserError(f"{out}: is there already; --overwrite replaces it")
    if mask_stage is not None and to != "detectron2":
        raise UserError("--mask-stage: is for --to detectron2 only")
    kind, (checkpoint, rows, conventions) = read_any(source, stated)
    if stated.roi_align != "auto":
        model = replace(checkpoint.model, roi_align=stated.roi_align)
        checkpoint = checkpoint._replace(model=model)
        conventions.append(Convention("RoIAlign", f"written as {stated.roi_align}", "given"))
    if categories is not None:
        if not checkpoint.whole:
            raise UserError(f"--shards: {source} is a backbone, which has no classes")
        checkpoint, moved, line = in_order_of(checkpoint, categories, where)
        rows, conventions = chain(rows, moved), [*conventions, line]
    if to == "detectron2":
        # What was said of the source isn't said of the result.
        own = stated if kind == "casc" else Stated()
        written = write_detectron2(checkpoint, own, mask_stage=mask_stage)
    elif to == "mmdetection":
        written = write_mmdetection(checkpoint, stated if kind == "casc" else Stated())
    elif to == "torchvision":
        written = write_torchvision(checkpoint, stated if kind == "casc" else Stated())
    else:
        written = _for_casc(checkpoint, kind, source)
    if written.differences and not accept_differences:
        raise UserError(
            f"{to} can't be made to compute the same: {written.differences[0]};"
            " --accept-differences writes it nevertheless"
        )
    save(written.data, out, to)
    return Report(
        f"{source} ({kind})",
        f"{out} ({to})",
        chain(rows, written.rows),
        [*conventions, *written.conventions],
        written.settings,
        written.differences,
    )


def read_any(source: str, stated: Stated) -> tuple[Kind, Read]:
    """A checkpoint of any program, in casc's conventions.

    Raises:
        UserError: it can't be read, is of none of them, or can't be converted.
    """
    if "://" in source:
        raise UserError(f"{source}: download it first, and give the file's name")
    path = Path(source).expanduser()
    if path.is_dir() or path.suffix == ".safetensors":
        weights = read_weights(source)
        if weights.kind == "casc":
            return "casc", _from_casc(weights, stated)
        data: Any = weights.tensors
    elif not path.is_file():
        raise UserError(f"{source}: no such file or folder")
    else:
        data = load_pickle(path) if path.suffix == ".pkl" else load_torch(path)
    kind = _kind(data, source)
    if kind == "torchvision" and isinstance(data.get("state_dict"), Mapping):
        data = data["state_dict"]
    return kind, _READERS[kind](data, source, stated)


def save(data: Any, out: Path, to: Kind) -> None:
    """Write a file, as a whole or not at all.

    Raises:
        UserError: it couldn't be written.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if to == "casc":
            tensors, metadata = data
            save_file(tensors, temporary, metadata=metadata)
        elif out.suffix == ".pkl":
            arrays = {name: value.numpy() for name, value in data["model"].items()}
            with temporary.open("wb") as file:
                pickle.dump({**data, "model": arrays}, file, protocol=4)
        else:
            torch.save(data, temporary)
        temporary.replace(out)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{out}: could not be written ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _kind(data: Any, source: str) -> Kind:
    """Whose checkpoint it is, by the names in it."""
    names: Any = ()
    if isinstance(data, Mapping):
        inner = data.get("state_dict", data.get("model", data))
        if isinstance(inner, Mapping):
            names = [str(name).removeprefix("module.") for name in inner]
        if "blobs" in data or any(name.startswith("res2_0_branch") for name in names):
            return "detectron2"  # its reader says which
    if any(n.startswith(("roi_heads.", "backbone.bottom_up.")) for n in names):
        return "detectron2"
    if is_torchvision(dict.fromkeys(names)):
        return "torchvision"
    if any(n.startswith(("roi_head.", "bbox_head.", f"{PREFIX}.layer1.")) for n in names):
        return "mmdetection"
    raise UserError(
        f"{source}: no checkpoint of MMDetection, Detectron2 or torchvision: no tensor in it has a"
        " name of theirs"
    )


def _from_casc(weights: Weights, stated: Stated) -> Read:
    for flag, given in (
        ("pixel-mean", stated.pixel_mean is not None),
        ("pixel-std", stated.pixel_std is not None),
        ("stride-in-1x1", stated.stride_in_1x1 != "auto"),
        ("reg-weights", stated.reg_weights is not None),
    ):
        if given:
            raise UserError(f"--{flag}: {weights.source} is casc's own and says that itself")
    recipe, where = weights.recipe or {}, f"{weights.source}: recipe"
    model = from_json(DetectorConfig, recipe.get("model", {}), f"{where}.model")
    image = from_json(ImageConfig, recipe.get("image", {}), f"{where}.image")
    whole = any(not name.startswith(f"{PREFIX}.") for name in weights.tensors)
    tensors, created = complete(weights.tensors, model, weights.source, whole=whole)
    rows = [Row("matched", n, n, tuple(v.shape)) for n, v in weights.tensors.items()]
    channels = (weights.origin or {}).get("channels")
    checkpoint = Checkpoint(
        tensors, model, image, weights.categories, channels if channels == "bgr" else None, whole
    )
    return Read(checkpoint, rows + [row for row in created if row.how != "missing"], [])


def _for_casc(checkpoint: Checkpoint, kind: Kind, source: str) -> Written:
    recipe = {"model": to_json(checkpoint.model), "image": to_json(checkpoint.image)}
    metadata = {
        "format": WEIGHTS_FORMAT,
        "version": str(VERSION),
        "recipe": json.dumps(recipe),
        "origin": json.dumps(
            {"program": kind, "file": Path(source).name, "channels": checkpoint.channels}
        ),
        "casc": casc.__version__,
        "torch": torch.__version__,
    }
    if checkpoint.categories:
        classes = [{"id": c.id, "name": c.name} for c in checkpoint.categories]
        metadata["classes"] = json.dumps(classes)
    rows = [Row("matched", n, n, tuple(v.shape)) for n, v in checkpoint.tensors.items()]
    return Written((checkpoint.tensors, metadata), rows, [], [], [])
