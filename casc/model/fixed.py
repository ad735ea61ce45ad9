"""What is the same in every step on a canvas: made once, and given to each.

A compiler would make it again in every step, and an eager device launch it.

Legend: A anchors, G ground-truth capacity.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from casc.model import noise as noises
from casc.model.anchors import grid_anchors
from casc.model.backbone import drop_places
from casc.model.box_head import StageNumbers, stage_numbers
from casc.model.detector_config import ROI_LEVELS, DetectorConfig
from casc.model.rpn import CandidateSlots, candidate_slots, patch_side
from casc.ops.pyramid import Neighbours, neighbours


class Fixed(NamedTuple):
    """Tensors that don't depend on the batch."""

    anchors: Tensor
    """[A, 4], of all levels."""
    slots: CandidateSlots
    """Of the boxes that enter the proposals' suppression."""
    neighbours: Neighbours | None = None
    """Of every cell that anchors lie on; this and the following for training only."""
    draws: noises.Draws | None = None
    """Of the noise."""
    numbers: StageNumbers | None = None
    """Of the stages."""


def make_fixed(
    config: DetectorConfig,
    sizes: list[tuple[int, int]],
    device: torch.device,
    capacity: int | None = None,
) -> Fixed:
    """What is the same in every step on a canvas.

    Args:
        config: the detector.
        sizes: height and width of each level, in cells.
        device: where to make it.
        capacity: G when training; None for detection.
    """
    anchors = torch.cat(grid_anchors(config.anchors, sizes, device))
    lengths = [height * width * len(config.anchors.ratios) for height, width in sizes]
    slots = candidate_slots(config.rpn, lengths, device, train=capacity is not None)
    if capacity is None:
        return Fixed(anchors, slots)
    cells = torch.arange(sum(height * width for height, width in sizes), device=device)
    return Fixed(
        anchors,
        slots,
        neighbours(sizes[:ROI_LEVELS], sizes, cells, patch_side(config.rpn)),
        noises.make_draws(noise_counts(config, len(anchors), capacity), device),
        stage_numbers(config.stages, device),
    )


def noise_counts(config: DetectorConfig, anchors: int, capacity: int) -> dict[int, int]:
    """How many random numbers an image's training step takes for each purpose.

    Args:
        config: how many each part needs.
        anchors: A, of all levels.
        capacity: G.
    """
    boxes = [config.rpn.train_proposals] + [config.box_head.samples] * (len(config.stages) - 1)
    stages = {noises.STAGE + i: capacity + count for i, count in enumerate(boxes)}
    places = drop_places(config.backbone)
    drops = {noises.DROP_PATH: places} if places else {}
    return {noises.RPN: anchors} | stages | drops | {noises.FLIP: 1}
