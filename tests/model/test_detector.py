import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor

from casc.data.batch import Batch
from casc.device.compute import Compute
from casc.model import detector, forward_detect, forward_train
from casc.model.box_head import BoxHeadConfig
from casc.model.detector import Inputs
from casc.model.detector_config import DetectorConfig, InferenceConfig, reference_settings
from casc.model.forward_train import Noise
from casc.model.layers import Params
from casc.model.losses import LossSums, mean_losses
from casc.model.rpn import Proposals
from casc.model.steps import anchor_count, make_loss_step, training_inputs

STAGES = range(3)
HEADS = ["rpn_head"] + [f"roi_head.{kind}_head.{i}" for kind in ("bbox", "mask") for i in STAGES]
EAGER = Compute(compile=False)


class World(NamedTuple):
    """The tiny detector with parameters, and what makes its inputs."""

    config: DetectorConfig
    params: Params
    buffers: Params
    inputs: Callable[[Batch], Inputs]
    noise: Callable[[Batch], Noise]
    losses: Callable[..., tuple[Tensor, dict[str, Tensor], dict[str, Tensor | None]]]
    """Total, every measure, and the gradients by name."""


@pytest.fixture(scope="module")
def world(tiny) -> World:
    config, image, canvas = tiny
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    anchors = anchor_count(config.anchors, canvas)

    def losses(batch, config=config):
        leaves = params | {
            k: v.clone().requires_grad_() for k, v in detector.trainable(config, params).items()
        }
        found = make_loss_step(config, image, canvas, EAGER)(leaves, buffers, batch)
        total, measures = mean_losses(found)
        total.backward()
        return total.detach(), measures, {k: v.grad for k, v in leaves.items() if v.requires_grad}

    return World(
        config,
        params,
        buffers,
        lambda batch: training_inputs(batch, image, canvas, EAGER),
        lambda batch: forward_train.draw_noise(config, batch.seed, anchors, batch.valid.shape[1]),
        losses,
    )


def measured(*arguments) -> dict[str, Tensor]:
    """All losses and measures of a batch by name."""
    return mean_losses(forward_train.losses(*arguments))[1]


def with_box(batch: Batch, box: list[float], image: int = 0) -> Batch:
    """A batch whose image's only object is `box`, with a rectangle's edges."""
    boxes, edges, valid = batch.boxes.clone(), batch.edges.clone(), batch.valid.clone()
    boxes[image], edges[image], valid[image] = 0, 0, False
    owner = batch.edge_gt.clone()
    owner[image] = 0
    x0, y0, x1, y1 = box
    boxes[image, 0] = torch.tensor(box)
    around = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    for i in range(4):
        edges[image, i] = torch.tensor([*around[i], *around[(i + 1) % 4]])
    valid[image, 0] = True
    return batch._replace(boxes=boxes, edges=edges, edge_gt=owner, valid=valid)


def edge_cases(make: Callable[..., Batch]) -> dict[str, Batch]:
    two = make([2, 1])
    twins = two._replace(
        boxes=two.boxes[:, :1].expand(-1, 5, -1).contiguous(),
        edges=two.edges[:, :12].repeat(1, 5, 1),
        valid=torch.ones_like(two.valid),
    )
    return {
        "ordinary": two,
        "no object in one image": make([0, 3]),
        "no object at all": make([0, 0]),
        "full capacity": make([5, 5]),
        "capacity of one": make([1, 1], capacity=1),
        "one giant": with_box(make([0, 0]), [0, 0, 96, 60]),
        "a giant beyond the image": with_box(make([0, 0]), [-1e4, -1e4, 1e4, 1e4]),
        "no area": with_box(make([0, 0]), [30, 20, 30, 20]),
        "no width": with_box(make([0, 1]), [30, 20, 30, 50]),
        "thinner than a pixel": with_box(make([0, 1]), [30, 20, 30.01, 50]),
        "outside the image": with_box(make([0, 0]), [500, 500, 600, 600]),
        "all objects coincide": twins,
        "no polygon": two._replace(edges=torch.zeros_like(two.edges)),
        "images filled up by the loader": make([2, 0])._replace(
            size=torch.tensor([[60.0, 96.0], [1.0, 1.0]]), image_id=torch.tensor([1, -1])
        ),
        "black": two._replace(image=torch.zeros_like(two.image)),
    }


CASES = [
    "ordinary",
    "no object in one image",
    "no object at all",
    "full capacity",
    "capacity of one",
    "one giant",
    "a giant beyond the image",
    "no area",
    "no width",
    "thinner than a pixel",
    "outside the image",
    "all objects coincide",
    "no polygon",
    "images filled up by the loader",
    "black",
]


