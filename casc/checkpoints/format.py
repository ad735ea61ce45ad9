"""Checkpoints: folders that are there as a whole or not at all.

    RUN/checkpoints/step-00007330/
        weights.safetensors   parameters and buffers under the reference's names, as they are
                              evaluated; metadata says what they are (recipe, classes, step,
                              versions)
        state.safetensors     momentum (and AdamW's second moment), the guards' scalars, and of
                              raw weights and their moving average what isn't in the other
                              file; metadata has the counters and the data position
        checkpoint.json       size and SHA-256 of both
        metrics.json          figures, once the checkpoint has been evaluated
    RUN/checkpoints/best      link to the best checkpoint so far

A checkpoint is written under another name, flushed to the disk and renamed. Whoever finds
one that doesn't agree with its hashes goes on to the one before.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from casc.checkpoints.state import State
from casc.data.files import sync_folder
from casc.errors import UserError
from casc.json_files import parse_json, read_json

WEIGHTS, STATE, MANIFEST, METRICS = (
    "weights.safetensors", "state.safetensors", "checkpoint.json", "metrics.json"
)  # fmt: skip
BEST = "best"
FORMAT, WEIGHTS_FORMAT, VERSION = "casc-checkpoint", "casc-weights", 1
"""What the manifest and the metadata of the weights call themselves."""
_RENAMED = {"bucket_mb": "ddp_bucket_mb"}
"""Fields of recipes that were saved under another name."""
_PREFIX, _GUARD, _RAW, _EMA, _SECOND = "step-", "guard.", "raw.", "ema.", "second."


class CorruptCheckpointError(UserError):
    """A checkpoint whose files don't agree with its hashes."""


class Loaded(NamedTuple):
    """What a checkpoint folder holds."""

    weights: dict[str, Tensor]
    momentum: dict[str, Tensor]
    guard: dict[str, Tensor]
    ema: dict[str, Tensor]
    second: dict[str, Tensor]
    position: dict[str, Any]
    """Counters and data position, as given to `save`."""


def save(
    folder: Path,
    state: State,
    *,
    metadata: Mapping[str, str],
    position: Mapping[str, Any],
    averaged: bool = True,
) -> Path:
    """Write `folder/step-N`, atomically.

    Args:
        folder: the run's folder of checkpoints.
        state: what to save.
        metadata: what the weights are; goes into their file.
        position: JSON values that resuming needs beside the tensors.
        averaged: whether the moving averages, if there are any, are the weights to show.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: it couldn't be written; checkpoints that were there are as they were.
    """
    final = path_of(folder, state.step)
    temporary = folder / f".{final.name}.{os.getpid()}"
    weights = {**state.params, **state.buffers}
    rest = {
        **state.momentum,
        **_prefixed(_SECOND, state.second),
        **_prefixed(_GUARD, state.guard),
    }
    if averaged and state.ema:
        weights |= state.ema
        rest |= _prefixed(_RAW, {name: state.params[name] for name in state.ema})
    else:
        rest |= _prefixed(_EMA, state.ema)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(temporary / WEIGHTS, weights, metadata)
        _write(temporary / STATE, rest, {"position": json.dumps(dict(position))})
        files = {
            name: {key: fact(temporary / name) for key, fact in _FACTS.items()}
            for name in (WEIGHTS, STATE)
        }
        manifest = {"format": FORMAT, "version": VERSION, "step": state.step, "files": files}
        _write_text(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        sync_folder(temporary)
        # Torn, or its step was taken again after resuming before it.
        before = _hide(final) if final.exists() else None
        temporary.rename(final)
        sync_folder(folder)
        if before:
            shutil.rmtree(before)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"{final}: could not be saved ({error}); earlier checkpoints are untouched"
        ) from error
    return final


def load(checkpoint: Path) -> Loaded:
    """Read a checkpoint after checking its hashes.

    Raises:
        CorruptCheckpointError: naming the file that is missing, cut short or changed.
    """
    verify(checkpoint)
    position = position_of(checkpoint)
    weights, rest = load_file(checkpoint / WEIGHTS), load_file(checkpoint / STATE)
    guard, raw, ema, second = (_taken(rest, name) for name in (_GUARD, _RAW, _EMA, _SECOND))
    if raw:
        ema = {name: weights[name] for name in raw}
    return Loaded(weights | raw, rest, guard, ema, second, position)


def recipe_of(checkpoint: Path) -> Any:
    """The recipe, as JSON, that a checkpoint's weights were trained with."""
    return upgrade_recipe(_json_of(checkpoint / WEIGHTS, "recipe"))


def position_of(checkpoint: Path) -> dict[str, Any]:
    """What resuming needs of a checkpoint beside the tensors, as JSON."""
    return _json_of(checkpoint / STATE, "position")


