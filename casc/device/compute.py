"""How to compute: what belongs to the device, not to the model."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from casc.device.versions import combining_options


class Compute(NamedTuple):
    """How to compute: belongs to the device, not to the model."""

    dtype: torch.dtype = torch.float32
    """Of activations; parameters, boxes, targets and losses stay float32."""
    memory_format: torch.memory_format = torch.contiguous_format
    """Of images and 4-d parameters."""
    compile: bool = True
    """Whether to compile; eager gives the same numbers up to rounding."""
    dynamic_rois: bool = True
    """How "counted" mask heads are compiled: once for any number of RoIs, or, where dynamic
    shapes are dear, once for each of a few capacities."""
    programs: Path | None = None
    """Folder, from `casc.device.compile_cache.use_cache`, in which what is compiled outlasts the
    process, where the compiler allows it."""
    backend: str = "inductor"
    """torch.compile's, from `casc.device.compilers.choose_compiler`."""
    roi_kernel: Literal["aten", "native", "triton"] = "aten"
    """What the config's "auto" stands for, from `casc.model.choose_compute`."""
    mask_capacity: Literal["counted", "full"] = "counted"
    """Likewise, from the device."""
    nms_kernel: Literal["auto", "triton"] = "auto"
    """Likewise; "auto" is what `batched_nms` makes of it."""

    @property
    def options(self) -> dict[str, Any] | None:
        """What `torch.compile` is told beside its defaults.

        Where Triton is used, inductor launches kernels that don't depend on each other as one:
        casts of weights, norms' scales, sums of gradients.
        """
        if "triton" not in (self.roi_kernel, self.nms_kernel) or self.backend != "inductor":
            return None
        return combining_options()