@pytest.mark.parametrize("capacity", ["counted", "full"])
@pytest.mark.parametrize("case", CASES)
def test_every_loss_is_finite_and_every_head_learns(world, tiny_batch, case, capacity):
    """Also where a batch has no ground truth at all, and in the other corners of the data."""
    cases = edge_cases(tiny_batch)
    assert set(cases) == set(CASES)
    head = replace(world.config.mask_head, capacity=capacity)
    total, measures, grads = world.losses(cases[case], replace(world.config, mask_head=head))
    assert total.isfinite()
    losses = {k: v for k, v in measures.items() if "loss" in k}
    assert len(losses) == 2 + 3 * len(STAGES)
    assert total.item() == pytest.approx(sum(v.item() for v in losses.values()), rel=1e-5)
    for name, value in measures.items():
        assert value.isfinite(), name
        assert not value.requires_grad
    for name, grad in grads.items():
        assert grad is not None, name
        assert grad.isfinite().all(), name
    for head_name in HEADS:
        assert any(name.startswith(head_name) for name in grads)
    objects = bool(cases[case].valid.any())
    for name, value in measures.items():
        if "cls" in name:
            assert value > 0
        elif "loss_mask" in name:
            # An object is always sampled itself: each mask head has something to learn.
            assert (value > 0) == objects, name
        elif not objects and ("bbox" in name or "positives" in name):
            assert value == 0, name


def test_no_object_trains_objectness_and_background_only(world, tiny_batch):
    _, _, grads = world.losses(tiny_batch([0, 0]))
    touched = {name for name, grad in grads.items() if (grad != 0).any()}
    for i in STAGES:
        assert f"roi_head.bbox_head.{i}.fc_cls.weight" in touched
        assert f"roi_head.bbox_head.{i}.fc_reg.weight" not in touched
        assert f"roi_head.mask_head.{i}.conv_logits.weight" not in touched
    assert "rpn_head.rpn_cls.weight" in touched
    assert "rpn_head.rpn_reg.weight" not in touched


