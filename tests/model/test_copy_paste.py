"""Copy-paste against masks that numpy draws pixel by pixel."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casc.data.batch import Batch
from casc.model.copy_paste import chosen_objects, covered, covered_pixels, hide, left_of, paste
from casc.model.mask_head import MaskHeadConfig, MaskRois, mask_targets
from casc.model.preprocess import ImageConfig, prepare, random_view
from casc.model.targets import Targets

H, W, G, E = 28, 36, 5, 64


def drawn(rings: list[np.ndarray], height: int = H, width: int = W) -> np.ndarray:
    """The pixels whose centre a point's winding number says is inside: angles summed up."""
    y, x = np.mgrid[:height, :width] + 0.5
    turns = np.zeros((height, width))
    for ring in rings:
        angle = [np.arctan2(py - y, px - x) for px, py in ring.astype(np.float64)]
        for a, b in zip(angle, [*angle[1:], angle[0]], strict=True):
            turns += (b - a + np.pi) % (2 * np.pi) - np.pi
    return np.abs(turns) > 1


def outline(rng: np.random.Generator) -> list[np.ndarray]:
    """A star-shaped polygon, sometimes with a hole, clockwise on the screen; both float32."""
    count = int(rng.integers(3, 9))
    angle = (np.arange(count) + rng.uniform(0, 0.4, count)) * 2 * np.pi / count
    middle = rng.uniform(-2, (W + 2, H + 2))
    points = np.stack([np.cos(angle), np.sin(angle)], 1)
    reach = rng.uniform(2, 14) * rng.uniform(0.5, 1, (count, 1))
    rings = [(middle + reach * points).astype(np.float32)]
    if rng.random() < 0.3:
        rings.append((middle + 0.4 * reach * points)[::-1].astype(np.float32))
    return rings


def scenes(seed: int, counts: list[int]) -> tuple[list[list[list[np.ndarray]]], Targets]:
    """So many objects in each image, as rings and as targets."""
    rng = np.random.default_rng(seed)
    images = [[outline(rng) for _ in range(count)] for count in counts]
    edges, owner = torch.zeros(len(counts), E, 4), torch.zeros(len(counts), E, dtype=torch.long)
    boxes, valid = torch.zeros(len(counts), G, 4), torch.zeros(len(counts), G, dtype=torch.bool)
    bitmaps = torch.zeros(len(counts), G, H, W, dtype=torch.uint8)
    for i, objects in enumerate(images):
        at = 0
        for k, rings in enumerate(objects):
            for ring in rings:
                lines = np.concatenate([ring, np.roll(ring, -1, 0)], 1)
                edges[i, at : at + len(lines)] = torch.from_numpy(lines)
                owner[i, at : at + len(lines)] = k
                at += len(lines)
            low, high = rings[0].min(0), rings[0].max(0)
            box = np.concatenate([low, high]).clip(0, [W, H, W, H])
            boxes[i, k] = torch.from_numpy(box)
            valid[i, k] = bool((box[2:] > box[:2]).all())
            bitmaps[i, k] = torch.from_numpy(drawn(rings).astype(np.uint8))
    boxes *= valid[..., None]
    labels = torch.arange(G).expand(len(counts), -1) * valid
    return images, Targets(boxes, labels, valid, edges, owner, bitmaps)


def test_polygons_cover_the_pixels_that_numpy_draws():
    images, targets = scenes(1, [5, 3, 0, 4])
    used = torch.tensor([[True, False, True, True, True]] * 4)
    made = covered(targets.edges, used.gather(1, targets.edge_gt), (H, W))
    for i, objects in enumerate(images):
        expected = np.zeros((H, W), bool)
        for k, rings in enumerate(objects):
            expected |= drawn(rings) & bool(used[i, k])
        assert np.array_equal(made[i].numpy(), expected)
    assert made.any(dim=2).any(dim=1).tolist() == [True, True, False, True]


def extent(mask: np.ndarray) -> list[float]:
    ys, xs = np.nonzero(mask)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(ys) else [0, 0, 0, 0]


def test_what_is_left_is_counted_without_masks():
    images, targets = scenes(2, [5, 5, 1])
    shown = torch.from_numpy(np.random.default_rng(0).random((3, H, W)) < 0.4)
    shown[1, :, 10:] = False
    made = left_of(targets.edges, targets.edge_gt, shown, G)
    areas = covered_pixels(targets.edges, targets.edge_gt, G, (H, W))
    for i, objects in enumerate(images):
        for k, rings in enumerate(objects):
            mask = drawn(rings)
            left = mask & shown[i].numpy()
            assert areas[i, k] == mask.sum()
            assert made.pixels[i, k] == left.sum()
            assert made.boxes[i, k].tolist() == extent(left)
    assert (areas[2, 1:] == 0).all()


