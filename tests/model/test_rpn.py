from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from casc.model.anchors import AnchorConfig, grid_anchors, inside
from casc.model.boxes import MAX_LOG_RATIO, encode
from casc.model.losses import mean_losses
from casc.model.matching import Sample, match_anchors, take
from casc.model.rpn import (
    STDS,
    Proposals,
    RPNConfig,
    RPNOutput,
    candidates,
    init_rpn,
    propose,
    rpn_head,
    rpn_head_at,
    rpn_losses,
    rpn_targets,
)
from casc.ops.pyramid import flatten_pyramid

ANCHORS = AnchorConfig(strides=(8, 16, 32))
SIZES = [(12, 16), (6, 8), (3, 4)]
CONFIG = RPNConfig(
    channels=6,
    samples=24,
    train_pre_nms=60,
    train_proposals=40,
    test_pre_nms=30,
    test_proposals=10,
)
SIZE = torch.tensor([[96.0, 128.0], [80.0, 100.0]])
GT = torch.tensor(
    [
        [[10.0, 10, 80, 70], [60, 20, 120, 90], [0, 0, 0, 0]],
        [[20.0, 5, 70, 75], [0, 0, 0, 0], [0, 0, 0, 0]],
    ]
)
GT_VALID = torch.tensor([[True, True, False], [True, False, False]])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_anchors() -> list[Tensor]:
    return grid_anchors(ANCHORS, SIZES, torch.device("cpu"))


def make_output(seed: int = 0) -> RPNOutput:
    count = sum(h * w * 3 for h, w in SIZES)
    return RPNOutput(randn(2, count, seed=seed), 0.3 * randn(2, count, 4, seed=seed + 1))


def test_the_head_reads_every_anchor_in_order(mode):
    params: dict[str, Tensor] = {}
    init_rpn(CONFIG, ANCHORS, 4, params, torch.Generator().manual_seed(0))
    params = {k: randn(*v.shape, seed=i) for i, (k, v) in enumerate(params.items())}
    levels = [randn(2, 4, h, w, seed=h) for h, w in SIZES]
    output = mode(rpn_head)(params, CONFIG, levels)
    index = 0
    for level in levels:
        x = F.conv2d(
            level, params["rpn_head.rpn_conv.weight"], params["rpn_head.rpn_conv.bias"], padding=1
        ).relu()
        score = F.conv2d(x, params["rpn_head.rpn_cls.weight"], params["rpn_head.rpn_cls.bias"])
        delta = F.conv2d(x, params["rpn_head.rpn_reg.weight"], params["rpn_head.rpn_reg.bias"])
        # (y, x, ratio), the channel of a delta being 4 * ratio + coordinate.
        for y in range(level.shape[2]):
            for column in range(level.shape[3]):
                for ratio in range(3):
                    torch.testing.assert_close(
                        output.logits[:, index], score[:, ratio, y, column], rtol=1e-4, atol=1e-4
                    )
                    torch.testing.assert_close(
                        output.deltas[:, index],
                        delta[:, 4 * ratio : 4 * ratio + 4, y, column],
                        rtol=1e-4,
                        atol=1e-4,
                    )
                    index += 1
    assert output.logits.shape == (2, index)
    assert output.logits.dtype == output.deltas.dtype == torch.float32


