"""A loaded checkpoint as a detector that can be called, on the device that a command asks for."""

import logging

from casc.checkpoints.model import Trained
from casc.device.compile_cache import use_cache
from casc.device.devices import choose_device
from casc.inference.detector import Detector, new_detector
from casc.model.choose_compute import choose_compute
from casc.model.steps import to_format

_log = logging.getLogger(__name__)


def ready_detector(
    trained: Trained, device: str = "auto", dtype: str = "auto", compile: str = "auto"
) -> Detector:
    """Put a checkpoint on a device.

    Args:
        trained: the checkpoint.
        device: as for `choose_device`.
        dtype: as for `choose_dtype`.
        compile: "on", "off", or "auto", which compiles on accelerators.

    Raises:
        UserError: this machine has no such device, or it can't compute with the dtype.
    """
    place = choose_device(device)
    compiled = compile == "on" or (compile == "auto" and place.type != "cpu")
    programs = use_cache() if compiled else None
    compute, notes = choose_compute(
        trained.model, place, dtype=dtype, compile=compiled, programs=programs
    )
    for note in notes:
        _log.warning("%s", note)
    params = to_format({k: v.to(place) for k, v in trained.params.items()}, compute.memory_format)
    buffers = {k: v.to(place) for k, v in trained.buffers.items()}
    return new_detector(params, buffers, trained.model, trained.image, compute, place)