def test_any_number_of_objects_is_chosen_as_likely():
    valid = torch.tensor([[True, False, True, True, False, True]]).expand(6000, -1)
    chosen = chosen_objects(valid, torch.arange(6000), 1.0)
    assert not chosen[:, [1, 4]].any()
    numbers = chosen.sum(1)
    assert (torch.bincount(numbers, minlength=5) / 6000 - 0.2).abs().max() < 0.025
    # And each object is as often among them, also where one is chosen.
    for number in (1, 2, 3):
        shares = chosen[numbers == number][:, [0, 2, 3, 5]].float().mean(0)
        assert (shares - number / 4).abs().max() < 0.06
    half = chosen_objects(valid, torch.arange(6000), 0.5)
    assert abs(half.any(1).float().mean() - 0.4) < 0.03
    assert not chosen_objects(valid & False, torch.arange(6000), 1.0).any()
    assert not chosen_objects(valid, torch.arange(6000), 0.0).any()


def check_pasted(seed: int, counts: list[int], run) -> tuple[int, int]:
    """Every pixel, box and mask target; how many objects were cut, and how many are gone."""
    images, targets = scenes(seed, counts)
    pixels = torch.from_numpy(np.random.default_rng(seed).random((len(counts), H, W, 3)))
    seeds = torch.arange(len(counts)) * 31 + 1000 * seed
    image, made = run(pixels, targets, seeds, 1.0)
    assert made.pasted is not None
    assert made.bitmaps is not None
    cut = gone = 0
    for i, own in enumerate(images):
        source = (i + 1) % len(images)
        # What covers no pixel can't be pasted.
        there = torch.tensor([drawn(r).any() for r in images[source]], dtype=torch.bool)
        there = torch.nn.functional.pad(there, (0, G - len(there))) & targets.valid[source]
        chosen = chosen_objects(there[None], seeds[i : i + 1], 1.0)[0]
        assert torch.equal(made.valid[i, G:], chosen)
        over = np.zeros((H, W), bool)
        for k, rings in enumerate(images[source]):
            if chosen[k]:
                over |= drawn(rings)
                assert torch.equal(made.boxes[i, G + k], targets.boxes[source, k])
                assert made.labels[i, G + k] == targets.labels[source, k]
        assert np.array_equal(made.pasted[i].numpy(), over)
        expected = np.where(over[..., None], pixels[source].numpy(), pixels[i].numpy())
        assert np.array_equal(image[i].numpy(), expected)
        for k, rings in enumerate(own):
            mask = drawn(rings)
            left = mask & ~over
            assert np.array_equal(made.bitmaps[i, k].numpy().astype(bool), left)
            if not targets.valid[i, k]:
                assert not made.valid[i, k]
                continue
            if mask.any():
                assert bool(made.valid[i, k]) == bool(left.any())
            gone += not made.valid[i, k]
            if not made.valid[i, k]:
                assert (made.boxes[i, k] == 0).all()
                continue
            box = targets.boxes[i, k].numpy()
            if (mask & over).any():
                cut += 1
                bounds = extent(left)
                box = np.concatenate(
                    [np.maximum(box[:2], bounds[:2]), np.minimum(box[2:], bounds[2:])]
                )
            assert made.boxes[i, k].numpy() == pytest.approx(box, abs=1e-5)
    check_mask_targets(images, made)
    return cut, gone