def upgrade_recipe(recipe: Any) -> Any:
    """A recipe's JSON, or parts of one, as today's fields and values are called.

    Args:
        recipe: as saved by this version or an earlier one; it isn't changed.
    """
    if isinstance(recipe, list):
        return [upgrade_recipe(entry) for entry in recipe]
    if not isinstance(recipe, dict):
        return recipe
    made = {_RENAMED.get(name, name): upgrade_recipe(value) for name, value in recipe.items()}
    if made.get("nms_kernel") == "matrix":
        made["nms_kernel"] = "fixed"
    if "warmup_steps" in made:  # before there was a limit, none held
        made.setdefault("warmup_limit", 1.0)
    return made


def restore(state: State, loaded: Loaded, source: Path) -> State:
    """Copy a checkpoint into a new state of the same recipe.

    Raises:
        UserError: a tensor is missing, left over or of another shape.
    """
    guard = loaded.guard
    # Earlier versions counted only what they skipped.
    if "updates" in state.guard and "updates" not in guard and "skipped" in guard:
        guard = {**guard, "updates": loaded.position["step"] - guard["skipped"]}
    for target, found in (
        ({**state.params, **state.buffers}, loaded.weights),
        (state.momentum, loaded.momentum),
        (state.guard, guard),
        (state.ema, loaded.ema),
        (state.second, loaded.second),
    ):
        for name in [*target, *(name for name in found if name not in target)]:
            if name not in found or name not in target or found[name].shape != target[name].shape:
                raise UserError(
                    f"{source}: tensor {name!r} doesn't fit the recipe's model; it was trained"
                    " with other --model settings"
                )
            with torch.no_grad():
                target[name].copy_(found[name])
    return state._replace(step=int(loaded.position["step"]))


def path_of(folder: Path, step: int) -> Path:
    """Where a step's checkpoint is, or would be."""
    return folder / f"{_PREFIX}{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run, newest first, whole or not."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir()]
    return sorted(found, key=lambda path: (len(path.name), path.name), reverse=True)


def newest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint; `warn` is told of each torn one that was passed over."""
    for path in list_checkpoints(folder):
        try:
            verify(path)
        except CorruptCheckpointError as error:
            warn(f"{error}; using the checkpoint before it")
            continue
        return path
    return None


def verify(checkpoint: Path) -> None:
    """Check that a checkpoint is one of this version, agrees with its hashes and can be resumed.

    Raises:
        CorruptCheckpointError: naming the file and what is wrong with it.
        UserError: it is whole, but a newer version of casc wrote it.
    """
    path = checkpoint / MANIFEST
    manifest = read_json(path, error=CorruptCheckpointError)
    _check_version(path, manifest.get("format"), manifest.get("version"), FORMAT)
    _compare(checkpoint, manifest, _FACTS)
    metadata = _metadata(checkpoint / WEIGHTS)
    version = metadata.get("version", str(VERSION))
    _check_version(
        checkpoint / WEIGHTS,
        metadata.get("format", WEIGHTS_FORMAT),
        int(version) if version.isdecimal() and version.isascii() else version,
        WEIGHTS_FORMAT,
    )
    recipe_of(checkpoint)
    step = position_of(checkpoint).get("step")
    if type(step) is not int or step < 0:
        raise CorruptCheckpointError(f"{checkpoint / STATE}: position: step is {step!r:.60}")


def _check_version(path: Path, kind: object, version: object, expected: str) -> None:
    if kind != expected:
        raise CorruptCheckpointError(f"{path}: format is {kind!r:.60}, expected {expected!r}")
    if type(version) is not int or version < 1:
        raise CorruptCheckpointError(f"{path}: version is {version!r:.60}, expected {VERSION}")
    if version > VERSION:
        raise UserError(
            f"{path}: version is {version}, this casc reads {VERSION}; update casc, or choose"
            " another --out"
        )


def _compare(
    checkpoint: Path, manifest: Mapping[str, Any], facts: Mapping[str, Callable[[Path], Any]]
) -> None:
    try:
        files = manifest["files"]
        expected = [(name, key, files[name][key]) for name in (WEIGHTS, STATE) for key in facts]
    except (KeyError, TypeError) as error:
        raise CorruptCheckpointError(
            f"{checkpoint / MANIFEST}: lists no sizes and hashes of files ({error!r})"
        ) from None
    for name, key, value in expected:
        try:
            found = _FACTS[key](checkpoint / name)
        except OSError as error:
            raise CorruptCheckpointError(f"{checkpoint / name}: {error.strerror}") from None
        if found != value:
            raise CorruptCheckpointError(
                f"{checkpoint / name}: {key} is {found}, it was saved with {value!s:.80}"
            )


def _is_whole(checkpoint: Path, *, hashes: bool = True) -> bool:
    """Whether a checkpoint can be relied on; without hashes, whether its files have their sizes."""
    try:
        if hashes:
            verify(checkpoint)
        else:
            manifest = read_json(checkpoint / MANIFEST, error=CorruptCheckpointError)
            _compare(checkpoint, manifest, {"bytes": _FACTS["bytes"]})
    except UserError:
        return False
    return True


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safetensors.safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise CorruptCheckpointError(f"{file}: can't be read ({error})") from None


def _json_of(file: Path, key: str) -> dict[str, Any]:
    """A JSON object in a file's metadata."""
    text = _metadata(file).get(key)
    if text is None:
        raise CorruptCheckpointError(f"{file}: its metadata has no {key!r}")
    return parse_json(text, f"{file}: {key}", error=CorruptCheckpointError)


