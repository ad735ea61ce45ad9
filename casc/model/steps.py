"""The training step's losses and the detection step, compiled for one canvas.

A step is a pure function of (parameters, buffers, batch): resize and flip, the network,
matching, sampling, losses. With `mask_head.capacity="counted"` it is two graphs with one
read in between: the number of positives decides how many RoIs the mask heads run on.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from casc.data.batch import Batch
from casc.device.compile_cache import aot_cached
from casc.device.compute import Compute
from casc.distributed import Ranks
from casc.model import detector
from casc.model.anchors import AnchorConfig
from casc.model.detector import Detections, DetectorConfig, Inputs
from casc.model.layers import Params
from casc.model.mask_head import MaskRois, pack, stage_params
from casc.model.normalise import Shared, over_ranks, over_shared
from casc.model.preprocess import ImageConfig, prepare, random_view
from casc.model.targets import Targets
from casc.ops.probe import Probe, Recorder, recorded, unwatched
from casc.ops.pyramid import Pyramid

LossStep = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""See `make_loss_step`."""
DetectStep = Callable[[Params, Params, Batch], Detections]

# A counted step runs its mask heads on the next multiple of this many RoIs, and on this many
# at least: below 16 torch would choose another convolution, and compile for it anew ...
CAPACITY_STEP, LEAST_CAPACITY = 8, 16
# ... or, without dynamic shapes, on the next of these shares of the most there can be: each
# is a compilation, so they follow the count less closely.
CAPACITY_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