def test_counted_and_full_mask_capacity_are_the_same_training(world, tiny_batch):
    for objects in ([0, 0], [1, 0], [5, 5]):
        counted, full = (
            world.losses(
                tiny_batch(objects),
                replace(world.config, mask_head=replace(world.config.mask_head, capacity=c)),
            )
            for c in ("counted", "full")
        )
        for name, value in counted[1].items():
            torch.testing.assert_close(value, full[1][name], rtol=1e-5, atol=1e-7, msg=name)
        for name, grad in counted[2].items():
            torch.testing.assert_close(grad, full[2][name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("where", ["one pixel", "one image", "everywhere"])
def test_wild_pixels_crash_nothing(world, tiny_batch, value, where):
    """Losses may be NaN, and the step's finite check says so; no operator may fail."""
    batch = tiny_batch([2, 1])
    inputs = world.inputs(batch)
    image = inputs.image.clone()
    if where == "one pixel":
        image[0, :, 20, 30] = value
    elif where == "one image":
        image[0] = value
    else:
        image[:] = value
    inputs = inputs._replace(image=image)
    params, buffers, config = world.params, world.buffers, world.config
    losses = measured(params, buffers, config, inputs, world.noise(batch))
    assert len(losses) == 22
    found = forward_detect.detect(params, buffers, config, inputs)
    assert found.boxes.shape == (2, 10, 4)
    exact = replace(config, roi_align="adaptive")
    measured(params, buffers, exact, inputs, world.noise(batch))
    forward_detect.detect(params, buffers, exact, inputs)


def more_capacity(batch: Batch, noise: Noise, extra: int) -> tuple[Batch, Noise]:
    """The same objects and noise with `extra` more padded slots."""

    def pad(t: Tensor) -> Tensor:
        return torch.cat([t, t.new_zeros(t.shape[0], extra, *t.shape[2:])], dim=1)

    fields = {k: pad(getattr(batch, k)) for k in ("boxes", "labels", "valid", "edges", "edge_gt")}
    capacity = batch.valid.shape[1]
    # The new slots' keys win every draw, if anything should draw them.
    stages = tuple(
        torch.cat([k[:, :capacity], torch.full((len(k), extra), 0.999), k[:, capacity:]], dim=1)
        for k in noise.stages
    )
    return batch._replace(**fields), noise._replace(stages=stages)


def test_padding_of_ground_truth_changes_nothing(world, tiny_batch):
    batch = tiny_batch([3, 1])
    noise = world.noise(batch)
    arguments = world.params, world.buffers, world.config
    few = measured(*arguments, world.inputs(batch), noise)
    wider, wider_noise = more_capacity(batch, noise, 4)
    assert wider.valid.shape == (2, 9)
    many = measured(*arguments, world.inputs(wider), wider_noise)
    for name, value in few.items():
        torch.testing.assert_close(value, many[name], rtol=1e-6, atol=1e-7, msg=name)


def test_padding_slots_may_lie_anywhere(world, tiny_batch):
    batch = tiny_batch([3, 1])
    noise = world.noise(batch)
    order = torch.tensor([4, 0, 3, 1, 2])
    fields = {k: getattr(batch, k)[:, order] for k in ("boxes", "labels", "valid")}
    fields["edge_gt"] = order.argsort()[batch.edge_gt]
    stages = tuple(torch.cat([k[:, order], k[:, 5:]], dim=1) for k in noise.stages)
    arguments = world.params, world.buffers, world.config
    made = measured(*arguments, world.inputs(batch), noise)
    moved = measured(
        *arguments, world.inputs(batch._replace(**fields)), noise._replace(stages=stages)
    )
    for name, value in made.items():
        torch.testing.assert_close(value, moved[name], rtol=1e-6, atol=1e-7, msg=name)


def one(batch: Batch, image: int) -> Batch:
    return Batch(*(None if t is None else t[image : image + 1] for t in batch))  # type: ignore[arg-type]


def test_a_batchs_losses_are_its_images_losses_weighted(world, tiny_batch):
    """Each loss is a sum over images divided by a count that is a sum over images."""
    batch = tiny_batch([3, 1])
    arguments = world.params, world.buffers, world.config
    together = measured(*arguments, world.inputs(batch), world.noise(batch))
    alone = []
    for i in range(2):
        image = one(batch, i)
        alone.append(measured(*arguments, world.inputs(image), world.noise(image)))
    for name, value in together.items():
        weights = [1.0, 1.0]
        if "mask" in name:
            weights = [losses[f"{name[:2]}.positives"].item() for losses in alone]
        a, b = (losses[name] for losses in alone)
        expected = (weights[0] * a + weights[1] * b) / sum(weights)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_an_image_is_detected_alike_alone_and_in_a_batch(world, tiny_batch):
    batch = tiny_batch([2, 1])
    arguments = world.params, world.buffers, world.config
    together = forward_detect.detect(*arguments, world.inputs(batch))
    for i in range(2):
        alone = forward_detect.detect(*arguments, world.inputs(one(batch, i)))
        assert torch.equal(together.valid[i : i + 1], alone.valid)
        for a, b in zip(together[:5], alone[:5], strict=True):
            assert a is not None
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-4, atol=1e-3)


def test_detections_hold_together(world, tiny_batch):
    batch = tiny_batch([2, 1])
    found = forward_detect.detect(world.params, world.buffers, world.config, world.inputs(batch))
    assert found.boxes.shape == (2, 10, 4)
    assert found.masks is not None
    assert found.masks.shape == (2, 10, 28, 28)
    assert found.valid.any()
    assert (found.scores.diff() <= 0).all()
    assert (found.scores[found.valid] > world.config.inference.score_threshold).all()
    assert found.labels.dtype == torch.int64
    assert ((found.labels >= 0) & (found.labels < world.config.classes)).all()
    assert ((found.masks >= 0) & (found.masks <= 1)).all()
    for i, (height, width) in enumerate(batch.size.tolist()):
        x1, y1, x2, y2 = found.boxes[i].unbind(-1)
        assert (x1 >= 0).all()
        assert (y1 >= 0).all()
        # In pixels of the stored image, not of the canvas.
        assert (x2 <= width + 1e-3).all()
        assert (y2 <= height + 1e-3).all()
        assert x2.max() > 0.8 * width


def constant_heads(world: World, **values: list[list[float]]) -> Params:
    """Parameters whose layers give the same output whatever they see, stage by stage."""
    params = dict(world.params)
    for layer, stages in values.items():
        kind = "mask" if layer == "conv_logits" else "bbox"
        for i, bias in enumerate(stages):
            name = f"roi_head.{kind}_head.{i}.{layer}"
            params[f"{name}.weight"] = torch.zeros_like(params[f"{name}.weight"])
            params[f"{name}.bias"] = torch.tensor(bias)
    return params


def test_scores_come_from_the_mean_logits_and_masks_from_the_mean_probabilities(world, tiny_batch):
    logits = torch.tensor([[3.0, 0, 0, 0], [-1, 2, 0, 0], [1, 1, 0, 5]])
    masks = torch.tensor([[-4.0, 1, 0], [2, 1, 0], [0.5, 1, 0]])
    params = constant_heads(world, fc_cls=logits.tolist(), conv_logits=masks.tolist())
    inputs = world.inputs(tiny_batch([2, 1]))
    found = forward_detect.detect(params, world.buffers, world.config, inputs)
    assert found.valid.any()
    scores, probabilities = logits.mean(0).softmax(0), masks.sigmoid().mean(0)
    torch.testing.assert_close(found.scores, (scores[found.labels] * found.valid))
    expected = (probabilities[found.labels] * found.valid)[..., None, None]
    assert found.masks is not None
    torch.testing.assert_close(found.masks, expected.expand_as(found.masks))


def test_scores_may_come_from_the_mean_probabilities(world, tiny_batch):
    logits = torch.tensor([[3.0, 0, 0, 0], [-1, 2, 0, 0], [1, 1, 0, 5]])
    params = constant_heads(world, fc_cls=logits.tolist())
    inference = replace(world.config.inference, average="probabilities", score_threshold=0.0)
    config = replace(world.config, inference=inference)
    inputs = world.inputs(tiny_batch([2, 1]))
    found = forward_detect.detect(params, world.buffers, config, inputs)
    assert found.valid.any()
    scores = logits.softmax(-1).mean(0)
    torch.testing.assert_close(found.scores, scores[found.labels] * found.valid)


def test_each_stage_moves_the_boxes_of_the_one_before(world, tiny_batch):
    # Right by a tenth of the width, up by a fifth of the height, wider by e ** 0.1.
    moves = [[1.0, 0, 0, 0], [0.0, -4, 0, 0], [0.0, 0, 0.1 / 0.067, 0]]
    params = constant_heads(world, fc_reg=moves)
    inputs = world.inputs(tiny_batch([2, 1]))
    features = detector.extract(params, world.buffers, world.config, inputs.image)
    boxes = torch.tensor([[[20.0, 30, 40, 50]]]).expand(2, -1, -1)
    proposals = Proposals(boxes, torch.ones(2, 1), torch.ones(2, 1, dtype=torch.bool))
    _, moved = forward_detect.cascade_scores(
        params, world.config, features.pyramid, proposals, inputs.size
    )
    half = 10 * math.exp(0.1)
    expected = torch.tensor([32 - half, 26, 32 + half, 46])
    torch.testing.assert_close(moved, expected.expand(2, 1, 4), rtol=1e-4, atol=1e-3)

    # The same when training: without proposals the objects alone are sampled, by every
    # stage afresh; a stage's refinement of an object isn't handed on.
    none = Proposals(boxes, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.bool))
    keys = tuple(torch.rand(2, 5 + n, generator=torch.manual_seed(0)) for n in (1, 32, 32))
    found, _, samples = forward_train.cascade_losses(
        params, world.config, features.pyramid, none, inputs, keys
    )
    for i, sample in enumerate(samples):
        assert sample.valid.sum(1).tolist() == [2, 1]
        assert torch.equal(sample.from_gt, sample.valid)
        assert found.measures[f"s{i}.positives"] == 1.5

    # With proposals, the next stage's candidates are where this one moved them.
    found, _, samples = forward_train.cascade_losses(
        params, world.config, features.pyramid, proposals, inputs, keys
    )
    for sample, x in zip(samples, (20, 22, 22), strict=True):
        proposed = sample.boxes[sample.valid & ~sample.from_gt]
        assert proposed.shape == (2, 4)
        assert proposed[:, 0].tolist() == pytest.approx([x, x], abs=1e-3)


