"""Regions to ignore: what they cover is neither an object nor background."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from casc.device.compute import Compute
from casc.model import detector
from casc.model.anchors import AnchorConfig, grid_anchors
from casc.model.box_head import BoxHeadConfig, sample_rois
from casc.model.detector_config import STAGES
from casc.model.losses import mean_losses
from casc.model.matching import IGNORED_SHARE, covered, match_anchors, match_rois
from casc.model.preprocess import ImageConfig, View, plain_view, prepare
from casc.model.rpn import RPNConfig, rpn_targets
from casc.model.steps import make_loss_step
from casc.model.targets import Targets


def boxes_of(rng, *shape, most=100):
    """Random boxes in whole pixels, some of them without area."""
    corner = rng.integers(0, most, (*shape, 2))
    return np.concatenate([corner, corner + rng.integers(0, 60, (*shape, 2))], -1).astype(
        np.float32
    )


def share_inside(boxes: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """pycocotools' overlap of each box with each region, taken for a crowd: [n, r]."""
    mine, theirs = (
        np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], 1).astype(np.float64)
        for b in (boxes, regions)
    )
    found = coco_mask.iou(mine, theirs, [1] * len(regions))  # type: ignore[arg-type]
    return np.asarray(found)


def test_a_region_covers_by_pycocotools_overlap_with_a_crowd(mode):
    rng = np.random.default_rng(0)
    run = mode(covered)
    # Regions of no area, as padding is, cover nothing; a region repeated changes nothing.
    regions = boxes_of(rng, 3, 7)
    regions[0], regions[1, 3:], regions[2, 4] = 0, 0, regions[2, 3]
    for boxes in (boxes_of(rng, 3, 200), boxes_of(rng, 200)):
        found = run(torch.from_numpy(boxes), torch.from_numpy(regions)).numpy()
        assert found.shape == (3, 200)
        for i in range(3):
            mine = boxes[i] if boxes.ndim == 3 else boxes
            real = (mine[:, 2:] > mine[:, :2]).all(axis=1)
            share = share_inside(mine[real], regions[i]).max(axis=1)
            clear = np.abs(share - IGNORED_SHARE) > 1e-6
            assert np.array_equal(found[i, real][clear], (share > IGNORED_SHARE)[clear])
            assert not found[i, ~real].any()
        assert not found[0].any()
        assert 0 < found[1:].mean() < 1


SIZES = [(24, 32), (12, 16), (6, 8)]
SIZE = torch.tensor([[96.0, 128.0], [80.0, 100.0]])
GT = torch.tensor([[[10.0, 10, 80, 70], [60, 20, 120, 90]], [[20, 5, 70, 75], [0, 0, 0, 0]]])
VALID = torch.tensor([[True, True], [True, False]])
REGIONS = torch.tensor([[[50.0, 0, 128, 96], [0, 0, 0, 0]], [[0, 0, 30, 80], [60, 60, 100, 80]]])


def kept(boxes, regions):
    """Which boxes [n, 4] none of the regions [r, 4] covers, one by one."""
    share = share_inside(boxes.numpy(), regions.numpy())
    return torch.from_numpy((share <= IGNORED_SHARE).all(axis=1))


def test_covered_anchors_are_neither(mode):
    config = RPNConfig(samples=10_000)
    anchors = torch.cat(
        grid_anchors(AnchorConfig(strides=(4, 8, 16), scale=4), SIZES, torch.device("cpu"))
    )
    keys = torch.rand(2, len(anchors), generator=torch.Generator().manual_seed(0))
    run = mode(rpn_targets)
    without = rpn_targets(config, anchors, SIZE, GT, VALID, keys).matches
    found = run(config, anchors, SIZE, GT, VALID, keys, regions=REGIONS)
    positive, negative = found.matches.positive, found.matches.negative
    for i in range(2):
        free = kept(anchors, REGIONS[i])
        inside = (anchors >= 0).all(1) & (anchors[:, 2:] < SIZE[i].flip(0)).all(1)
        assert 0 < free[inside].sum() < inside.sum()
        # As if the covered anchors didn't exist: objects claim their best among the others.
        alone = match_anchors(
            anchors[free], inside[free][None], GT[i : i + 1], VALID[i : i + 1],
            positive_iou=config.positive_iou, negative_iou=config.negative_iou,
            low_quality_iou=config.low_quality_iou,
        )  # fmt: skip
        assert torch.equal(positive[i, free], alone.positive[0])
        assert torch.equal(negative[i, free], alone.negative[0])
        assert not (positive | negative)[i, ~free].any()
        assert (without.negative[i] & ~free).any()
        drawn = found.sample.indices[i, found.sample.valid[i]]
        assert free[drawn].all()
        assert len(drawn) == int((positive | negative)[i].sum())


