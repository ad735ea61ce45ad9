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
from casc.device.devices import traits
from casc.device.versions import compile_apart
from casc.model import detector, forward_detect, forward_train
from casc.model.anchors import AnchorConfig
from casc.model.detector import Inputs
from casc.model.detector_config import DetectorConfig, mask_stages, scores_masks
from casc.model.fixed import Fixed, make_fixed
from casc.model.forward_detect import Detections
from casc.model.forward_train import Noise
from casc.model.layers import Params
from casc.model.losses import LossSums, join
from casc.model.mask_head import MaskRois, pack, stage_params
from casc.model.preprocess import ImageConfig, prepare, random_view
from casc.model.targets import Targets
from casc.ops.probe import Probe, Recorder, recorded, unwatched
from casc.ops.pyramid import Pyramid
from casc.ops.roi_align import is_native

LossStep = Callable[[Params, Params, Batch], LossSums]
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
    recorder: Recorder | None = None,
) -> LossStep:
    """The losses of a batch whose images fit `canvas`.

    Args:
        config: the detector.
        image: resize, flip and normalisation.
        canvas: (H, W) in pixels.
        compute: dtype, memory format, compiled or not.
        recorder: keeps what is computed on the way, and may replace the network's `inputs`,
            the `noise`, the `proposals`.

    Returns:
        f(params, buffers, batch) -> LossSums, which `mean_losses` divides.
    """
    config = resolve_auto(config, compute)
    if scores_masks(config) and config.mask_head.capacity == "counted":
        raise ValueError("masks are scored in one graph: the mask heads' capacity must be full")

    def losses(
        params: Params, buffers: Params, batch: Batch, fixed: Fixed, probe: Probe = unwatched
    ) -> LossSums:
        inputs, noise = _step_inputs(batch, config, image, canvas, compute, fixed, probe)
        return forward_train.losses(params, buffers, config, inputs, noise, probe, fixed)

    if not mask_stages(config) or config.mask_head.capacity == "full":
        step = recorded(
            losses, recorder, lambda f: _maybe_compile(f, compute, config, image, canvas)
        )
        return _with_fixed(step, config, image, canvas)
    return _counted_step(config, image, canvas, compute, recorder)


def _counted_step(
    config: DetectorConfig,
    image: ImageConfig,
    canvas: tuple[int, int],
    compute: Compute,
    recorder: Recorder | None,
) -> LossStep:
    """Two graphs: all losses but the masks', then these, on as many RoIs as there are."""

    def boxes(
        params: Params, buffers: Params, batch: Batch, fixed: Fixed, probe: Probe = unwatched
    ) -> tuple[LossSums, Pyramid, list[MaskRois], Targets]:
        inputs, noise = _step_inputs(batch, config, image, canvas, compute, fixed, probe)
        params = detector.cast_heads(params, inputs.image, masks=False)
        features = detector.extract(params, buffers, config, inputs.image, probe, noise.drop)
        found, pyramid, rois = forward_train.box_branch(
            params, config, features, inputs, noise, probe, fixed
        )
        return found, pyramid, rois, inputs.targets

    def masks(
        head: Params,
        pyramid: Pyramid,
        rois: MaskRois,
        targets: Targets,
        probe: Probe = unwatched,
    ) -> tuple[Tensor, Tensor]:
        (loss,) = forward_train.mask_branch(head, config, (0,), pyramid, [rois], targets, probe)
        return loss

    box_step = _with_fixed(
        recorded(boxes, recorder, lambda f: _maybe_compile(f, compute, config, image, canvas)),
        config,
        image,
        canvas,
    )
    mask_step = recorded(masks, recorder, lambda f: _compile_for_any_count(f, compute, config))

    def step(params: Params, buffers: Params, batch: Batch) -> LossSums:
        found, pyramid, rois, targets = box_step(params, buffers, batch)
        for i, count in enumerate(read_counts(rois)):
            slots = rois[i].valid.shape[0]
            packed = pack(rois[i], mask_capacity(count, slots, compute.dynamic_rois))
            if _marks(compute) and slots > LEAST_CAPACITY:
                for value in packed:
                    torch._dynamo.mark_dynamic(value, 0)
            loss = mask_step(stage_params(params, i), pyramid, packed, targets)
            found = join(found, forward_train.weighted_mask_losses(config, (i,), [loss]))
        return found

    return step


def read_counts(rois: list[MaskRois]) -> list[int]:
    """How many RoIs each stage has: the step's only read, as what follows has shapes by it."""
    return torch.stack([stage.valid.sum() for stage in rois]).tolist()


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

    def run(
        params: Params, buffers: Params, batch: Batch, fixed: Fixed, probe: Probe = unwatched
    ) -> Detections:
        inputs = prepare(batch, None, image, canvas, compute.dtype, compute.memory_format)
        return forward_detect.detect(params, buffers, config, probe("inputs", inputs), probe, fixed)

    step = _with_fixed(
        recorded(run, recorder, lambda f: _maybe_compile(f, compute, config, image, canvas)),
        config,
        None,
        canvas,
    )

    def detect(params: Params, buffers: Params, batch: Batch) -> Detections:
        with torch.no_grad():
            return step(params, buffers, batch)

    return detect