def make_loss_step(
    config: DetectorConfig,
    image: ImageConfig,
    canvas: tuple[int, int],
    compute: Compute,
    together: Ranks | None = None,
    recorder: Recorder | None = None,
) -> LossStep:
    """The losses of a batch whose images fit `canvas`.

    Args:
        config: the detector.
        image: resize, flip and normalisation.
        canvas: (H, W) in pixels.
        compute: dtype, memory format, compiled or not.
        together: ranks whose number of samples losses are divided by; None takes this
            batch's own. All of them then have to call the step at once, unless it is told
            what to divide by.
        recorder: keeps what is computed on the way, and may replace the network's `inputs`,
            the `noise`, the `proposals`.

    Returns:
        f(params, buffers, batch) -> (total, measures): the scalar to differentiate, and
        detached float32 scalars on the device by name. With `together`, it also takes as
        `shared` what to divide by.
    """
    config = resolve_auto(config, compute)

    def boxes(
        params: Params, buffers: Params, batch: Batch, probe: Probe = unwatched
    ) -> tuple[dict[str, Tensor], Pyramid, list[MaskRois], Targets]:
        inputs = probe("inputs", training_inputs(batch, image, canvas, compute))
        anchors = anchor_count(config.anchors, canvas)
        noise = detector.draw_noise(config, batch.seed, anchors, batch.valid.shape[1])
        noise = probe("noise", noise)
        features = detector.extract(params, buffers, config, inputs.image, probe)
        losses, pyramid, rois = detector.box_branch(params, config, features, inputs, noise, probe)
        return losses, pyramid, rois, inputs.targets

    def apart(
        params: Params, buffers: Params, batch: Batch, probe: Probe = unwatched
    ) -> dict[str, Tensor]:
        losses, pyramid, rois, targets = boxes(params, buffers, batch, probe)
        for i, stage in enumerate(config.stages):
            loss = detector.mask_branch(params, config, i, pyramid, rois[i], targets, probe)
            losses[f"s{i}.loss_mask"] = stage.loss_weight * loss
        return losses

    def finished(
        losses: dict[str, Tensor], batch: Batch, shared: Shared | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if shared is not None:
            losses = over_shared(losses, batch.image.shape[0], shared)
        elif together is not None:
            losses = over_ranks(losses, batch.image.shape[0], together)
        return detector.total(losses), {k: v.detach() for k, v in losses.items()}

    def full(
        params: Params, buffers: Params, batch: Batch, probe: Probe = unwatched
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return finished(apart(params, buffers, batch, probe), batch)

    def compiled(function: Callable) -> Callable:
        return _maybe_compile(function, compute, config, image, canvas)

    if config.mask_head.capacity == "full" and together is None:
        return recorded(full, recorder, compiled)
    if config.mask_head.capacity == "full":
        step = recorded(apart, recorder, compiled)
        return lambda params, buffers, batch, shared=None: finished(
            step(params, buffers, batch), batch, shared
        )

    def masks(
        head: Params,
        pyramid: Pyramid,
        rois: MaskRois,
        targets: Targets,
        probe: Probe = unwatched,
    ) -> Tensor:
        return detector.mask_branch(head, config, 0, pyramid, rois, targets, probe)

    box_step = recorded(boxes, recorder, compiled)
    mask_step = recorded(
        masks, recorder, lambda function: _compile_for_any_count(function, compute, config)
    )

    def counted(
        params: Params, buffers: Params, batch: Batch, shared: Shared | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses, pyramid, rois, targets = box_step(params, buffers, batch)
        # The step's only read: everything after it has a shape that depends on it.
        counts = torch.stack([r.valid.sum() for r in rois]).tolist()
        for i, (stage, count) in enumerate(zip(config.stages, counts, strict=True)):
            slots = rois[i].valid.shape[0]
            packed = pack(rois[i], mask_capacity(count, slots, compute.dynamic_rois))
            if _marks(compute) and slots > LEAST_CAPACITY:
                for value in packed:
                    torch._dynamo.mark_dynamic(value, 0)
            loss = mask_step(stage_params(params, i), pyramid, packed, targets)
            losses[f"s{i}.loss_mask"] = stage.loss_weight * loss
        return finished(losses, batch, shared)

    return counted


def make_detect_step(
    config: DetectorConfig,
    image: ImageConfig,
    canvas: tuple[int, int],
    compute: Compute,
    recorder: Recorder | None = None,
) -> DetectStep:
    """Detections of a batch whose images fit `canvas`; one graph, no gradient.

    Arguments are as for `make_loss_step`.

    Returns:
        f(params, buffers, batch) -> Detections in pixels of the stored images.
    """
    config = resolve_auto(config, compute)

    def run(params: Params, buffers: Params, batch: Batch, probe: Probe = unwatched) -> Detections:
        inputs = prepare(batch, None, image, canvas, compute.dtype, compute.memory_format)
        return detector.detect(params, buffers, config, probe("inputs", inputs), probe)

    step = recorded(
        run, recorder, lambda function: _maybe_compile(function, compute, config, image, canvas)
    )

    def detect(params: Params, buffers: Params, batch: Batch) -> Detections:
        with torch.no_grad():
            return step(params, buffers, batch)

    return detect


def training_inputs(
    batch: Batch, image: ImageConfig, canvas: tuple[int, int], compute: Compute
) -> Inputs:
    """What the network sees when training: the batch on its canvas, seen as its noise says."""
    view = random_view(batch.size, batch.seed, image, canvas)
    return prepare(batch, view, image, canvas, compute.dtype, compute.memory_format)


def mask_capacity(count: int, slots: int, dynamic: bool) -> int:
    """How many RoIs to run on when `count` of at most `slots` are needed."""
    if dynamic:
        return min(slots, max(LEAST_CAPACITY, -(-count // CAPACITY_STEP) * CAPACITY_STEP))
    ladder = (max(1, round(share * slots)) for share in CAPACITY_SHARES)
    return next(capacity for capacity in ladder if capacity >= count)


def anchor_count(anchors: AnchorConfig, canvas: tuple[int, int]) -> int:
    """Anchors of all levels of a canvas."""
    height, width = canvas
    cells = 0
    for stride in anchors.strides:
        cells += -(-height // stride) * -(-width // stride)
    return cells * len(anchors.ratios)


def to_format(params: Params, memory_format: torch.memory_format) -> Params:
    """Copies of the parameters with 4-d weights in `memory_format`, other ones as they are."""
    return {
        k: v.contiguous(memory_format=memory_format) if v.dim() == 4 else v
        for k, v in params.items()
    }


def resolve_auto(config: DetectorConfig, compute: Compute) -> DetectorConfig:
    """The config with what "auto" stands for on this device in its place."""
    if config.roi_kernel == "auto":
        config = replace(config, roi_kernel=compute.roi_kernel)
    if config.rpn.nms_kernel == "auto":
        config = replace(config, rpn=replace(config.rpn, nms_kernel=compute.nms_kernel))
    if config.inference.nms_kernel == "auto":
        inference = replace(config.inference, nms_kernel=compute.nms_kernel)
        config = replace(config, inference=inference)
    return config


def _maybe_compile(function: Callable, compute: Compute, *closed_over: Any) -> Callable:
    if not compute.compile:
        return function
    if compute.programs:
        return aot_cached(function, compute.programs, *closed_over, compute._replace(programs=None))
    # torch counts the graphs of all canvases together and gives up after 8, unless told.
    return torch.compile(  # type: ignore[call-overload]  # its stubs lack the last one
        function,
        backend=compute.backend,
        fullgraph=True,
        dynamic=False,
        isolate_recompiles=True,
    )


def _compile_for_any_count(function: Callable, compute: Compute, *closed_over: Any) -> Callable:
    """Compile a function whose number of RoIs differs from call to call."""
    if not compute.compile:
        return function
    graphs = 1 if compute.dynamic_rois else len(CAPACITY_SHARES)
    if compute.programs:
        settings = *closed_over, compute._replace(programs=None)
        rows = (lambda head, pyramid, rois, targets: rois) if compute.dynamic_rois else None
        return aot_cached(function, compute.programs, *settings, rows=rows, recompile_limit=graphs)
    return torch.compile(  # type: ignore[call-overload]
        function,
        backend=compute.backend,
        fullgraph=True,
        dynamic=None if compute.dynamic_rois else False,
        isolate_recompiles=True,
        recompile_limit=graphs,
    )


def _marks(compute: Compute) -> bool:
    """Whether the caller marks what is dynamic; `aot_cached` does so itself."""
    return compute.compile and compute.dynamic_rois and not compute.programs
