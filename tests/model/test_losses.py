from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import ops

from casc.model import losses


def case(seed: int = 0, rows: int = 40):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 7, generator=generator) * 3
    boxes, goal = torch.randn(2, rows, 4, generator=generator)
    labels = torch.randint(0, 7, (rows,), generator=generator)
    mask = torch.rand(rows, generator=generator) < 0.4
    return logits, boxes, goal, labels, mask


def all_losses(logits, boxes, goal, labels, mask):
    return (
        losses.cross_entropies(logits, labels, mask).sum(),
        losses.smooth_l1(boxes, goal, mask, 1.0).sum(),
        losses.smooth_l1(boxes, goal, mask, 1 / 9).sum(),
        losses.binary_cross_entropy(logits, (goal[:, :1] > 0).expand(-1, 7), mask[:, None]),
        losses.binary_cross_entropy(logits, goal[:, :1].sigmoid().expand(-1, 7), mask[:, None]),
    )


def selected(logits, boxes, goal, labels, mask):
    """The same with torch's own losses, on the rows that count alone."""
    logits, boxes, goal, labels = (t[mask] for t in (logits, boxes, goal, labels))
    hard = (goal[:, :1] > 0).float().expand(-1, 7)
    return (
        F.cross_entropy(logits, labels, reduction="sum"),
        F.smooth_l1_loss(boxes, goal, reduction="sum", beta=1.0),
        F.smooth_l1_loss(boxes, goal, reduction="sum", beta=1 / 9),
        F.binary_cross_entropy_with_logits(logits, hard, reduction="sum"),
        F.binary_cross_entropy_with_logits(
            logits, goal[:, :1].sigmoid().expand(-1, 7), reduction="sum"
        ),
    )


def gradients(function, logits, boxes, *rest):
    logits, boxes = logits.clone().requires_grad_(), boxes.clone().requires_grad_()
    values = function(logits, boxes, *rest)
    torch.stack(list(values)).sum().backward()
    return [*(v.detach() for v in values), logits.grad, boxes.grad]


def test_losses_are_torchs_on_the_rows_that_count(mode):
    expected = gradients(selected, *case())
    for made, right in zip(gradients(mode(all_losses), *case()), expected, strict=True):
        torch.testing.assert_close(made, right, rtol=1e-5, atol=1e-6)


def test_rows_that_do_not_count_are_exactly_zero():
    logits, boxes, goal, labels, mask = case()
    wild = torch.tensor([1e30, -1e30, 0.0, 88.0])
    logits[~mask] = 1e30 * torch.tensor([1.0, -1, 1, -1, 0, 1, -1])
    boxes[~mask] = wild
    goal[~mask] = -wild
    *values, logits_grad, boxes_grad = gradients(all_losses, logits, boxes, goal, labels, mask)
    assert (logits_grad[~mask] == 0).all()
    assert (boxes_grad[~mask] == 0).all()
    for made, right in zip(values, selected(logits, boxes, goal, labels, mask), strict=True):
        torch.testing.assert_close(made, right, rtol=1e-5, atol=1e-6)


def test_nothing_that_counts_is_zero_with_a_zero_gradient():
    logits, boxes, goal, labels, mask = case()
    for value in gradients(all_losses, logits, boxes, goal, labels, torch.zeros_like(mask)):
        assert (value == 0).all()


def test_binary_cross_entropy_is_torchs_to_the_bit(mode):
    """Written out it is another graph; what training computes must stay the same."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1000, generator=generator) * 5
    logits[:5] = torch.tensor([0.0, 1e30, -1e30, 88.0, -104.0])
    mask = torch.rand(1000, generator=generator) < 0.6
    mask[:5] = True

    def right(logits, targets):
        loss = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
        return torch.where(mask, loss, 0.0).sum() * 0.37

    def made(logits, targets):
        return losses.binary_cross_entropy(logits, targets, mask) * 0.37

    for targets in (torch.rand(1000, generator=generator), logits.roll(7) > 1):
        results = []
        for function in (mode(made), mode(right)):
            x = logits.clone().requires_grad_()
            value = function(x, targets)
            value.backward()
            results.append((value.detach(), x.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


TORCHVISIONS: dict[losses.BoxLoss, Callable[..., Tensor]] = {
    "giou": ops.generalized_box_iou_loss,
    "diou": ops.distance_box_iou_loss,
    "ciou": ops.complete_box_iou_loss,
}


def test_box_overlap_losses_are_torchvisions(mode):
    """Values and gradients, of boxes that overlap, don't, and are the same; the rest counts 0."""
    generator = torch.Generator().manual_seed(0)
    corner, target_corner = 60 * torch.rand(2, 50, 2, generator=generator)
    sides, target_sides = 1 + 50 * torch.rand(2, 50, 2, generator=generator)
    boxes = torch.cat([corner, corner + sides], dim=-1)
    target = torch.cat([target_corner, target_corner + target_sides], dim=-1)
    boxes[:5] = target[:5] + 0.001
    mask = torch.rand(50, generator=generator) < 0.8
    wild = boxes.clone()
    wild[~mask] = torch.tensor([1e30, 5.0, -1e30, 5.0])
    wild.requires_grad_()
    boxes.requires_grad_()
    # One graph of all kinds: they have most of it in common.
    every = mode(lambda *x: [losses.iou_loss(kind, *x).sum() for kind in TORCHVISIONS])
    for i, (kind, theirs) in enumerate(TORCHVISIONS.items()):
        made = every(wild, target, mask)[i]
        right = theirs(boxes[mask], target[mask], reduction="sum")
        torch.testing.assert_close(made, right, rtol=1e-5, atol=1e-5, msg=kind)
        (grad,) = torch.autograd.grad(made, wild)
        (expected,) = torch.autograd.grad(right, boxes)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6, msg=kind)
        assert (grad[~mask] == 0).all()
        nothing = losses.iou_loss(kind, wild, target, torch.zeros_like(mask))
        assert (nothing == 0).all()


@pytest.mark.parametrize("kind", ["giou", "diou", "ciou"])
def test_no_constant_is_copied_to_the_device(kind, monkeypatch):
    """A list that becomes a tensor is a copy that waits, at every step."""
    boxes = torch.tensor([[0.0, 0, 4, 4], [1.0, 1, 3, 5]])
    mask = torch.tensor([True, False])
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a constant is copied"))
    loss = losses.iou_loss(kind, boxes, boxes + 1, mask)
    assert loss.isfinite().all()
