"""How many operations a training step is: of convolutions and matrix products, counted by torch.

Nothing is computed: the functions run on tensors without content.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from casc.bench.batch import Load, made_up_batch
from casc.data.batch import Batch
from casc.device.compute import Compute
from casc.model import detector, forward_train
from casc.model.box_head import box_head
from casc.model.detector import Features
from casc.model.detector_config import DetectorConfig, mask_stages
from casc.model.layers import Params
from casc.model.losses import join, mean_losses
from casc.model.mask_head import MaskRois, mask_head
from casc.model.preprocess import ImageConfig
from casc.model.rpn import rpn_head
from casc.model.steps import anchor_count, mask_capacity, training_inputs
from casc.ops.roi_align import roi_align

# One that every operator counts in; the number of operations doesn't depend on it.
COMPUTE = Compute(torch.bfloat16, torch.channels_last, compile=False)


def reference_step(config: DetectorConfig, load: Load, positives: Sequence[int]) -> int:
    """Operations of a step as the reference does it, without padding.

    The RPN is differentiated everywhere, mask logits are computed for every class, and mask
    heads run on the positives alone.

    Args:
        config: the detector.
        load: canvas and batch.
        positives: of each stage, over the whole batch.
    """

    def step(params: Params, buffers: Params, batch: Batch) -> Tensor:
        features = _features(params, buffers, config, batch, load)
        output = rpn_head(params, config.rpn, features.levels)
        results = [output.logits, output.deltas]
        rois = load.batch * config.box_head.samples
        for i, count in enumerate(positives):
            aligned = _aligned(features, config, rois, config.box_head.cells)
            results += box_head(params, config.box_head, i, aligned)
            if count and i < mask_stages(config):
                aligned = _aligned(features, config, count, config.mask_head.cells)
                results.append(mask_head(params, config.mask_head, i, aligned, None))
        return torch.stack([r.sum() for r in results]).sum()

    return _count(config, load, step)


def own_step(config: DetectorConfig, load: Load, positives: Sequence[int]) -> int:
    """Operations of a step as casc does it, padding included. Arguments as above."""
    canvas, image = load.canvas, _image(load)

    def step(params: Params, buffers: Params, batch: Batch) -> Tensor:
        inputs = training_inputs(batch, image, canvas, COMPUTE)
        count = anchor_count(config.anchors, canvas)
        noise = forward_train.draw_noise(config, batch.seed, count, inputs.targets.valid.shape[1])
        features = detector.extract(params, buffers, config, inputs.image, drop=noise.drop)
        found, pyramid, rois = forward_train.box_branch(params, config, features, inputs, noise)
        for i, positive in enumerate(positives[: len(rois)]):
            slots = rois[i].valid.shape[0]
            if config.mask_head.capacity != "full":
                slots = mask_capacity(positive, slots, COMPUTE.dynamic_rois)
            packed = MaskRois(*(t[:slots] for t in rois[i]))
            made = forward_train.mask_branch(
                params, config, (i,), pyramid, [packed], inputs.targets
            )
            found = join(found, forward_train.weighted_mask_losses(config, (i,), made))
        return mean_losses(found)[0]

    return _count(config, load, step)


def _features(
    params: Params, buffers: Params, config: DetectorConfig, batch: Batch, load: Load
) -> Features:
    inputs = training_inputs(batch, _image(load), load.canvas, COMPUTE)
    return detector.extract(params, buffers, config, inputs.image)


def _aligned(features: Features, config: DetectorConfig, rois: int, cells: int) -> Tensor:
    pixels = features.pyramid.pixels
    boxes = torch.zeros((rois, 4), device=pixels.device)
    image = torch.zeros(rois, dtype=torch.long, device=pixels.device)
    return roi_align(features.pyramid, boxes, image, cells, config.roi_align)


def _image(load: Load) -> ImageConfig:
    return ImageConfig(short=min(load.canvas), long=max(load.canvas))


def _product(rows: Sequence[int], matrix: Sequence[int]) -> int:
    return 2 * rows[0] * matrix[0] * matrix[1]


def _count(
    config: DetectorConfig, load: Load, step: Callable[[Params, Params, Batch], Tensor]
) -> int:
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    batch = made_up_batch(load, config.classes)
    names = detector.trainable(config, params)
    with FakeTensorMode() as mode:
        empty: list[Params] = [
            {k: mode.from_tensor(v) for k, v in tensors.items()} for tensors in (params, buffers)
        ]
        params, buffers = empty
        for name in names:
            params[name].requires_grad_()
        batch = Batch(*(None if t is None else mode.from_tensor(t) for t in batch))  # type: ignore[arg-type]
        operators = torch.ops.casc
        # torch doesn't look into operators that aren't its own: here are the shapes they get.
        products: dict[Any, Any] = {
            operators.roi_linear: lambda *shapes, out_shape: _product(out_shape, shapes[3]),
            operators.roi_linear_pixels: lambda *shapes, **_: _product(shapes[1], shapes[4]),
            operators.roi_linear_matrix: lambda grad, *_, out_shape: _product(grad, out_shape),
        }
        counter = FlopCounterMode(display=False, custom_mapping=products)
        with counter:
            step(params, buffers, batch).backward()
    return counter.get_total_flops()