def test_stage_losses_are_weighted(world, tiny_batch):
    batch = tiny_batch([3, 1])
    arguments = world.params, world.buffers
    inputs, noise = world.inputs(batch), world.noise(batch)
    weighted = measured(*arguments, world.config, inputs, noise)
    plain = replace(
        world.config, stages=tuple(replace(s, loss_weight=1.0) for s in world.config.stages)
    )
    raw = measured(*arguments, plain, inputs, noise)
    for i, weight in enumerate((1.0, 0.5, 0.25)):
        for part in ("loss_cls", "loss_bbox", "loss_mask"):
            name = f"s{i}.{part}"
            torch.testing.assert_close(weighted[name], weight * raw[name], msg=name)
        assert weighted[f"s{i}.acc"] == raw[f"s{i}.acc"]


def test_masks_are_read_where_the_canvas_shows_the_box(world, tiny_batch):
    inputs = world.inputs(tiny_batch([2, 1]))
    assert (inputs.scale > 1.2).all()
    arguments = world.params, world.buffers, world.config
    stored = forward_detect.detect(*arguments, inputs)
    # As if the stored image were the canvas: the same network, other units.
    canvas = forward_detect.detect(*arguments, inputs._replace(scale=torch.ones(2, 4)))
    assert torch.equal(stored.labels, canvas.labels)
    torch.testing.assert_close(stored.boxes * inputs.scale[:, None], canvas.boxes)
    torch.testing.assert_close(stored.masks, canvas.masks, rtol=1e-4, atol=1e-4)


def test_nothing_found_is_all_padding(world, tiny_batch):
    config = replace(world.config, inference=InferenceConfig(score_threshold=1.0, detections=10))
    batch = tiny_batch([2, 1])
    found = forward_detect.detect(world.params, world.buffers, config, world.inputs(batch))
    assert found.mask_scores is None
    for tensor in found[:5]:
        assert (tensor == 0).all()


@pytest.mark.parametrize(
    ("mode", "detections"), [("eager", 100), ("eager", 7), ("compiled", 7)], indirect=["mode"]
)
def test_selection_reproduces_the_reference(unit_goldens, mode, detections):
    boxes, scores, dets, labels = (
        unit_goldens[f"mcnms.{k}"] for k in ("boxes", "scores", "dets", "labels")
    )
    config = InferenceConfig(detections=detections)
    # The logarithm of probabilities that sum to one: softmax gives them back.
    logits, valid = scores.log()[None], torch.ones(1, len(boxes), dtype=torch.bool)
    made = mode(lambda *a: forward_detect.select(config, *a))(logits, boxes[None], valid)
    found, score, label, kept = (t[0] for t in made)
    assert kept.all()
    assert torch.equal(found, dets[:detections, :4])
    torch.testing.assert_close(score, dets[:detections, 4], rtol=1e-5, atol=1e-6)
    assert torch.equal(label, labels[:detections])


