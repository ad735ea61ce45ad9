from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from casc.model import mask_head as heads
from casc.model.box_head import RoiSample
from casc.model.mask_targets import bitmap_targets, polygon_targets
from casc.model.targets import Targets

CONFIG = heads.MaskHeadConfig(cells=4, convs=2, channels=6)
CLASSES, IN = 5, 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_params(config: heads.MaskHeadConfig = CONFIG) -> dict[str, Tensor]:
    params: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for stage in range(2):
        heads.init_mask_head(config, stage, CLASSES, IN, params, generator)
    return {k: v + 0.1 * randn(*v.shape, seed=1) for k, v in params.items()}


class Reference(nn.Module):
    """The reference's head, in torch's own layers: all classes at once."""

    def __init__(self, norm: str):
        super().__init__()
        bias = norm == "none"
        self.convs = nn.ModuleList(nn.Conv2d(c, 6, 3, padding=1, bias=bias) for c in (IN, 6))
        # As many groups as divide both 32 and the channels.
        self.norms = nn.ModuleList(nn.GroupNorm(2, 6) for _ in range(2) if not bias)
        self.upsample = nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.conv_logits = nn.Conv2d(6, CLASSES, 1)

    def load(self, params: dict[str, Tensor], stage: int) -> None:
        name = f"roi_head.mask_head.{stage}."
        state = {k.removeprefix(name): v for k, v in params.items() if k.startswith(name)}
        state = {k.replace(".conv.", "."): v for k, v in state.items()}
        for i in range(2):
            for kind in ("weight", "bias"):
                if f"convs.{i}.gn.{kind}" in state:
                    state[f"norms.{i}.{kind}"] = state.pop(f"convs.{i}.gn.{kind}")
        self.load_state_dict(state)

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = (self.norms[i](x) if len(self.norms) else x).relu()
        return self.conv_logits(self.upsample(x).relu())


@pytest.mark.parametrize(
    ("mode", "norm"),
    # Without norms the heads together are compiled below.
    [("eager", "none"), ("eager", "gn"), ("compiled", "gn")],
    indirect=["mode"],
)
def test_the_head_is_the_references(mode, norm):
    config = replace(CONFIG, norm=norm)
    params = {k: v.requires_grad_() for k, v in make_params(config).items()}
    net = Reference(norm)
    net.load({k: v.detach() for k, v in params.items()}, stage=1)
    features, labels = randn(7, IN, 4, 4, seed=2), torch.tensor([0, 4, 2, 2, 1, 3, 0])
    everything = net(features)
    mine = everything[torch.arange(7), labels]

    def run(params, features, labels):
        return heads.mask_head(params, config, 1, features, labels)

    made = mode(run)(params, features, labels)
    torch.testing.assert_close(made, mine, rtol=1e-4, atol=1e-5)
    all_classes = heads.mask_head(params, config, 1, features, None)
    torch.testing.assert_close(all_classes, everything, rtol=1e-4, atol=1e-5)

    weight = randn(*made.shape, seed=3)
    (made * weight).sum().backward()
    (mine * weight).sum().backward()
    theirs = {k: v.grad for k, v in net.named_parameters()}
    for name, param in params.items():
        if not name.startswith("roi_head.mask_head.1."):
            assert param.grad is None
            continue
        key = name.removeprefix("roi_head.mask_head.1.").replace(".conv.", ".")
        key = f"norms.{key[6]}.{key.rsplit('.', 1)[1]}" if ".gn." in key else key
        torch.testing.assert_close(param.grad, theirs[key], rtol=1e-3, atol=1e-4)


def test_heads_together_are_each_by_itself(mode):
    params = make_params()
    features = [randn(5, IN, 4, 4, seed=i).requires_grad_() for i in range(2)]
    labels = [torch.tensor([0, 4, 2, 2, 1]), torch.tensor([3, 3, 0, 1, 4])]
    weights = {k: v.requires_grad_() for k, v in params.items()}

    def run(params, features, labels):
        return heads.mask_heads(params, CONFIG, [1, 0], features, labels)

    made = mode(run)(weights, features, labels)
    pairs = zip((1, 0), features, labels, strict=True)
    right = torch.stack([heads.mask_head(weights, CONFIG, *each) for each in pairs])
    torch.testing.assert_close(made, right, rtol=1e-4, atol=1e-5)
    leaves = [*features, *(v for v in weights.values())]
    weight = randn(*made.shape, seed=3)
    grads, expected = (
        torch.autograd.grad((x * weight).sum(), leaves, allow_unused=True) for x in (made, right)
    )
    for mine, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_bfloat16_gives_float32_logits():
    params, features = make_params(), randn(7, IN, 4, 4, seed=2)
    labels = torch.arange(7) % CLASSES
    exact = heads.mask_head(params, CONFIG, 0, features, labels)
    made = heads.mask_head(params, CONFIG, 0, features.bfloat16(), labels)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("objects", [4, 0])
