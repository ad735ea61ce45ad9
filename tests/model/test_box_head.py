from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import ops
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead

from casc.model import box_head as heads
from casc.model.boxes import decode, encode
from casc.model.detector_config import STAGES
from casc.model.losses import mean_losses
from casc.model.targets import Targets


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_targets(boxes: Tensor, labels: Tensor, valid: Tensor) -> Targets:
    edges, owner = torch.zeros(len(valid), 3, 4), torch.zeros(len(valid), 3, dtype=torch.long)
    return Targets(boxes, labels, valid, edges, owner)


def falling(batch: int, count: int) -> Tensor:
    return (1 - torch.arange(count) / count).expand(batch, -1)


@pytest.mark.parametrize(
    # Stages differ by constants.
    ("mode", "stage"),
    [("eager", 0), ("eager", 1), ("eager", 2), ("compiled", 1)],
    indirect=["mode"],
)
def test_samples_reproduce_the_reference(unit_goldens, mode, stage):
    boxes, gt, labels = (unit_goldens[f"assign.{k}"] for k in ("boxes", "gt", "gt_labels"))
    everywhere = torch.ones(1, len(boxes), dtype=torch.bool)
    targets = make_targets(gt[None], labels[None], torch.ones(1, 5, dtype=torch.bool))

    def run(boxes, valid, targets, keys):
        return heads.sample_rois(
            heads.BoxHeadConfig(), STAGES[stage], 80, boxes, valid, targets, keys
        )

    rois = mode(run)(boxes[None], everywhere, targets, falling(1, 5 + len(boxes)))
    positive = rois.positive[0]
    golden = {
        k: unit_goldens[f"assign.s{stage}.{k}"]
        for k in ("pos_inds", "neg_inds", "pos_assigned_gt_inds", "rois")
    }
    assert rois.valid.all()
    assert rois.indices[0, positive].tolist() == golden["pos_inds"].tolist()
    assert rois.indices[0, ~positive].tolist() == golden["neg_inds"].tolist()
    assert rois.gt[0, positive].tolist() == golden["pos_assigned_gt_inds"].tolist()
    assert torch.equal(rois.boxes[0], golden["rois"])
    assert rois.labels[0, positive].tolist() == labels[golden["pos_assigned_gt_inds"]].tolist()
    assert (rois.labels[0, ~positive] == 80).all()
    assert rois.from_gt[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]


CONFIG = heads.BoxHeadConfig(samples=12, channels=10, cells=2)
CLASSES = 4


def scene(valid_gt: Tensor) -> tuple[Tensor, Tensor, Targets, Tensor]:
    """Two images, three slots of ground truth, 20 proposals each: boxes, valid, targets, keys."""
    gt = torch.tensor(
        [
            [[10.0, 10, 50, 60], [30, 20, 90, 80], [0, 0, 0, 0]],
            [[5.0, 5, 40, 40], [0, 0, 0, 0], [0, 0, 0, 0]],
        ]
    )
    labels = torch.tensor([[1, 3, 0], [2, 0, 0]])
    around = gt[:, [0, 1, 0, 1]].repeat(1, 5, 1) + 4 * randn(2, 20, 4)
    around[:, 10:, :2] += 40
    around[:, 10:, 2:] += 60
    proposals = around.clamp(min=0)
    valid = torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) < 0.9
    keys = torch.rand(2, 23, generator=torch.Generator().manual_seed(2))
    return proposals, valid, make_targets(gt, labels, valid_gt), keys


SOME = torch.tensor([[True, True, False], [True, False, False]])


def draw(valid_gt: Tensor = SOME, stage: int = 0) -> tuple[heads.RoiSample, Targets]:
    boxes, valid, targets, keys = scene(valid_gt)
    return (
        heads.sample_rois(CONFIG, STAGES[stage], CLASSES, boxes, valid, targets, keys),
        targets,
    )


def test_samples_hold_together():
    rois, targets = draw()
    proposals, valid, _, _ = scene(SOME)
    candidates = torch.cat([targets.boxes, proposals], dim=1)
    usable = torch.cat([SOME, valid], dim=1)
    for i in range(2):
        real = rois.valid[i]
        index = rois.indices[i]
        assert len(index[real].unique()) == int(real.sum())
        assert usable[i, index[real]].all()
        assert torch.equal(rois.boxes[i, real], candidates[i, index[real]])
        assert torch.equal(rois.from_gt[i, real], index[real] < 3)
        # Ground truth is always positive, for itself.
        assert rois.positive[i, rois.from_gt[i]].all()
        assert torch.equal(rois.gt[i, rois.from_gt[i]], index[rois.from_gt[i]])
    assert rois.positive.sum(1).max() <= heads.max_positive(CONFIG) == 3
    assert not (rois.positive & ~rois.valid).any()
    assert not (rois.from_gt & ~rois.valid).any()