@pytest.mark.parametrize(
    # Stages differ by constants.
    ("mode", "stage"),
    [("eager", 0), ("eager", 2), ("compiled", 2)],
    indirect=["mode"],
)
def test_covered_proposals_are_neither_and_objects_always_are(mode, stage: int):
    rng = np.random.default_rng(1)
    proposals = torch.from_numpy(boxes_of(rng, 2, 60)).clamp(max=90)
    proposals[:, :20] = GT[:, :1] + torch.from_numpy(rng.normal(0, 2, (2, 20, 4))).float()
    valid = (proposals[..., 2:] > proposals[..., :2]).all(dim=-1)
    edges, gt = torch.zeros(2, 1, 4), torch.zeros(2, 1, dtype=torch.long)
    labels = torch.tensor([[1, 0], [2, 0]])
    targets = Targets(GT, labels, VALID, edges, gt, regions=REGIONS)
    config = BoxHeadConfig(samples=200)
    keys = torch.rand(2, 62, generator=torch.Generator().manual_seed(3))
    found = mode(sample_rois)(config, STAGES[stage], 3, proposals, valid, targets, keys)
    for i in range(2):
        index = found.indices[i, found.valid[i]]
        free = kept(proposals[i], REGIONS[i])
        expected = match_rois(
            proposals[i : i + 1], (valid[i] & free)[None], GT[i : i + 1], VALID[i : i + 1],
            iou=STAGES[stage].iou,
        )  # fmt: skip
        mine = index[index >= 2] - 2
        assert free[mine].all()
        assert sorted(mine.tolist()) == torch.nonzero(valid[i] & free)[:, 0].tolist()
        chosen = found.positive[i, found.valid[i]][index >= 2]
        assert torch.equal(chosen, expected.positive[0, mine])
        # The objects themselves are there, however much of them a region covers.
        assert int(found.from_gt[i].sum()) == int(VALID[i].sum())
        assert (valid[i] & ~free).any()


@pytest.mark.parametrize("flip", [[False, True], [True, False]])
@pytest.mark.parametrize(
    # What a window adds is in the one graph.
    ("mode", "window"),
    [("eager", False), ("eager", True), ("compiled", True)],
    indirect=["mode"],
)
def test_regions_move_as_boxes_do(mode, tiny_batch, window: bool, flip: list[bool]):
    batch = tiny_batch([2, 3])
    # Objects without an outline: of these too the box is all that can be cut.
    batch = batch._replace(edges=torch.zeros_like(batch.edges), regions=batch.boxes)
    config, canvas = ImageConfig(short=96, long=128), (96, 128)
    view = plain_view(batch.size, config)._replace(flip=torch.tensor(flip))
    if window:
        size = 2 * view.size
        view = View(size, torch.tensor([[30, 50], [11, 5]]), view.flip)
    found = mode(prepare)(batch, view, config, canvas, torch.float32).targets
    assert found.regions is not None
    assert torch.equal(found.regions[found.valid], found.boxes[found.valid])
    rest = found.regions[~found.valid]
    assert ((rest[:, 2] - rest[:, 0]) * (rest[:, 3] - rest[:, 1])).abs().max() < 0.01 * 128
    assert found.boxes[found.valid].max() > 60


def test_nothing_to_ignore_changes_no_bit_and_all_to_ignore_leaves_objects(tiny, tiny_batch):
    config, image, canvas = tiny
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    batch = tiny_batch([2, 3])
    compute = Compute(dtype=torch.float32, compile=False)

    def step(config, batch):
        found = make_loss_step(config, image, canvas, compute)(params, buffers, batch)
        return mean_losses(found)

    total, measures = step(config, batch)
    ignoring = replace(config, ignore="crowds")
    padded, same = step(ignoring, batch._replace(regions=torch.zeros(2, 3, 4)))
    assert torch.equal(total, padded)
    assert measures.keys() == same.keys()
    assert all(torch.equal(value, same[name]) for name, value in measures.items())
    everywhere = torch.tensor([0.0, 0, 96, 72]).expand(2, 1, 4)
    _, found = step(ignoring, batch._replace(regions=everywhere))
    assert found["rpn.positives"] == 0
    assert [float(found[f"s{i}.samples"]) for i in range(3)] == [2.5] * 3