def check_mask_targets(images: list, made: Targets) -> None:
    """On a grid of the canvas's own pixels: each object's own shape, less what is hidden of it."""
    assert made.pasted is not None
    side, count = max(H, W), len(images)
    index = torch.arange(count * 2 * G)
    image, gt = index // (2 * G), index % (2 * G)
    grid = torch.tensor([[0.0, 0, side, side]]).expand(len(index), -1)
    rois = MaskRois(grid, image, gt, gt, gt >= 0)
    found = mask_targets(MaskHeadConfig(cells=side // 2), rois, made)
    # Below and beside the canvas, its last pixels are looked at.
    found = found[:, :H, :W].unflatten(0, (count, 2 * G)).numpy()
    shapes = [[half_covered(rings) for rings in objects] for objects in images]
    for i in range(count):
        over = made.pasted[i].numpy()
        for k, shape in enumerate(shapes[i]):
            assert (found[i, k] != shape & ~over).sum() <= 1  # a sample may lie on an edge
        for k, shape in enumerate(shapes[(i + 1) % count]):
            assert (found[i, G + k] != shape).sum() <= 1


def half_covered(rings: list[np.ndarray]) -> np.ndarray:
    """The pixels of which most of 3 x 3 samples are inside."""
    fine = drawn([3 * ring.astype(np.float64) for ring in rings], 3 * H, 3 * W)
    return fine.reshape(H, 3, W, 3).sum(axis=(1, 3)) > 4


def test_pasted_images_and_targets(mode):
    cut, _ = check_pasted(0, [5, 4, 5, 3], mode(paste))
    assert cut >= 4


@settings(max_examples=25)
@given(st.integers(1, 10_000))
def test_any_scene(seed):
    rng = np.random.default_rng(seed)
    check_pasted(seed, rng.integers(0, 6, 3).tolist(), paste)


def square(x: float, y: float, side: float) -> torch.Tensor:
    points = torch.tensor([[x, y], [x + side, y], [x + side, y + side], [x, y + side]])
    return torch.cat([points, points.roll(-1, 0)], 1)


def test_what_is_wholly_hidden_is_no_ground_truth():
    """Also what lies between pixels' centres, when the pixel that it lies in is hidden."""
    edges = torch.cat([square(4, 4, 6), square(20.1, 8.1, 0.3), square(5.6, 5.6, 0.3)])[None]
    owner = torch.arange(3).repeat_interleave(4)[None]
    boxes = torch.stack(
        [torch.cat([e[:, :2].amin(0), e[:, :2].amax(0)]) for e in edges[0].split(4)]
    )
    valid = torch.ones(1, 3, dtype=torch.bool)
    targets = Targets(boxes[None], valid.long(), valid, edges, owner)
    pasted = torch.zeros(1, H, W, dtype=torch.bool)
    areas = covered_pixels(edges, owner, 3, (H, W))
    assert areas.tolist() == [[36, 0, 0]]
    same = hide(targets, pasted, areas)
    assert torch.equal(same.boxes, targets.boxes)
    assert same.valid.all()
    pasted[0, 4:10, 4:10] = True
    assert hide(targets, pasted, areas).valid.tolist() == [[False, True, False]]
    pasted[0, 9, 7] = False
    left = hide(targets, pasted, areas)
    assert left.valid.tolist() == [[True, True, False]]
    assert left.boxes[0].tolist() == [[7, 9, 8, 10], boxes[1].tolist(), [0, 0, 0, 0]]


def test_objects_without_a_mask_stay_where_they_are():
    """Boxes alone have no pixels to paste; regions to ignore are the image's own."""
    _, targets = scenes(3, [3, 3])
    regions = torch.arange(8.0).reshape(2, 1, 4)
    bare = targets._replace(edges=torch.zeros_like(targets.edges), regions=regions)
    image, made = paste(torch.rand(2, H, W, 3), bare, torch.arange(2), 1.0)
    assert not made.valid[:, G:].any()
    assert torch.equal(made.valid[:, :G], targets.valid)
    assert torch.equal(made.boxes[:, :G], targets.boxes)
    assert made.regions is regions
    assert image.shape == (2, H, W, 3)


def test_a_batch_is_pasted_after_its_jitter():
    """Pixels that show another image's are those of its own view at the same place."""
    rng = np.random.default_rng(4)
    ring = np.array([[8, 6], [34, 9], [30, 30], [10, 26]], np.float32)
    edges = torch.from_numpy(np.concatenate([ring, np.roll(ring, -1, 0)], 1)).expand(3, -1, -1)
    batch = Batch(
        image=torch.from_numpy(rng.integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)),
        size=torch.tensor([[40.0, 50.0]]).expand(3, -1),
        boxes=torch.tensor([[[8.0, 6, 34, 30]]]).expand(3, -1, -1),
        labels=torch.tensor([[0], [1], [2]]),
        valid=torch.ones(3, 1, dtype=torch.bool),
        edges=edges,
        edge_gt=torch.zeros(3, 4, dtype=torch.long),
        image_id=torch.arange(3),
        seed=torch.tensor([3, 14, 15]),
    )
    plain = ImageConfig(jitter=(0.6, 1.4), jitter_size=64)
    config, canvas = replace(plain, copy_paste=1.0), (64, 64)
    view = random_view(batch.size, batch.seed, config, canvas)
    before = prepare(batch, view, plain, canvas, torch.float32)
    made = prepare(batch, view, config, canvas, torch.float32)
    assert made.targets.pasted is not None
    assert before.targets.pasted is None
    some = 0
    for i in range(3):
        over = made.targets.pasted[i]
        some += bool(over.any())
        expected = torch.where(over, before.image[(i + 1) % 3], before.image[i])
        assert torch.equal(made.image[i], expected)
        assert bool(over.any()) == bool(made.targets.valid[i, 1])
        assert made.targets.labels[i].tolist() in ([i, (i + 1) % 3], [i, 0], [0, (i + 1) % 3])
    assert some
    # At inference nothing is pasted.
    assert prepare(batch, None, config, canvas, torch.float32).targets.pasted is None