def test_selection_leaves_padded_boxes_out():
    logits = torch.tensor([[[5.0, 0, 0], [9, 0, 0], [0, 4, 0]]])
    boxes = torch.tensor([[[0.0, 0, 9, 9], [0, 0, 9, 9], [0, 0, 9, 9]]])
    valid = torch.tensor([[True, False, True]])
    config = InferenceConfig(detections=4, score_threshold=0.5)
    found, scores, labels, kept = forward_detect.select(config, logits, boxes, valid)
    assert kept.tolist() == [[True, True, False, False]]
    assert labels.tolist() == [[0, 1, 0, 0]]
    assert (found[0, 2:] == 0).all()
    assert scores[0, 0].item() == pytest.approx(math.exp(5) / (math.exp(5) + 2), rel=1e-5)


def scored(seed: int = 0, proposals: int = 40, classes: int = 5):
    """Logits, boxes that overlap, and validity of two images."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, proposals, classes + 1, generator=generator) * 3
    corner = torch.rand(2, proposals, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + 10 + torch.rand(corner.shape, generator=generator) * 30], 2)
    return logits, boxes, torch.rand(2, proposals, generator=generator) < 0.8


def test_classes_can_suppress_each_other():
    """As torchvision's nms over all boxes of all classes has it; compiled below."""
    logits, boxes, valid = scored()
    config = InferenceConfig(class_agnostic=True, detections=200)
    made = forward_detect.select(config, logits, boxes, valid)
    scores = logits.softmax(-1)[..., :-1]
    for image in range(2):
        place = ((scores[image] > 0.05) & valid[image, :, None]).nonzero()
        score, box = scores[image][tuple(place.T)], boxes[image][place[:, 0]]
        kept = torchvision.ops.nms(box, score, 0.5)
        found, found_scores, labels, there = (t[image] for t in made)
        assert there.sum() == len(kept)
        torch.testing.assert_close(found[there], box[kept])
        torch.testing.assert_close(found_scores[there], score[kept])
        assert torch.equal(labels[there], place[kept, 1])