def add_metrics(checkpoint: Path, metrics: Mapping[str, float | None]) -> None:
    """Record figures with a checkpoint."""
    temporary = checkpoint / f".{METRICS}"
    _write_text(temporary, json.dumps(dict(metrics), indent=1) + "\n")
    temporary.replace(checkpoint / METRICS)


def best(folder: Path, metric: str) -> tuple[Path, float] | None:
    """The whole checkpoint with the highest figure, the newer of equals; None if there is none."""
    figures = []
    for path in list_checkpoints(folder):
        with contextlib.suppress(UserError):
            value = read_json(path / METRICS).get(metric)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                figures.append((path, float(value)))
    # Hashing takes time: the likeliest first. Sorting keeps the newer of equals in front.
    figures.sort(key=lambda entry: entry[1], reverse=True)
    return next((entry for entry in figures if _is_whole(entry[0])), None)


def prune(
    folder: Path, *, keep_last: int, keep_best: str | None, newest: Path | None = None
) -> None:
    """Delete what isn't among the newest `keep_last`, nor the best; point `best` there.

    The last from before the first update that was skipped is kept too: what follows may be what
    the run has to be taken back from.

    What is damaged counts for neither, so that the last whole checkpoint is never deleted on its
    account.

    Args:
        folder: the run's folder of checkpoints.
        keep_last: how many of the newest to keep; 0 keeps all.
        keep_best: the figure that decides which one is the best; None doesn't care.
        newest: where to begin; by default at the last. Those after it were passed over when
            the run was continued, and count for nothing.
    """
    found = best(folder, keep_best) if keep_best else None
    if found:
        _link(folder / BEST, found[0].name)
    if keep_last:
        there = list_checkpoints(folder)
        first = there.index(newest) if newest in there else 0
        sound = next((path for path in there[first:] if _skipped(path) == 0), None)
        kept = 0
        for path in there[first:]:
            if kept < keep_last:
                kept += _is_whole(path, hashes=False)
            elif path != sound and (not found or path != found[0]):
                shutil.rmtree(_hide(path))


def set_aside(folder: Path, step: int) -> Path | None:
    """Move the checkpoints after a step into a folder of their own; gives it, if there are any."""
    name = path_of(folder, step).name
    later = [p for p in list_checkpoints(folder) if (len(p.name), p.name) > (len(name), name)]
    if not later:
        return None
    number = 1
    while (aside := folder / f"set-aside-{number}").exists():
        number += 1
    aside.mkdir()
    for path in later:
        path.rename(aside / path.name)
    if not (folder / BEST).exists():
        (folder / BEST).unlink(missing_ok=True)  # it was among them
    sync_folder(folder)
    return aside


def _skipped(checkpoint: Path) -> int | None:
    """How many updates had been skipped when this was saved; None where that can't be read."""
    try:
        with safetensors.safe_open(checkpoint / STATE, "pt") as file:
            return int(file.get_tensor(f"{_GUARD}skipped"))
    except (OSError, safetensors.SafetensorError, ValueError):
        return None


def remove_partial(folder: Path) -> None:
    """Delete what interrupted saves and deletions have left behind."""
    for path in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f".{BEST}.*"):
        path.unlink(missing_ok=True)


def _hide(path: Path) -> Path:
    """Rename a folder that is to be deleted: half of it must not look like a checkpoint."""
    hidden = path.with_name(f".{path.name}.old.{os.getpid()}")
    shutil.rmtree(hidden, ignore_errors=True)
    return path.rename(hidden)


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take out the tensors whose names begin so, under the rest of their names."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    plain = {k: _own(v.detach().to("cpu", copy=False)) for k, v in tensors.items()}
    save_file(plain, path, metadata=dict(metadata))
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _own(tensor: Tensor) -> Tensor:
    """Contiguous and in memory of its own, as safetensors wants it."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        # Large parts: between them a thread waits for Python's lock.
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()


# What the manifest records of a file, cheapest first.
_FACTS: dict[str, Callable[[Path], Any]] = {
    "bytes": lambda path: path.stat().st_size,
    "sha256": _sha256,
}


def _link(path: Path, target: str) -> None:
    """Point a symbolic link elsewhere, at once; without one where the system has none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
