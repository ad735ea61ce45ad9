"""A checkpoint as a detector that can be called, on the device that is asked for."""

import logging
import os
from typing import Literal

import torch

from casc.checkpoints.model import Trained, class_names, load_trained
from casc.device.compile_cache import use_cache
from casc.device.devices import choose_device, choose_dtype
from casc.errors import UserError
from casc.inference.detector import Detector
from casc.model.choose_compute import choose_compute
from casc.model.steps import to_format

_log = logging.getLogger(__name__)


def load(
    source: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    compile: Literal["auto", "on", "off"] | bool = "off",
) -> Detector:
    """Load a trained detector.

    Args:
        source: a run's folder (its newest whole checkpoint is taken), a checkpoint's folder, a
            .safetensors file, a .pth file of MMDetection, or the http(s) URL of one.
        device: "auto" takes the accelerator if there is one, else the CPU; or "cpu", "cuda", ...
        dtype: of convolutions and matrix products: "float32", "bfloat16", or "auto": as it was
            trained, or what suits the device where that isn't known or the device can't.
        compile: with torch.compile, which pays for many images only; "auto" does so on
            accelerators.

    Raises:
        UserError: it can't be read or isn't a whole detector, or this machine has no such device,
            or can't compute with the dtype.
    """
    return ready_detector(load_trained(os.fspath(source)), device, dtype, compile)


def ready_detector(
    trained: Trained,
    device: str = "auto",
    dtype: str = "auto",
    compile: Literal["auto", "on", "off"] | bool = "auto",
) -> Detector:
    """Put a checkpoint on a device; arguments and errors are those of `load`."""
    place = choose_device(device)
    compiled = compile in ("on", True) or (compile == "auto" and place.type != "cpu")
    programs = use_cache() if compiled else None
    if dtype == "auto":
        dtype = _own_dtype(trained, place)
    compute, notes = choose_compute(
        trained.model, place, dtype=dtype, compile=compiled, programs=programs
    )
    for note in notes:
        # What isn't one, such as the compiler's name, is for those who ask for it.
        serious = note.startswith("warning: ")
        _log.log(logging.WARNING if serious else logging.INFO, "%s", note.removeprefix("warning: "))
    stated = trained.weights.categories
    params = to_format({k: v.to(place) for k, v in trained.params.items()}, compute.memory_format)
    return Detector(
        params=params,
        buffers={k: v.to(place) for k, v in trained.buffers.items()},
        model=trained.model,
        image=trained.image,
        compute=compute,
        device=place,
        categories=class_names(trained),
        source=trained.weights.source,
        known="none" if not stated else "classes" if stated[0].id >= 0 else "names",
        split=str((trained.weights.recipe or {}).get("val_split", "val2017")),
    )


def _own_dtype(trained: Trained, device: torch.device) -> str:
    """The dtype that the run computed in, if this device can."""
    own = str((trained.weights.recipe or {}).get("dtype", "auto"))
    try:
        choose_dtype(own, device)
    except (UserError, KeyError):
        return "auto"
    return own