def test_coinciding_objects_each_answer_for_themselves():
    gt = torch.tensor([[[10.0, 10, 50, 60], [10, 10, 50, 60], [10, 10, 50, 60]]])
    targets = make_targets(gt, torch.tensor([[0, 1, 2]]), torch.ones(1, 3, dtype=torch.bool))
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    rois = heads.sample_rois(
        CONFIG, STAGES[0], CLASSES, torch.zeros(1, 4, 4), nothing, targets, falling(1, 7)
    )
    assert rois.gt[rois.valid].tolist() == [0, 1, 2]
    assert rois.labels[rois.valid].tolist() == [0, 1, 2]


def test_an_object_without_area_is_drawn_once():
    # It doesn't even overlap itself, yet must not be its own negative as well.
    gt = torch.tensor([[[10.0, 10, 10, 60], [30, 20, 90, 80]]])
    targets = make_targets(gt, torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool))
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    rois = heads.sample_rois(
        CONFIG, STAGES[0], CLASSES, torch.zeros(1, 4, 4), nothing, targets, falling(1, 6)
    )
    assert rois.indices[rois.valid].tolist() == [0, 1]
    assert rois.positive[rois.valid].all()


def test_no_object_leaves_negatives_only():
    rois, _ = draw(torch.zeros_like(SOME))
    assert not rois.positive.any()
    assert not rois.from_gt.any()
    assert rois.valid.all()
    assert (rois.labels == CLASSES).all()


def make_params() -> dict[str, Tensor]:
    params: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for stage in range(2):
        heads.init_box_head(CONFIG, stage, CLASSES, 3, params, generator)
    return {k: v + 0.1 * randn(*v.shape) for k, v in params.items()}


