"""Masks' own scores: the head against torch's layers, its goal against pixels that are counted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from casc.device.compute import Compute
from casc.model import detector, forward_detect, forward_train
from casc.model import mask_scoring as scoring
from casc.model.mask_head import MaskHeadConfig, MaskRois
from casc.model.steps import anchor_count, make_loss_step, resolve_auto, training_inputs
from casc.model.targets import Targets
from casc.ops.roi_align import roi_align

EAGER = Compute(compile=False)
CONFIG = MaskHeadConfig(cells=6, channels=4, scoring=True)
CLASSES, IN = 3, 5
SIDE = 12
"""Cells of a mask."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_params() -> dict[str, Tensor]:
    params: dict[str, Tensor] = {}
    scoring.init_mask_iou_head(CONFIG, CLASSES, IN, params, torch.Generator().manual_seed(0))
    return {k: v + 0.1 * randn(*v.shape, seed=1) for k, v in params.items()}


def constant(params: dict[str, Tensor], values: list[float]) -> dict[str, Tensor]:
    """The parameters of a head that tells the same of every mask of a class."""
    last = f"{scoring.PREFIX}.fc_mask_iou"
    weight = torch.zeros_like(params[f"{last}.weight"])
    return params | {f"{last}.weight": weight, f"{last}.bias": torch.tensor(values)}