@pytest.mark.parametrize(
    ("mode", "convs"), [("eager", 2), ("eager", 3), ("compiled", 2)], indirect=["mode"]
)
def test_a_head_of_several_convolutions_is_torchvisions(mode, convs):
    config = replace(CONFIG, channels=4, convs=convs)
    params: dict[str, Tensor] = {}
    init_rpn(config, ANCHORS, 4, params, torch.Generator().manual_seed(0))
    params = {k: randn(*v.shape, seed=i) for i, (k, v) in enumerate(params.items())}
    oracle = RPNHead(4, 3, conv_depth=convs)
    names = {"cls_logits": "rpn_head.rpn_cls", "bbox_pred": "rpn_head.rpn_reg"}
    names |= {f"conv.{i}.0": f"rpn_head.rpn_conv.{i}.conv" for i in range(convs)}
    oracle.load_state_dict(
        {f"{theirs}.{k}": params[f"{ours}.{k}"]
         for theirs, ours in names.items() for k in ("weight", "bias")}
    )  # fmt: skip
    levels = [randn(2, 4, h, w, seed=h) for h, w in SIZES]
    made = mode(lambda p, x: rpn_head(p, config, x))(params, levels)
    with torch.no_grad():
        logits, deltas = oracle(levels)
    logits = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
    deltas = [x.unflatten(1, (3, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in deltas]
    torch.testing.assert_close(made.logits, torch.cat(logits, 1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(made.deltas, torch.cat(deltas, 1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("mode", "convs"),
    # The step's tests compile a head of one.
    [("eager", 1), ("eager", 2), ("eager", 3), ("compiled", 2)],
    indirect=["mode"],
)
def test_the_head_at_chosen_anchors_is_the_head_everywhere(mode, convs):
    """Values and gradients; the coarsest level is every second cell of the one before it."""
    params: dict[str, Tensor] = {}
    config = replace(CONFIG, convs=convs)
    init_rpn(config, ANCHORS, 4, params, torch.Generator().manual_seed(0))
    assert ("rpn_head.rpn_conv.weight" in params) == (convs == 1)
    params = {
        k: randn(*v.shape, seed=i).requires_grad_() for i, (k, v) in enumerate(params.items())
    }
    sizes = [(11, 16), (5, 7), (3, 4)]
    stored = [randn(2, 4, h, w, seed=h).requires_grad_() for h, w in sizes[:2]]
    count = sum(h * w * 3 for h, w in sizes)
    # Every anchor once, in no order, and some of them twice.
    order = torch.stack(
        [torch.randperm(count, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    )
    order = torch.cat([order, order[:, :7]], dim=1)

    def at(params, stored, index):
        return rpn_head_at(params, config, flatten_pyramid(stored, (8, 16)), sizes, index)[0]

    def everywhere(params, stored, index):
        coarsest = F.max_pool2d(stored[-1], kernel_size=1, stride=2)
        return RPNOutput(*(take(t, index) for t in rpn_head(params, config, [*stored, coarsest])))

    variables = [*params.values(), *stored]
    results = []
    for run in (mode(at), everywhere):
        output = run(params, stored, order)
        loss = (output.logits * randn(*output.logits.shape)).sum()
        loss = loss + (output.deltas * randn(*output.deltas.shape, seed=1)).sum()
        results.append([*output, *torch.autograd.grad(loss, variables)])
    for made, right in zip(*results, strict=True):
        # Small entries are sums of large ones.
        atol = max(1e-4, 1e-5 * right.abs().max().item())
        torch.testing.assert_close(made, right, rtol=1e-4, atol=atol)


def test_targets_ignore_anchors_that_cross_the_image():
    anchors = torch.cat(make_anchors())
    keys = torch.rand(2, len(anchors), generator=torch.Generator().manual_seed(0))
    targets = rpn_targets(CONFIG, anchors, SIZE, GT, GT_VALID, keys)
    within = inside(anchors, SIZE)
    assert not (targets.matches.positive & ~within).any()
    assert not (targets.matches.negative & ~within).any()
    assert take(within, targets.sample.indices)[targets.sample.valid].all()
    expected = match_anchors(
        anchors,
        within,
        GT,
        GT_VALID,
        positive_iou=0.7,
        negative_iou=0.3,
        low_quality_iou=0.3,
    )
    for made, right in zip(targets.matches, expected, strict=True):
        assert torch.equal(made, right)
    assert targets.sample.positive.sum(1).max() <= CONFIG.samples * CONFIG.positive_fraction


def literal_losses(output: RPNOutput, anchors: Tensor, sample: Sample, matched: Tensor):
    """Box by box; both sums over the same number of samples."""
    cls, box, count = 0.0, 0.0, 0
    for i in range(2):
        positives = negatives = 0
        for k in range(sample.valid.shape[1]):
            if not sample.valid[i, k]:
                continue
            a, positive = sample.indices[i, k], bool(sample.positive[i, k])
            target = torch.tensor(float(positive))
            cls += F.binary_cross_entropy_with_logits(output.logits[i, a], target)
            positives, negatives = positives + positive, negatives + (not positive)
            if positive:
                goal = encode(anchors[a], GT[i, matched[i, a]], STDS)
                box += F.smooth_l1_loss(output.deltas[i, a], goal, beta=1 / 9, reduction="sum")
        count += max(positives, 1) + max(negatives, 1)
    return cls / count, box / count


@pytest.mark.parametrize("case", ["objects", "no object in one image", "no object at all"])
def test_losses_are_the_literal_ones(mode, case):
    valid = GT_VALID.clone()
    if case != "objects":
        valid[1] = False
    if case == "no object at all":
        valid[:] = False
    anchors = torch.cat(make_anchors())
    keys = torch.rand(2, len(anchors), generator=torch.Generator().manual_seed(0))
    output = RPNOutput(*(t.requires_grad_() for t in make_output()))
    targets = rpn_targets(CONFIG, anchors, SIZE, GT, valid, keys)

    def run(output, anchors, targets, gt):
        sampled = RPNOutput(*(take(t, targets.sample.indices) for t in output))
        return mean_losses(rpn_losses(CONFIG, sampled, anchors, targets, gt))

    total, losses = mode(run)(output, anchors, targets, GT)
    cls, box = literal_losses(output, anchors, targets.sample, targets.matches.gt)
    torch.testing.assert_close(losses["loss_rpn_cls"], cls)
    if case == "no object at all":
        assert losses["loss_rpn_bbox"] == 0
    else:
        torch.testing.assert_close(losses["loss_rpn_bbox"], box)
    total.backward()
    for tensor in output:
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def torchvision_proposals(
    output: RPNOutput, image: int, pre_nms: int, count: int
) -> tuple[Tensor, Tensor]:
    """The reference's recipe in torchvision's operators: [n, 4] and [n]."""
    boxes, scores, levels = [], [], []
    start = 0
    for level, anchors in enumerate(make_anchors()):
        stop = start + len(anchors)
        score = output.logits[image, start:stop].sigmoid()
        order = score.argsort(descending=True, stable=True)[:pre_nms]
        dx, dy, dw, dh = output.deltas[image, start:stop][order].unbind(1)
        a = anchors[order]
        w, h = a[:, 2] - a[:, 0], a[:, 3] - a[:, 1]
        x, y = a[:, 0] + w / 2 + dx * w, a[:, 1] + h / 2 + dy * h
        w, h = (
            side * d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() for side, d in ((w, dw), (h, dh))
        )
        boxes.append(torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1))
        scores.append(score[order])
        levels.append(torch.full_like(order, level))
        start = stop
    every, score, level = (torch.cat(t) for t in (boxes, scores, levels))
    every = clip_boxes_to_image(every, (int(SIZE[image, 0]), int(SIZE[image, 1])))
    real = remove_small_boxes(every, 1e-9)
    every, score, level = every[real], score[real], level[real]
    keep = batched_nms(every, score, level, CONFIG.nms_iou)[:count]
    return every[keep], score[keep]


def proposals(output: RPNOutput, anchors: list[Tensor], size: Tensor, train: bool) -> Proposals:
    lengths = [len(level) for level in anchors]
    found = candidates(CONFIG, output, torch.cat(anchors), lengths, size, train=train)
    return propose(CONFIG, found, train=train)


@pytest.mark.parametrize(
    # Only numbers of boxes are others.
    ("mode", "train"),
    [("eager", True), ("eager", False), ("compiled", True)],
    indirect=["mode"],
)
def test_proposals_are_torchvisions(mode, train):
    output, anchors = make_output(), make_anchors()

    made = mode(proposals)(output, anchors, SIZE, train)
    pre_nms, count = (60, 40) if train else (30, 10)
    assert made.boxes.shape == (2, count, 4)
    for i in range(2):
        boxes, scores = torchvision_proposals(output, i, pre_nms, count)
        valid = made.valid[i]
        assert valid.sum() == len(boxes)
        torch.testing.assert_close(made.boxes[i, valid], boxes, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(made.scores[i, valid], scores)
        assert (made.boxes[i, ~valid] == 0).all()
        assert (made.scores[i, ~valid] == 0).all()
        assert (made.scores[i].diff() <= 0).all()


def test_proposals_have_no_gradient():
    output = RPNOutput(*(t.requires_grad_() for t in make_output()))
    made = proposals(output, make_anchors(), SIZE, True)
    assert not any(t.requires_grad for t in made)


def test_no_proposal_survives_an_image_without_room():
    """Every anchor moved out of the image: clipped to nothing, all padding, no error."""
    output, anchors = make_output(), make_anchors()
    output.deltas[..., :2] = -100
    made = proposals(output, anchors, SIZE, True)
    assert not made.valid.any()
    assert (made.boxes == 0).all()