def test_the_loss_is_the_mean_over_the_valid(mode, objects):
    logits = randn(6, 8, 8).requires_grad_()
    targets, valid = randn(6, 8, 8, seed=1) > 0, torch.arange(6) < objects
    # Three RoIs of each of two stages.
    found = mode(heads.mask_losses)(*(t.unflatten(0, (2, 3)) for t in (logits, targets, valid)))
    assert [cells for _, cells in found] == [64 * min(objects, 3), 64 * max(objects - 3, 0)]
    total, cells = (torch.stack(column).sum() for column in zip(*found, strict=True))
    made = total / cells.clamp(min=1)
    made.backward()
    if objects:
        expected = F.binary_cross_entropy_with_logits(logits[valid], targets[valid].float())
        torch.testing.assert_close(made, expected)
    else:
        assert made == 0
    assert logits.grad is not None
    assert (logits.grad[~valid] == 0).all()


def make_sample(positives: list[int], slots: int = 6) -> RoiSample:
    """Samples with so many positives per image; each value tells where it comes from."""
    batch = len(positives)
    number = torch.arange(batch * slots).reshape(batch, slots)
    positive = torch.arange(slots) < torch.tensor(positives)[:, None]
    return RoiSample(
        boxes=number[..., None].expand(-1, -1, 4).float(),
        gt=number % 3,
        labels=torch.where(positive, number % CLASSES, CLASSES),
        valid=torch.ones_like(positive),
        positive=positive,
        from_gt=torch.zeros_like(positive),
        indices=number,
    )


def test_mask_rois_are_the_slots_that_can_be_positive():
    (rois,) = heads.mask_rois([make_sample([2, 0, 3])], max_positive=3)
    assert rois.boxes[:, 0].tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    assert rois.image.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert rois.gt.tolist() == [0, 1, 2] * 3
    assert rois.valid.tolist() == [True, True, False, False, False, False, True, True, True]
    # The class index of a negative would be out of the mask head's range.
    assert rois.labels.tolist() == [0, 1, 0, 0, 0, 0, 2, 3, 4]


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 5))
def test_packing_keeps_the_valid_in_order(flags, spare):
    valid = torch.tensor(flags)
    count = int(valid.sum())
    number = torch.arange(len(flags))
    rois = heads.MaskRois(
        number[:, None].expand(-1, 4).float(), number, 2 * number, 3 * number, valid
    )
    capacity = min(max(1, count + spare), len(flags))
    packed = heads.pack(rois, capacity)
    assert all(len(t) == capacity for t in packed)
    assert packed.valid.tolist() == [k < count for k in range(capacity)]
    assert packed.image[:count].tolist() == number[valid].tolist()
    # Rows stay together.
    assert torch.equal(packed.gt, 2 * packed.image)
    assert torch.equal(packed.labels, 3 * packed.image)
    assert torch.equal(packed.boxes[:, 0], packed.image.float())


def make_targets(bitmaps: Tensor | None = None) -> Targets:
    """Two images of two squares."""
    corner = torch.tensor([[[2.0, 3.0], [10.0, 12.0]], [[5.0, 5.0], [20.0, 4.0]]])
    boxes = torch.cat([corner, corner + 9], dim=-1)
    x0, y0, x1, y1 = boxes.unbind(-1)
    around = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    edges = [torch.stack([*around[i], *around[(i + 1) % 4]], -1) for i in range(4)]
    return Targets(
        boxes,
        torch.zeros(2, 2, dtype=torch.long),
        torch.ones(2, 2, dtype=torch.bool),
        torch.stack(edges, dim=2).flatten(1, 2),
        torch.arange(2).repeat_interleave(4).repeat(2, 1),
        bitmaps,
    )


ROIS = heads.MaskRois(
    torch.tensor([[0.0, 0, 12, 14], [8, 8, 20, 22], [4, 4, 16, 16], [0, 0, 32, 32]]),
    torch.tensor([0, 0, 1, 1]),
    torch.tensor([0, 1, 0, 1]),
    torch.zeros(4, dtype=torch.long),
    torch.ones(4, dtype=torch.bool),
)


def test_targets_are_those_of_each_rois_own_object():
    targets = make_targets()
    made = heads.mask_targets(CONFIG, ROIS, targets)
    for i in range(4):
        alone = targets.edges[ROIS.image[i]].reshape(2, 4, 4)[ROIS.gt[i]]
        zero = torch.zeros(1, dtype=torch.long)
        expected = polygon_targets(
            alone[None], zero.expand(1, 4), ROIS.boxes[i : i + 1], zero, zero, 8
        )
        assert torch.equal(made[i], expected[0])
    assert made.any(dim=(1, 2)).all()


def test_bitmap_targets_need_bitmaps():
    config = replace(CONFIG, target="bitmap")
    with pytest.raises(ValueError, match="bitmaps"):
        heads.mask_targets(config, ROIS, make_targets())
    bitmaps = torch.zeros(2, 2, 32, 32, dtype=torch.uint8)
    for image in range(2):
        for k, (x, y, *_) in enumerate(make_targets().boxes[image].int().tolist()):
            bitmaps[image, k, y : y + 9, x : x + 9] = 1
    made = heads.mask_targets(config, ROIS, make_targets(bitmaps))
    assert torch.equal(made, bitmap_targets(bitmaps, *ROIS[:3], cells=8))
    # Squares on whole pixels: both routes see the same shape but for its border.
    polygons = heads.mask_targets(CONFIG, ROIS, make_targets())
    assert (made == polygons).float().mean() > 0.9
