"""What each kind of device wants: precision, layout, communication. One table.

The rest of the code asks this table and never compares device names.
"""

from dataclasses import dataclass

import torch

from casc.errors import UserError


@dataclass(frozen=True)
class Traits:
    """How to run on one kind of device."""

    dtype: torch.dtype
    """Of convolutions and matrix products; boxes, losses and targets stay float32."""
    memory_format: torch.memory_format
    """Of images and convolution weights."""
    backend: str
    """torch.distributed's."""
    pin_memory: bool
    """Whether batches are copied to the device from pinned memory."""
    copy_stream: bool
    """Whether they are copied in a stream of their own, beside the step that is running. Not
    yet tried on any accelerator, so off: the copy then lies between two steps."""
    fused_optimizer: bool
    """Whether torch.optim.SGD has a fused kernel here."""
    dynamic_shapes: bool
    """Whether one compiled graph may serve any number of RoIs; otherwise one per capacity."""


TRAITS = {
    "cpu": Traits(torch.bfloat16, torch.channels_last, "gloo", False, False, True, True),
    "cuda": Traits(torch.bfloat16, torch.channels_last, "nccl", True, False, True, True),
    # Ascend refuses channels_last; its own formats are chosen inside the kernels.
    "npu": Traits(torch.bfloat16, torch.contiguous_format, "hccl", True, False, False, False),
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """The device to run on.

    Args:
        name: `auto` takes the accelerator where there is one and else the CPU; or a kind
            (`cuda`), or one device (`cuda:1`).

    Raises:
        UserError: unknown kind, or this machine has no such device.
    """
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    if name == "auto":
        return accelerator or torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind not in TRAITS or (index and not index.isdigit()):
        raise UserError(f"--device {name}: expected auto or one of {', '.join(TRAITS)}")
    if kind != "cpu" and (accelerator is None or accelerator.type != kind):
        raise UserError(
            f"--device {name}: torch {torch.__version__} finds no {kind} device on this machine;"
            " use --device cpu, or install the torch build for it"
        )
    if index and kind != "cpu" and int(index) >= torch.accelerator.device_count():
        raise UserError(f"--device {name}: there are {torch.accelerator.device_count()} devices")
    return torch.device(name)


def traits(device: torch.device) -> Traits:
    """The table's row for a device."""
    if device.type not in TRAITS:
        raise UserError(f"--device {device}: expected one of {', '.join(TRAITS)}")
    return TRAITS[device.type]


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The recipe's dtype: `auto` takes the table's, else the one of that name.

    Raises:
        UserError: the device can't compute with it.
    """
    dtype = traits(device).dtype if name == "auto" else DTYPES[name]
    if dtype == torch.float16 and device.type == "cpu":  # accelerators all have it
        x = torch.ones(1, 8, 4, 4, dtype=dtype)
        try:
            torch.nn.functional.conv2d(x, x)
        except RuntimeError as error:
            raise UserError(
                f"--dtype {name}: torch {torch.__version__} has no kernels for it on this"
                f" processor ({error}); use --dtype bfloat16 or float32"
            ) from None
    return dtype


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: of the device's allocator, or on the CPU of this process."""
    if device.type == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.accelerator.max_memory_allocated(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work; nothing on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