@pytest.mark.parametrize(
    ("mode", "agnostic"),
    # The reference's own selection is compiled above.
    [("eager", False), ("eager", True), ("compiled", True)],
    indirect=["mode"],
)
def test_only_some_classes_are_kept(mode, agnostic: bool):
    """What is left when the others' scores are nothing."""
    logits, boxes, valid = scored(1)
    config = InferenceConfig(class_agnostic=agnostic, classes=(1, 3), detections=30)
    made = mode(lambda *a: forward_detect.select(config, *a))(logits, boxes, valid)
    scores = logits.softmax(-1)
    scores[..., [0, 2, 4]] = 0
    rest = scores[..., :-1].sum(-1)
    alone = torch.cat([scores[..., :-1], (1 - rest)[..., None]], -1).log()
    expected = forward_detect.select(replace(config, classes=()), alone, boxes, valid)
    assert set(made[2][made[3]].tolist()) == {1, 3}
    for found, wanted in zip(made, expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("way", ["linear", "gaussian"])
def test_soft_suppression_is_the_papers(mode, way):
    """Class by class, box by box: f(IoU) of Bodla et al. (2017), Nt = 0.4 and sigma = 0.5."""
    logits, boxes, valid = scored(3)
    config = InferenceConfig(soft_nms=way, nms_iou=0.4, detections=200)
    made = mode(lambda *a: forward_detect.select(config, *a))(logits, boxes, valid)
    for image in range(2):
        overlaps = torchvision.ops.box_iou(boxes[image], boxes[image]).double()
        expected = []
        for label, scores in enumerate(logits[image].softmax(-1)[:, :-1].double().T):
            left = {
                i: scores[i].item() for i in range(len(scores))
                if scores[i] > config.score_threshold and valid[image, i]
            }  # fmt: skip
            while left:
                best = max(left, key=lambda i: left[i])
                expected.append((left.pop(best), label, best))
                for other in left:
                    iou = overlaps[best, other].item()
                    soft = math.exp(-(iou**2) / 0.5)
                    hard = 1 - iou if iou > 0.4 else 1.0
                    left[other] *= soft if way == "gaussian" else hard
        expected = sorted((e for e in expected if e[0] > config.score_threshold), reverse=True)
        box, score, label, there = (t[image] for t in made)
        assert there.sum() == len(expected) > 40
        assert score[there].tolist() == pytest.approx([e[0] for e in expected], rel=1e-4)
        assert label[there].tolist() == [e[1] for e in expected]
        assert torch.equal(box[there], boxes[image][[e[2] for e in expected]])


@pytest.mark.parametrize("way", ["linear", "gaussian"])
def test_soft_suppression_lowers_scores(way):
    logits, boxes, valid = scored(2)
    config = InferenceConfig(soft_nms=way, detections=60)
    soft = forward_detect.select(config, logits, boxes, valid)
    hard = forward_detect.select(replace(config, soft_nms="off"), logits, boxes, valid)
    # The best box of an image is nobody's to lower; what hard suppression dropped may be there.
    torch.testing.assert_close(soft[1][:, 0], hard[1][:, 0])
    assert way == "gaussian" or soft[3].sum() > hard[3].sum()
    assert (soft[1].diff(dim=1) <= 0).all()
    assert (soft[1][soft[3]] > config.score_threshold).all()
    assert all((t[~soft[3]] == 0).all() for t in soft[:3])
    original = logits.softmax(-1)[..., :-1].flatten(1).amax(1)
    assert (soft[1].amax(1) <= original).all()


def test_the_score_threshold_is_exclusive():
    # One class against background, undecided: exactly 0.5.
    logits, boxes = torch.zeros(1, 1, 2), torch.tensor([[[0.0, 0, 9, 9]]])
    valid = torch.ones(1, 1, dtype=torch.bool)
    for threshold, expected in ((0.5, False), (0.499, True)):
        config = InferenceConfig(score_threshold=threshold, detections=1)
        *_, kept = forward_detect.select(config, logits, boxes, valid)
        assert kept.item() == expected


def test_noise_differs_between_parts_and_images(world, tiny_batch):
    noise = world.noise(tiny_batch([2, 1]))
    assert noise.rpn.shape[1] == anchor_count(world.config.anchors, (96, 128))
    assert [k.shape[1] for k in noise.stages] == [5 + 64, 5 + 32, 5 + 32]
    parts = [noise.rpn[:, :37], *(k[:, :37] for k in noise.stages)]
    rows = {tuple(row.tolist()) for part in parts for row in part}
    assert len(rows) == 8


def test_different_seeds_sample_differently(world, tiny_batch):
    a, b = tiny_batch([3, 3]), tiny_batch([3, 3])
    b = b._replace(seed=b.seed + 77)
    inputs = world.inputs(a)
    arguments = world.params, world.buffers, world.config, inputs
    first = measured(*arguments, world.noise(a))
    assert first == measured(*arguments, world.noise(a))
    assert first["s0.loss_cls"] != measured(*arguments, world.noise(b))["s0.loss_cls"]


def test_losses_are_sums_over_counts_and_the_total_is_their_sum():
    """Whatever they are called: a measure may well have "loss" in its name."""
    sums = {"a": torch.tensor(6.0, requires_grad=True), "b": torch.tensor(0.5, requires_grad=True)}
    counts = {"a": torch.tensor(3.0), "b": torch.tensor(0.0)}
    found = LossSums(sums, counts, {"loss_of_time": torch.tensor(99.0)})
    total, shown = mean_losses(found)
    assert total == 2.5
    assert shown == {"a": 2.0, "b": 0.5, "loss_of_time": 99.0}
    assert not any(value.requires_grad for value in shown.values())
    total.backward()
    assert [value.grad for value in sums.values()] == [1 / torch.tensor(3.0), 1]
    assert mean_losses(found, torch.tensor([2.0, 0.25]))[0] == 5


def test_reference_settings_change_the_operators_only(world, tiny_batch):
    config = reference_settings(world.config)
    assert config.roi_align == "adaptive"
    assert config.mask_head.target == "bitmap"
    batch = tiny_batch([2, 1])
    bitmaps = torch.zeros(2, 5, 72, 96, dtype=torch.uint8)
    for image, slot in batch.valid.nonzero().tolist():
        x0, y0, x1, y1 = batch.boxes[image, slot].round().int().tolist()
        bitmaps[image, slot, y0:y1, x0:x1] = 1
    _, measures, grads = world.losses(batch._replace(bitmaps=bitmaps), config)
    assert all(v.isfinite() for v in measures.values())
    assert all(g.isfinite().all() for g in grads.values())
    # The same boxes come out but for RoIAlign's grid, which only rounds large RoIs.
    _, default, _ = world.losses(batch)
    assert measures["loss_rpn_cls"] == default["loss_rpn_cls"]
    torch.testing.assert_close(measures["s0.loss_cls"], default["s0.loss_cls"], rtol=0.1, atol=0)


def test_frozen_stages_do_not_train(world):
    names = set(detector.trainable(world.config, world.params))
    frozen = set(world.params) - names
    assert frozen
    assert all(n.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1")) for n in frozen)
    assert not any(n.startswith("backbone.layer1") for n in names)


# ---- fresh parameters: reference.md, "Init and schedule" ----


@pytest.fixture(scope="module")
def fresh() -> tuple[Params, Params]:
    return detector.init(DetectorConfig(), torch.Generator().manual_seed(0))


def expected_spread(name: str, shape: torch.Size) -> float | None:
    """Standard deviation of a fresh tensor; None where it is constant."""
    fan_in = math.prod(shape[1:])
    fan_out = shape[0] * math.prod(shape[2:])
    if name.endswith("upsample.weight"):
        return 1 / math.sqrt(3 * shape[1] * 4)
    if "mask_head" in name and "conv_logits" in name:
        return 1 / math.sqrt(3 * 256)
    if name.endswith("upsample.bias"):
        return 1 / math.sqrt(3 * 256 * 4)
    if len(shape) == 1:
        return None
    if name.startswith("backbone") or "mask_head" in name:
        return math.sqrt(2 / fan_out)
    if name.startswith("rpn_head"):
        return 0.01
    assert name.startswith(("neck", "roi_head.bbox_head"))
    return math.sqrt(2 / (fan_in + fan_out))


def is_uniform(name: str) -> bool:
    return name.startswith("neck") or "upsample" in name or "conv_logits" in name


def test_every_fresh_tensor_has_the_references_statistics(fresh):
    params, buffers = fresh
    assert len(params) + len(buffers) == 400
    for name, tensor in params.items():
        spread = expected_spread(name, tensor.shape)
        if spread is None:
            norm = ".bn" in name or "downsample.1" in name
            assert (tensor == (1 if norm and name.endswith("weight") else 0)).all(), name
            continue
        n = tensor.numel()
        assert abs(tensor.mean()) < 5 * spread / math.sqrt(n), name
        kurtosis = 1.8 if is_uniform(name) else 3.0
        error = 5 * math.sqrt((kurtosis - 1) / 4 / n)
        assert tensor.std(correction=0).item() == pytest.approx(spread, rel=error), name
        if is_uniform(name):
            assert tensor.abs().max() <= spread * math.sqrt(3) * 1.0001, name
            assert tensor.abs().max() >= spread * math.sqrt(3) * (1 - 20 / n), name
        else:
            # A normal's largest of n values: well beyond a uniform's.
            assert tensor.abs().max() > spread * (2.5 if n > 1000 else 2), name
    for name, tensor in buffers.items():
        assert (tensor == (1 if name.endswith("running_var") else 0)).all()


def test_fresh_heads_are_as_wide_as_the_reference_ends_up(fresh):
    params, _ = fresh
    # Published figures: Xavier, not the configured 0.01 and 0.001.
    for i in STAGES:
        name = f"roi_head.bbox_head.{i}"
        assert params[f"{name}.fc_cls.weight"].std().item() == pytest.approx(0.0425, abs=4e-4)
        assert params[f"{name}.fc_reg.weight"].std().item() == pytest.approx(0.0441, abs=2.5e-3)


def test_init_follows_the_generator(world):
    for seed, same in ((0, True), (1, False)):
        params, _ = detector.init(world.config, torch.Generator().manual_seed(seed))
        assert list(params) == list(world.params)
        assert (
            torch.equal(params["backbone.conv1.weight"], world.params["backbone.conv1.weight"])
            == same
        )


HEAD_CHOICES = {
    "4conv1fc": BoxHeadConfig(32, convs=4, conv_channels=16, fcs=1, norm="gn", loss="giou"),
    "ln": BoxHeadConfig(32, channels=64, convs=1, conv_channels=16, fcs=1, norm="ln", loss="ciou"),
    "own": BoxHeadConfig(32, channels=64, class_specific=True, loss="diou", box_weight=5.0),
}


@pytest.mark.parametrize("choice", HEAD_CHOICES)
def test_other_heads_learn_and_detect(world, tiny_batch, choice):
    config = replace(
        world.config,
        fpn=replace(world.config.fpn, norm="ln" if choice == "ln" else "none"),
        rpn=replace(world.config.rpn, convs=2),
        box_head=HEAD_CHOICES[choice],
        mask_head=replace(
            world.config.mask_head,
            stages="first",
            norm="ln" if choice == "ln" else "none",
            scoring=choice != "own",
        ),
    )
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    params = {k: v.requires_grad_() for k, v in params.items()}
    assert not [name for name in params if name.startswith("roi_head.mask_head.1")]
    batch = tiny_batch([3, 0, 2])
    inputs = world.inputs(batch)
    total, measures = mean_losses(
        forward_train.losses(params, buffers, config, inputs, world.noise(batch))
    )
    total.backward()
    assert total.isfinite()
    assert [name for name in measures if name.endswith("loss_mask")] == ["s0.loss_mask"]
    idle = [
        k for k, v in detector.trainable(config, params).items()
        if k.startswith(("rpn_head", "roi_head"))
        and (v.grad is None or not v.grad.isfinite().all() or not v.grad.any())
    ]  # fmt: skip
    assert not idle
    with torch.no_grad():
        found = forward_detect.detect(params, buffers, config, inputs)
    assert found.valid.any()
    assert found.boxes.isfinite().all()
    assert found.masks is not None
    assert (found.masks.flatten(2).amax(-1) > 0).equal(found.valid)
    assert (found.mask_scores is None) == (choice == "own")
    assert ("loss_mask_iou" in measures) == (choice != "own")


def test_one_mask_head_is_the_first_of_three(world, tiny_batch):
    """Its loss is the first stage's, and masks are its alone."""
    config = replace(world.config, mask_head=replace(world.config.mask_head, stages="first"))
    batch = tiny_batch([3, 2])
    inputs, noise = world.inputs(batch), world.noise(batch)
    one, three = (
        forward_train.losses(world.params, world.buffers, c, inputs, noise)
        for c in (config, world.config)
    )
    assert set(three.sums) - set(one.sums) == {"s1.loss_mask", "s2.loss_mask"}
    assert all(torch.equal(one.sums[name], three.sums[name]) for name in one.sums)
    features = detector.extract(world.params, world.buffers, config, inputs.image)
    boxes, labels = inputs.targets.boxes, inputs.targets.labels
    same = {
        k.replace("mask_head.0", f"mask_head.{i}"): v
        for i in STAGES for k, v in world.params.items() if "mask_head.0" in k
    }  # fmt: skip
    made, _ = forward_detect.detect_masks(world.params, config, features.pyramid, boxes, labels)
    right, _ = forward_detect.detect_masks(
        world.params | same, world.config, features.pyramid, boxes, labels
    )
    torch.testing.assert_close(made, right)


def test_each_class_moves_its_own_box(world, tiny_batch):
    """Box by box: a stage hands on the box of one class, and the last gives all of them."""
    config = replace(world.config, box_head=replace(world.config.box_head, class_specific=True))
    logits = [[0.0, 3, 0, 9], [0.0, 0, 3, 9], [3.0, 0, 0, 9]]  # the background is best of all
    # Class k moves right by k + 1 tenths of the width, in each stage's own deviations.
    deviations = (0.1, 0.05, 0.033)
    moves = [[v for k in range(3) for v in ((k + 1) / 10 / d, 0, 0, 0)] for d in deviations]
    params = dict(world.params)
    for i, (cls, reg) in enumerate(zip(logits, moves, strict=True)):
        for layer, bias in (("fc_cls", cls), ("fc_reg", reg)):
            name = f"roi_head.bbox_head.{i}.{layer}"
            width = params[f"{name}.weight"].shape[1]
            params[f"{name}.weight"] = torch.zeros(len(bias), width)
            params[f"{name}.bias"] = torch.tensor(bias)
    inputs = world.inputs(tiny_batch([2, 1]))
    features = detector.extract(params, world.buffers, config, inputs.image)
    start = torch.tensor([[[20.0, 30, 30, 50], [40.0, 30, 50, 50]]]).expand(2, -1, -1)
    there = torch.ones(2, 2, dtype=torch.bool)
    proposals = Proposals(start, torch.ones(2, 2), there)
    _, moved = forward_detect.cascade_scores(
        params, config, features.pyramid, proposals, inputs.size
    )
    # By 2 tenths (class 1), by 3 (class 2), then by 1, 2 and 3, of a width of 10.
    left = [[20 + 2 + 3 + k, 40 + 2 + 3 + k] for k in (1, 2, 3)]
    expected = torch.tensor(left).T.flatten()  # the class fastest
    assert moved.shape == (2, 6, 4)
    for image in moved:
        torch.testing.assert_close(image[:, 0], expected.float(), rtol=1e-4, atol=1e-3)

    # When training, a positive hands on its object's class.
    scene = inputs._replace(
        targets=inputs.targets._replace(
            boxes=torch.tensor([[[20.0, 30, 30, 50], *[[0.0] * 4] * 4]]).expand(2, -1, -1),
            labels=torch.full_like(inputs.targets.labels, 2),
            valid=(torch.arange(5) == 0).expand(2, -1),
        )
    )
    keys = tuple(torch.rand(2, 5 + n, generator=torch.manual_seed(0)) for n in (2, 32, 32))
    _, _, samples = forward_train.cascade_losses(
        params, config, features.pyramid, proposals, scene, keys
    )
    second = samples[1]
    for i in range(2):
        x = second.boxes[i][second.valid[i] & ~second.from_gt[i], 0]
        # The first proposal is the object, of class 2; the other is background's best, class 1.
        assert sorted(x.tolist()) == pytest.approx([20 + 3, 40 + 2], abs=1e-3)


def test_each_class_has_its_own_final_box(world, tiny_batch):
    """With all classes' deltas alike, the detections are those of a shared regression."""
    config = world.config
    own = replace(config, box_head=replace(config.box_head, class_specific=True))
    params = {
        k: v.repeat(config.classes, *[1] * (v.dim() - 1)) if "fc_reg" in k else v
        for k, v in world.params.items()
    }
    inputs = world.inputs(tiny_batch([3, 2]))
    right = forward_detect.detect(world.params, world.buffers, config, inputs)
    made = forward_detect.detect(params, world.buffers, own, inputs)
    for ours, theirs in zip(made, right, strict=True):
        torch.testing.assert_close(ours, theirs)