def test_the_head_is_the_papers(mode):
    """Four convolutions of the features and the pooled mask, the last of stride 2, three layers."""
    net = nn.Sequential()
    channels = IN + 1
    for i in range(4):
        net.add_module(f"convs.{i}".replace(".", "_"), nn.Conv2d(channels, 4, 3, 1 + (i == 3), 1))
        net.append(nn.ReLU())
        channels = 4
    net.append(nn.Flatten())
    for i, width in enumerate((4 * 3 * 3, 16)):
        net.add_module(f"fcs_{i}", nn.Linear(width, 16))
        net.append(nn.ReLU())
    net.add_module("fc_mask_iou", nn.Linear(16, CLASSES))
    params = {k: v.requires_grad_() for k, v in make_params().items()}
    state = {k.removeprefix(f"{scoring.PREFIX}."): v.detach() for k, v in params.items()}
    net.load_state_dict(
        {k.replace("convs.", "convs_").replace("fcs.", "fcs_"): v for k, v in state.items()}
    )
    features, labels = randn(7, IN, 6, 6, seed=2), torch.tensor([0, 2, 2, 1, 1, 0, 2])
    masks = randn(7, SIDE, SIDE, seed=3).sigmoid().requires_grad_()
    theirs = masks.detach().clone().requires_grad_()
    pooled = nn.functional.max_pool2d(theirs[:, None], 2)
    right = net(torch.cat([features, pooled], 1))[torch.arange(7), labels]
    made = mode(scoring.mask_iou_head)(params, features, masks, labels)
    torch.testing.assert_close(made, right, rtol=1e-4, atol=1e-5)

    weight = randn(7, seed=4)
    (made * weight).sum().backward()
    (right * weight).sum().backward()
    torch.testing.assert_close(masks.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    for name, value in net.named_parameters():
        name = name.replace("convs_", "convs.").replace("fcs_", "fcs.")
        grad = params[f"{scoring.PREFIX}.{name}"].grad
        torch.testing.assert_close(grad, value.grad, rtol=1e-4, atol=1e-5)


def rectangles(*corners: tuple[int, int, int, int]) -> Targets:
    """An image with an object of each."""
    boxes = torch.tensor([corners]).float()
    x0, y0, x1, y1 = boxes[0].T
    sides = [(x0, y0, x1, y0), (x1, y0, x1, y1), (x1, y1, x0, y1), (x0, y1, x0, y0)]
    edges = torch.stack([torch.stack(side, dim=-1) for side in sides], dim=1).flatten(0, 1)
    owner = torch.arange(len(corners)).repeat_interleave(4)
    return Targets(
        boxes=boxes,
        labels=torch.zeros(1, len(corners), dtype=torch.long),
        valid=torch.ones(1, len(corners), dtype=torch.bool),
        edges=edges[None],
        edge_gt=owner[None],
    )


def test_the_goal_is_the_iou_with_the_whole_object(mode, tiny):
    """Pixels counted one by one, where a cell is a pixel; the last RoI isn't valid."""
    objects = [(2, 3, 14, 9), (10, 10, 34, 46), (0, 0, 6, 6)]
    corners = [(0, 0), (20, 30), (1, 2), (8, 4), (0, 0)]
    own, labels = [0, 1, 2, 0, 1], [0, 1, 2, 1, 2]
    logits = randn(5, SIDE, SIDE, seed=5)
    logits[2] = -1.0  # nothing is left of a mask, so its score isn't learnt
    told, squares = [0.3, 0.6, 0.9], []
    for row in range(4):
        canvas, mask = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
        x0, y0, x1, y1 = objects[own[row]]
        canvas[y0:y1, x0:x1] = True
        x, y = corners[row]
        mask[y : y + SIDE, x : x + SIDE] = logits[row] > 0
        iou = (canvas & mask).sum() / (canvas | mask).sum()
        assert (iou > 0) == (row != 2)
        if iou:
            squares.append((told[labels[row]] - iou) ** 2)

    config = replace(tiny[0], classes=CLASSES, mask_head=CONFIG)
    lefts = torch.tensor(corners).float()
    rois = MaskRois(
        boxes=torch.cat([lefts, lefts + SIDE], dim=1),
        image=torch.zeros(5, dtype=torch.long),
        gt=torch.tensor(own),
        labels=torch.tensor(labels),
        valid=torch.tensor([True, True, True, True, False]),
    )
    targets = rectangles(*objects)
    goals = forward_train.mask_targets(config.mask_head, rois, targets)
    params = constant(make_params(), told)
    features = randn(5, IN, 6, 6, seed=6)

    def run(params, features, logits, goals, rois, targets):
        return forward_train.scoring_loss(params, config, features, logits, goals, rois, targets)

    total, count = mode(run)(params, features, logits, goals, rois, targets)
    assert count == len(squares) == 3
    assert total.item() == pytest.approx(0.5 * sum(squares), rel=1e-5)


def test_parts_that_overlap_count_once():
    """Of two parts of an object, the outlines' areas would make more than there is."""
    targets = rectangles((0, 0, 12, 12), (0, 0, 12, 12))
    twice = targets._replace(edge_gt=torch.zeros_like(targets.edge_gt))
    config = replace(detector.DetectorConfig(), classes=CLASSES, mask_head=CONFIG)
    rois = MaskRois(
        boxes=torch.tensor([[0.0, 0, 12, 6]]),
        image=torch.zeros(1, dtype=torch.long),
        gt=torch.zeros(1, dtype=torch.long),
        labels=torch.zeros(1, dtype=torch.long),
        valid=torch.ones(1, dtype=torch.bool),
    )
    goals = forward_train.mask_targets(CONFIG, rois, twice)
    logits = torch.ones(1, SIDE, SIDE)
    params, features = constant(make_params(), [0.0] * 3), randn(1, IN, 6, 6)
    total, _ = forward_train.scoring_loss(params, config, features, logits, goals, rois, twice)
    assert total.item() == pytest.approx(0.5 * 0.5**2)  # half of the object is in the RoI


@pytest.mark.parametrize(
    ("stages", "backend"),
    # The heads' own tests generate code; here it is enough that one graph holds all.
    [("every", None), ("first", None), ("every", "aot_eager")],
)
def test_a_masks_score_is_its_boxs_times_what_the_head_tells(tiny, tiny_batch, stages, backend):
    config, image, canvas = tiny
    config = replace(config, mask_head=replace(config.mask_head, scoring=True, stages=stages))
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    told = torch.linspace(-0.2, 1.3, config.classes)  # kept within 0 and 1
    params = constant(params, told.tolist())
    inputs = training_inputs(tiny_batch([3, 0, 2]), image, canvas, EAGER)
    plain = replace(config, mask_head=replace(config.mask_head, scoring=False))

    def run(params, buffers, inputs):
        return forward_detect.detect(params, buffers, config, inputs)

    if backend:
        torch.compiler.reset()
        run = torch.compile(run, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        found = run(params, buffers, inputs)
        without = forward_detect.detect(params, buffers, plain, inputs)
    assert without.mask_scores is None
    assert found.valid.any()
    torch.testing.assert_close(found[:5], without[:5], rtol=1e-4, atol=1e-3)
    expected = found.scores * told.clamp(0, 1)[found.labels]
    torch.testing.assert_close(found.mask_scores, expected)


def test_the_head_sees_the_mask_and_what_the_mask_head_saw(tiny, tiny_batch):
    """In a cascade the mean of the stages' masks; each detection of its own class."""
    config, image, canvas = tiny
    config = replace(config, mask_head=replace(config.mask_head, scoring=True))
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    inputs = training_inputs(tiny_batch([3, 2]), image, canvas, EAGER)
    with torch.no_grad():
        features = detector.extract(params, buffers, config, inputs.image)
        found = forward_detect.detect(params, buffers, config, inputs)
        boxes = found.boxes * inputs.scale[:, None]
        rois, cells = detector.flat_rois(boxes), config.mask_head.cells
        seen = roi_align(features.pyramid, *rois, cells, config.roi_align, config.roi_kernel)
        masks, _ = forward_detect.detect_masks(
            params, config, features.pyramid, boxes, found.labels
        )
        told = scoring.mask_iou_head(params, seen, masks.flatten(0, 1), found.labels.flatten())
    right = found.scores * told.clamp(0, 1).reshape(found.scores.shape)
    torch.testing.assert_close(found.mask_scores, right)


def test_masks_are_scored_in_one_graph(tiny):
    config, image, canvas = tiny
    scored = replace(config.mask_head, scoring=True)
    for capacity in ("auto", "full"):
        made = replace(config, mask_head=replace(scored, capacity=capacity))
        assert resolve_auto(made, EAGER).mask_head.capacity == "full"
    counted = replace(config, mask_head=replace(scored, capacity="counted"))
    with pytest.raises(ValueError, match="capacity must be full"):
        make_loss_step(counted, image, canvas, EAGER)


def test_the_last_stages_masks_are_learnt_from(tiny, tiny_batch):
    """The loss is theirs, and its gradient reaches their head alone."""
    config, image, canvas = tiny
    config = replace(config, mask_head=replace(config.mask_head, scoring=True))
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    told = torch.linspace(0.2, 0.8, config.classes)
    params = {k: v.requires_grad_() for k, v in constant(params, told.tolist()).items()}
    last = f"{scoring.PREFIX}.fc_mask_iou.weight"
    params[last] = randn(*params[last].shape).requires_grad_()
    batch = tiny_batch([3, 2])
    inputs = training_inputs(batch, image, canvas, EAGER)
    anchors = anchor_count(config.anchors, canvas)
    noise = forward_train.draw_noise(config, batch.seed, anchors, batch.valid.shape[1])
    seen: dict[str, list] = {}

    def probe(name, value):
        seen.setdefault(name, []).append(value)
        return value

    found = forward_train.losses(params, buffers, config, inputs, noise, probe)
    columns = (seen[f"mask.{name}"] for name in ("rois", "features", "logits", "goal"))
    rois, features, logits, goals = (column[-1] for column in columns)
    own = inputs.targets.boxes[rois.image, rois.gt]
    cells = forward_train.mask_targets(config.mask_head, rois._replace(boxes=own), inputs.targets)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (own, rois.boxes)]
    whole = cells.sum((1, 2)) * areas[0] / areas[1].clamp(min=1e-6)
    predicted = scoring.mask_iou_head(params, features, logits.sigmoid(), rois.labels)
    loss, count = scoring.mask_iou_loss(
        predicted, scoring.mask_ious(logits, goals, whole), rois.valid
    )
    assert count > 0
    torch.testing.assert_close(found.sums["loss_mask_iou"], loss)
    torch.testing.assert_close(found.counts["loss_mask_iou"], count)
    heads = [f"roi_head.mask_head.{stage}.upsample.weight" for stage in range(3)]
    grads = torch.autograd.grad(
        found.sums["loss_mask_iou"], [params[name] for name in heads], allow_unused=True
    )
    assert [grad is not None and bool(grad.any()) for grad in grads] == [False, False, True]