def test_the_head_is_two_layers_and_two_outputs(mode):
    params, features = make_params(), randn(24, 3, 2, 2)
    made = mode(heads.box_head)(params, CONFIG, 1, features)
    name = "roi_head.bbox_head.1"

    def layer(part: str, x: Tensor) -> Tensor:
        return F.linear(x, params[f"{name}.{part}.weight"], params[f"{name}.{part}.bias"])

    x = layer("shared_fcs.1", layer("shared_fcs.0", features.flatten(1)).relu()).relu()
    torch.testing.assert_close(made.logits, layer("fc_cls", x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.deltas, layer("fc_reg", x), rtol=1e-5, atol=1e-5)
    assert made.logits.shape == (24, CLASSES + 1)
    low = heads.box_head(params, CONFIG, 1, features.bfloat16())
    assert low.logits.dtype == low.deltas.dtype == torch.float32
    torch.testing.assert_close(low.logits, made.logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("objects", [True, False])
@pytest.mark.parametrize(
    # Stages differ by constants.
    ("mode", "stage"),
    [("eager", 0), ("eager", 2), ("compiled", 2)],
    indirect=["mode"],
)
def test_losses_are_the_literal_ones(mode, objects, stage):
    rois, targets = draw(SOME if objects else torch.zeros_like(SOME), stage)
    logits = (2 * randn(24, CLASSES + 1)).requires_grad_()
    deltas = randn(24, 4, seed=1).requires_grad_()

    def run(output, rois, targets):
        return mean_losses(heads.box_losses(CONFIG, [STAGES[stage]], [output], [rois], targets)[0])

    total, losses = mode(run)(heads.BoxOutput(logits, deltas), rois, targets)
    cls, box, hits, count = torch.zeros(()), torch.zeros(()), 0, 0
    for i in range(2):
        for k in range(12):
            if not rois.valid[i, k]:
                continue
            row, count = 12 * i + k, count + 1
            label = rois.labels[i, k]
            cls = cls - logits[row].log_softmax(0)[label]
            hits += int(logits[row].argmax() == label)
            if rois.positive[i, k]:
                gt = targets.boxes[i, rois.gt[i, k]]
                goal = encode(rois.boxes[i, k], gt, STAGES[stage].stds)
                box = box + F.smooth_l1_loss(deltas[row], goal, reduction="sum")
    weight = STAGES[stage].loss_weight
    torch.testing.assert_close(losses["loss_cls"], weight * cls / count)
    torch.testing.assert_close(losses["loss_bbox"], weight * box / count)
    assert losses["acc"].item() == pytest.approx(100 * hits / count)
    assert not losses["acc"].requires_grad
    torch.testing.assert_close(total, weight * (cls + box) / count)
    total.backward()
    for tensor in (logits, deltas):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert deltas.grad is not None
    assert bool((deltas.grad != 0).any()) == objects


def test_no_sample_at_all_is_a_zero_loss():
    _, _, targets, keys = scene(torch.zeros_like(SOME))
    nothing = torch.zeros(2, 20, dtype=torch.bool)
    rois = heads.sample_rois(
        CONFIG, STAGES[0], CLASSES, torch.zeros(2, 20, 4), nothing, targets, keys
    )
    assert not rois.valid.any()
    output = heads.BoxOutput(randn(24, CLASSES + 1), randn(24, 4))
    total, losses = mean_losses(heads.box_losses(CONFIG, STAGES[:1], [output], [rois], targets)[0])
    assert total == 0
    assert all(v == 0 for v in losses.values())


def test_refined_boxes_are_decoded_clipped_and_detached(unit_goldens):
    boxes, deltas = unit_goldens["coder.boxes"], unit_goldens["coder.deltas"]
    deltas = deltas.clone().requires_grad_()
    size = torch.tensor([[800.0, 1088.0]])
    for i, stage in enumerate(STAGES):
        made = heads.refine(stage, boxes[None], deltas, size)
        expected = unit_goldens[f"coder.s{i}.decode_clip"]
        torch.testing.assert_close(made[0], expected, rtol=1e-5, atol=1e-3)
        assert not made.requires_grad


def test_refining_by_the_target_deltas_lands_on_the_target():
    rois, targets = draw()
    gt = targets.boxes[torch.arange(2)[:, None], rois.gt]
    size = torch.tensor([[200.0, 200.0]]).expand(2, -1)
    for stage in STAGES:
        deltas = encode(rois.boxes, gt, stage.stds)
        made = heads.refine(stage, rois.boxes, deltas.reshape(-1, 4), size)
        on = rois.positive
        torch.testing.assert_close(made[on], gt[on], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(decode(rois.boxes, deltas, stage.stds, size), made)


@pytest.mark.parametrize(
    ("mode", "norm"),
    [("eager", "none"), ("eager", "gn"), ("eager", "ln"), ("compiled", "gn"), ("compiled", "ln")],
    indirect=["mode"],
)
def test_convolutions_come_before_the_fully_connected_layers(mode, norm):
    """torchvision's 4conv1fc head, norms included but for the layer norm, which it hasn't."""
    config = replace(CONFIG, convs=2, conv_channels=32, norm=norm, fcs=1, cells=3)
    params: dict[str, Tensor] = {}
    heads.init_box_head(config, 0, CLASSES, 3, params, torch.Generator().manual_seed(0))
    params = {k: v + 0.1 * randn(*v.shape) for k, v in params.items()}
    name = "roi_head.bbox_head.0"
    features = randn(6, 3, 3, 3)

    def theirs(channels: int) -> torch.nn.Module:
        if norm == "gn":
            return torch.nn.GroupNorm(32, channels)
        return torch.nn.Identity() if norm == "none" else ChannelNorm(channels)

    class ChannelNorm(torch.nn.LayerNorm):
        def __init__(self, channels):
            super().__init__(channels, eps=1e-6)

        def forward(self, input):
            return super().forward(input.movedim(1, -1)).movedim(-1, 1)

    oracle = FastRCNNConvFCHead((3, 3, 3), [32, 32], [CONFIG.channels], norm_layer=theirs)
    ours = [f"{name}.shared_convs.{i}.{part}" for i in (0, 1) for part in ("conv", norm)]
    ours = [part for part in ours if f"{part}.weight" in params] + [f"{name}.shared_fcs.0"]
    layers = [
        m for m in oracle.modules()
        if isinstance(m, torch.nn.Conv2d | torch.nn.GroupNorm | torch.nn.LayerNorm
                      | torch.nn.Linear)
    ]  # fmt: skip
    with torch.no_grad():
        for layer, part in zip(layers, ours, strict=True):
            layer.weight.copy_(params[f"{part}.weight"])
            if layer.bias is not None:
                layer.bias.copy_(params.get(f"{part}.bias", torch.zeros_like(layer.bias)))
        if norm == "none":  # theirs has no bias there
            for i in (0, 1):
                params[f"{name}.shared_convs.{i}.conv.bias"].zero_()
        x = oracle(features)
    made = mode(heads.box_head)(params, config, 0, features)
    right = F.linear(x, params[f"{name}.fc_cls.weight"], params[f"{name}.fc_cls.bias"])
    torch.testing.assert_close(made.logits, right, rtol=1e-4, atol=1e-4)


IOU_LOSSES = {
    "giou": ops.generalized_box_iou_loss,
    "diou": ops.distance_box_iou_loss,
    "ciou": ops.complete_box_iou_loss,
}


@pytest.mark.parametrize(
    ("mode", "kind", "own"),
    [
        *(("eager", "smooth_l1", True), ("eager", "giou", False)),
        *(("eager", "diou", True), ("eager", "ciou", False)),
        # The losses' own tests compile each kind, and the literal ones above smooth L1.
        ("compiled", "diou", True),
    ],
    indirect=["mode"],
)
def test_box_losses_of_all_stages_are_torchvisions(mode, kind, own):
    """Each stage by its own deviations; of each class's own box, the object's.

    As MMDetection's reg_decoded_bbox and reg_class_agnostic have it: the sum over positives over
    all samples.
    """
    config = replace(CONFIG, loss=kind, box_weight=10.0, class_specific=own)
    proposals, valid, targets, _ = scene(SOME)
    samples = [
        heads.sample_rois(CONFIG, stage, CLASSES, proposals, valid, targets, randn(2, 23, seed=i))
        for i, stage in enumerate(STAGES, start=1)
    ]
    assert len({tuple(rois.labels.flatten().tolist()) for rois in samples}) == 3
    boxes = CLASSES if own else 1
    outputs = [
        heads.BoxOutput(randn(24, CLASSES + 1), randn(24, 4 * boxes, seed=1 + i)) for i in range(3)
    ]

    def run(outputs, samples, targets):
        return [
            mean_losses(x)[1] for x in heads.box_losses(config, STAGES, outputs, samples, targets)
        ]

    made = mode(run)(outputs, samples, targets)
    for stage, rois, output, found in zip(STAGES, samples, outputs, made, strict=True):
        x, y, w, h = stage.stds
        coder = BoxCoder((1 / x, 1 / y, 1 / w, 1 / h))
        on = rois.positive.flatten()
        gt = targets.boxes[torch.arange(2)[:, None], rois.gt].flatten(0, 1)[on]
        start, deltas = rois.boxes.flatten(0, 1)[on], output.deltas[on]
        chosen = rois.labels.flatten()[on] if own else torch.zeros(int(on.sum()), dtype=torch.long)
        rows = torch.arange(len(start))
        if kind == "smooth_l1":
            goal = coder.encode_single(gt, start)
            mine = deltas.unflatten(1, (boxes, 4))[rows, chosen]
            total = F.smooth_l1_loss(mine, goal, reduction="sum")
        else:
            moved = coder.decode(deltas, [start])[rows, chosen]
            total = IOU_LOSSES[kind](moved, gt, reduction="sum")
        expected = 10 * stage.loss_weight * total / rois.valid.sum()
        torch.testing.assert_close(found["loss_bbox"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", IOU_LOSSES)
def test_a_decoded_box_on_its_target_costs_nothing(kind):
    config = replace(CONFIG, loss=kind)
    for valid in (SOME, torch.zeros_like(SOME)):
        rois, targets = draw(valid, 1)
        gt = targets.boxes[torch.arange(2)[:, None], rois.gt]
        perfect = encode(rois.boxes, gt, STAGES[1].stds).reshape(24, 4)
        output = heads.BoxOutput(randn(24, CLASSES + 1), perfect)
        (found,) = heads.box_losses(config, [STAGES[1]], [output], [rois], targets)
        assert found.sums["loss_bbox"].isfinite()
        assert abs(found.sums["loss_bbox"]) < 1e-4


def test_each_class_may_have_its_own_box():
    rois, _ = draw()
    logits = randn(24, CLASSES + 1)
    own = replace(CONFIG, class_specific=True)
    params: dict[str, Tensor] = {}
    heads.init_box_head(own, 0, CLASSES, 3, params, torch.Generator().manual_seed(0))
    assert params["roi_head.bbox_head.0.fc_reg.weight"].shape == (4 * CLASSES, CONFIG.channels)
    # Whose box a stage hands on: the class of positives, the best one of others and at inference.
    labels = heads.regressed_class(logits.reshape(2, 12, -1), rois.labels)
    best = logits[:, :-1].argmax(-1).reshape(2, 12)
    assert torch.equal(labels[rois.positive], rois.labels[rois.positive])
    assert torch.equal(labels[~rois.positive], best[~rois.positive])
    assert torch.equal(heads.regressed_class(logits.reshape(2, 12, -1), None), best)