def training_inputs(
    batch: Batch,
    image: ImageConfig,
    canvas: tuple[int, int],
    compute: Compute,
    flip: Tensor | None = None,
) -> Inputs:
    """What the network sees when training: the batch on its canvas, seen as its noise says.

    `flip` is as for `random_view`.
    """
    view = random_view(batch.size, batch.seed, image, canvas, flip)
    return prepare(batch, view, image, canvas, compute.dtype, compute.memory_format)


def _step_inputs(
    batch: Batch,
    config: DetectorConfig,
    image: ImageConfig,
    canvas: tuple[int, int],
    compute: Compute,
    fixed: Fixed,
    probe: Probe,
) -> tuple[Inputs, Noise]:
    """All that a training step's losses depend on beside the weights."""
    noise = forward_train.draw_noise(
        config, batch.seed, len(fixed.anchors), _capacity(batch, image), fixed.draws
    )
    inputs = training_inputs(batch, image, canvas, compute, noise.flip)
    return probe("inputs", inputs), probe("noise", noise)


def _capacity(batch: Batch, image: ImageConfig) -> int:
    """G of what the network sees: pasted objects come on top."""
    return batch.valid.shape[1] * (2 if image.copy_paste else 1)


def mask_capacity(count: int, slots: int, dynamic: bool) -> int:
    """How many RoIs to run on when `count` of at most `slots` are needed."""
    if dynamic:
        return min(slots, max(LEAST_CAPACITY, -(-count // CAPACITY_STEP) * CAPACITY_STEP))
    ladder = (max(1, round(share * slots)) for share in CAPACITY_SHARES)
    return next(capacity for capacity in ladder if capacity >= count)


def anchor_count(anchors: AnchorConfig, canvas: tuple[int, int]) -> int:
    """Anchors of all levels of a canvas."""
    return sum(h * w for h, w in _level_sizes(anchors, canvas)) * len(anchors.ratios)


def _level_sizes(anchors: AnchorConfig, canvas: tuple[int, int]) -> list[tuple[int, int]]:
    height, width = canvas
    return [(-(-height // stride), -(-width // stride)) for stride in anchors.strides]


def _with_fixed(
    step: Callable, config: DetectorConfig, image: ImageConfig | None, canvas: tuple[int, int]
) -> Callable:
    """f(params, buffers, batch) of a step that takes what is fixed on a canvas too: made once.

    `image` is what training images are made by; None for detection.
    """
    made: dict[tuple[torch.device, int | None], Fixed] = {}

    def call(params: Params, buffers: Params, batch: Batch) -> Any:
        key = batch.size.device, None if image is None else _capacity(batch, image)
        if key not in made:
            made[key] = make_fixed(config, _level_sizes(config.anchors, canvas), *key)
        return step(params, buffers, batch, made[key])

    return call


def reads_back(
    config: DetectorConfig, compute: Compute, device: torch.device, *, training: bool = True
) -> str | None:
    """What of a step the host must wait for, in a few words; None if nothing.

    Args:
        config: the detector.
        compute: of the step.
        device: where it runs.
        training: the training step's losses; else detection.
    """
    config = resolve_auto(config, compute)
    masks = mask_stages(config) > 0
    if training and masks and config.mask_head.capacity == "counted":
        return "mask heads run on a counted number of RoIs; --model.mask-head.capacity full doesn't"
    suppression = config.rpn.nms_kernel, config.inference.nms_kernel
    if "greedy" in (suppression[:1] if training else suppression):
        return "suppression by the greedy kernel reads how many boxes survive"
    if traits(device).select_rois:
        if is_native(config.roi_align, config.roi_kernel):
            return f"{traits(device).roi_align}'s RoIAlign reads how many RoIs a level has"
        if training and masks and config.mask_head.target == "bitmap":
            return "mask targets from bitmaps read which objects are asked for"
    return None


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
    if config.mask_head.capacity == "auto":
        capacity = "full" if config.mask_head.scoring else compute.mask_capacity
        config = replace(config, mask_head=replace(config.mask_head, capacity=capacity))
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
        settings = *closed_over, compute._replace(programs=None)
        return aot_cached(function, compute.programs, *settings, options=compute.options)
    # torch counts the graphs of all canvases together and gives up after 8, unless told.
    return compile_apart(function, backend=compute.backend, options=compute.options)


def _compile_for_any_count(function: Callable, compute: Compute, *closed_over: Any) -> Callable:
    """Compile a function whose number of RoIs differs from call to call."""
    if not compute.compile:
        return function
    graphs = 1 if compute.dynamic_rois else len(CAPACITY_SHARES)
    if compute.programs:
        settings = *closed_over, compute._replace(programs=None)
        rows = (lambda head, pyramid, rois, targets: rois) if compute.dynamic_rois else None
        return aot_cached(
            function,
            compute.programs,
            *settings,
            rows=rows,
            recompile_limit=graphs,
            options=compute.options,
        )
    return compile_apart(
        function,
        backend=compute.backend,
        dynamic=None if compute.dynamic_rois else False,
        recompile_limit=graphs,
        options=compute.options,
    )


def _marks(compute: Compute) -> bool:
    """Whether the caller marks what is dynamic; `aot_cached` does so itself."""
    return compute.compile and compute.dynamic_rois and not compute.programs
