import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from safetensors.torch import load_file
from torch import Tensor

from casc.data.batch import Batch
from casc.data.decode import decode_image
from casc.data.index import Bucket
from casc.model.detector import Inputs
from casc.model.mask_targets import polygon_targets
from casc.model.preprocess import (
    ImageConfig,
    View,
    plain_view,
    prepare,
    random_view,
    resized,
    training_canvas,
)

PHOTOGRAPHS = Path(__file__).resolve().parents[3] / "shared/coco_mini/train2017"
"""Real ones where they lie beside the project; they are never a part of it."""


def make_batch(
    images: list[np.ndarray],
    boxes: list[list[list[float]]] | None = None,
    edges: np.ndarray | None = None,
    bitmaps: list[np.ndarray] | None = None,
    stored: tuple[int, int] = (80, 100),
) -> Batch:
    """Images (RGB) on one canvas with their objects."""
    count = len(images)
    boxes = boxes or [[] for _ in images]
    capacity = max([1, *(len(b) for b in boxes)])
    pixels = torch.zeros(count, *stored, 3, dtype=torch.uint8)
    padded = torch.zeros(count, capacity, 4)
    valid = torch.zeros(count, capacity, dtype=torch.bool)
    maps = torch.zeros(count, capacity, *stored, dtype=torch.uint8)
    for i, (image, rows) in enumerate(zip(images, boxes, strict=True)):
        pixels[i, : image.shape[0], : image.shape[1]] = torch.from_numpy(image)
        for k, row in enumerate(rows):
            padded[i, k] = torch.tensor(row)
            valid[i, k] = True
        if bitmaps:
            for k, bitmap in enumerate(bitmaps[i]):
                maps[i, k, : bitmap.shape[0], : bitmap.shape[1]] = torch.from_numpy(bitmap)
    return Batch(
        image=pixels,
        size=torch.tensor([image.shape[:2] for image in images], dtype=torch.float32),
        boxes=padded,
        labels=torch.zeros(count, capacity, dtype=torch.long),
        valid=valid,
        edges=torch.zeros(count, 1, 4)
        if edges is None
        else torch.from_numpy(edges.reshape(count, -1, 4)),
        edge_gt=torch.zeros(count, 1, dtype=torch.long)
        if edges is None
        else torch.arange(edges.shape[1]).repeat_interleave(edges.shape[2]).repeat(count, 1),
        image_id=torch.arange(count),
        seed=torch.arange(count),
        bitmaps=maps if bitmaps else None,
    )


def noise_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def run(batch: Batch, flip: Tensor | None, config: ImageConfig, canvas: tuple[int, int]) -> Inputs:
    view = None if flip is None else plain_view(batch.size, config)._replace(flip=flip)
    return prepare(batch, view, config, canvas, torch.float32)


# ---- sizes ----


def by_floats(height: np.ndarray, width: np.ndarray, short: int, long: int):
    """The reference: int(side * scale + 0.5) in double precision."""
    scale = np.minimum(long / np.maximum(height, width), short / np.minimum(height, width))
    return np.floor(height * scale + 0.5).astype(int), np.floor(width * scale + 0.5).astype(int)


@pytest.mark.parametrize(("short", "long"), [(800, 1333), (480, 640), (256, 320)])
def test_every_size_is_the_references(short, long):
    height, width = (g.ravel() for g in np.mgrid[32:701, 32:701])
    size = torch.from_numpy(np.stack([height, width], axis=1))
    ours = resized(size, short, long).numpy()
    theirs = np.stack(by_floats(height, width, short, long), axis=1)
    differ = np.flatnonzero((ours != theirs).any(axis=1))
    # Only where the exact side ends in one half can rounding in floats fall below it.
    for row in differ:
        h, w = int(height[row]), int(width[row])
        scale = min(Fraction(long, max(h, w)), Fraction(short, min(h, w)))
        for side, mine, other in zip((h, w), ours[row], theirs[row], strict=True):
            if mine != other:
                assert side * scale % 1 == Fraction(1, 2)
                assert mine == other + 1
    # How rare that is: one image size in ten thousand.
    assert len(differ) < 1e-4 * len(size)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 2000), st.integers(1, 3000))
def test_sizes_are_exact_for_any_request(height, width, short, long):
    made = resized(torch.tensor([[height, width]]), short, long)[0].tolist()
    scale = min(Fraction(long, max(height, width)), Fraction(short, min(height, width)))
    assert made == [int(side * scale + Fraction(1, 2)) for side in (height, width)]


# ---- pixels ----

SIZES = {
    "up": ((40, 60), (100, 160)),
    "down": ((80, 100), (40, 64)),
    "limited by the long side": ((30, 95), (90, 96)),
    "portrait": ((80, 45), (90, 160)),
    "as it is": ((48, 64), (48, 64)),
}


@pytest.mark.parametrize("name", SIZES)
def test_resampling_is_opencvs_bilinear(name):
    (height, width), (short, long) = SIZES[name]
    image = noise_image(height, width)
    config = ImageConfig(short=short, long=long, mean=(0, 0, 0), std=(1, 1, 1))
    made = run(make_batch([image]), None, config, (160, 160))
    new_height, new_width = (int(v) for v in made.size[0])
    exact = cv2.resize(image.astype(np.float32), (new_width, new_height))
    ours = made.image[0].permute(1, 2, 0)[:new_height, :new_width].numpy()
    np.testing.assert_allclose(ours, exact, atol=0.02)
    # On bytes OpenCV rounds its weights to 11 bits and its result to a grey level.
    rounded = cv2.resize(image, (new_width, new_height)).astype(np.float32)
    assert np.abs(ours - rounded).max() <= 0.5 + 0.3
    assert np.abs(ours - rounded).mean() <= 0.3


@pytest.mark.parametrize(("short", "long"), [(800, 1333), (256, 320)])
def test_photographs_are_within_half_a_grey_level_of_opencv(short, long):
    """The whole way: decoded, resized up or down, flipped, normalised and padded."""
    files = sorted(PHOTOGRAPHS.glob("*.jpg"))[:4]
    if not files:
        pytest.skip(f"no photographs in {PHOTOGRAPHS}")
    images = [decode_image(file.read_bytes()).copy() for file in files]
    batch = make_batch(images, stored=(640, 640))
    flip = torch.tensor([False, True, True, False])
    config, canvas = ImageConfig(short=short, long=long), (1344, 1344)
    made = run(batch, flip, config, canvas)
    for i, stored in enumerate(images):
        height, width = (int(v) for v in made.size[i])
        exact = cv2.resize(stored.astype(np.float32), (width, height))
        exact = exact[:, ::-1] if flip[i] else exact
        pixels = made.image[i].permute(1, 2, 0)[:height, :width].numpy()
        pixels = pixels * np.array(config.std) + np.array(config.mean)
        # Of the half that may be, in fact hardly anything.
        assert np.abs(pixels - exact).max() <= 0.05
        # On bytes OpenCV adds its own rounding, to a grey level and of its weights.
        rounded = cv2.resize(stored, (width, height)).astype(np.float32)
        rounded = rounded[:, ::-1] if flip[i] else rounded
        assert np.abs(pixels - rounded).max() <= 0.5 + 0.3
        assert np.abs(pixels - rounded).mean() <= 0.3


def test_flip_mirrors_the_resized_image():
    images = [noise_image(40, 60, 1), noise_image(70, 50, 2)]
    config, canvas = ImageConfig(short=64, long=96), (96, 96)
    batch = make_batch(images)
    plain = run(batch, None, config, canvas)
    unflipped = run(batch, torch.tensor([False, False]), config, canvas)
    assert torch.equal(plain.image, unflipped.image)
    mixed = run(batch, torch.tensor([True, False]), config, canvas)
    width = int(plain.size[0, 1])
    assert torch.equal(mixed.image[0, :, :, :width], plain.image[0, :, :, :width].flip(-1))
    assert torch.equal(mixed.image[1], plain.image[1])


def test_padding_is_zero_after_normalisation():
    images = [noise_image(40, 60, 1), np.zeros((70, 50, 3), np.uint8)]
    config, canvas = ImageConfig(short=64, long=96), (96, 128)
    for flip in (None, torch.tensor([True, True])):
        made = run(make_batch(images), flip, config, canvas)
        for i in range(2):
            height, width = (int(v) for v in made.size[i])
            assert (made.image[i, :, height:] == 0).all()
            assert (made.image[i, :, :, width:] == 0).all()
        # Black inside the image isn't 0: the mean was subtracted.
        height, width = (int(v) for v in made.size[1])
        mean, std = torch.tensor(config.mean), torch.tensor(config.std)
        inside = made.image[1, :, :height, :width]
        torch.testing.assert_close(
            inside, (-mean / std)[:, None, None].expand_as(inside), rtol=1e-5, atol=1e-5
        )


def test_normalisation_is_per_channel_in_rgb():
    image = np.full((32, 48, 3), (255, 128, 0), np.uint8)
    made = run(make_batch([image]), None, ImageConfig(short=32, long=48), (32, 64))
    pixel = made.image[0, :, 5, 5].tolist()
    expected = [(255 - 123.675) / 58.395, (128 - 116.28) / 57.12, (0 - 103.53) / 57.375]
    assert pixel == pytest.approx(expected, rel=1e-5)


def test_dtype_and_memory_format():
    batch = make_batch([noise_image(40, 60)])
    config, canvas = ImageConfig(short=64, long=96), (64, 96)
    exact = prepare(batch, None, config, canvas, torch.float32)
    assert exact.image.is_contiguous()
    low = prepare(batch, None, config, canvas, torch.bfloat16, torch.channels_last)
    assert low.image.dtype == torch.bfloat16
    assert low.image.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(low.image, exact.image.bfloat16())
    assert low.size.dtype == low.scale.dtype == low.targets.boxes.dtype == torch.float32


# ---- ground truth ----

BOXES = [[[5.0, 4, 30, 22], [-3, 10, 200, 39]], [[0.0, 0, 50, 70]]]


@pytest.mark.parametrize("flip", [None, [True, False], [True, True]])
def test_boxes_scale_per_axis_clip_and_mirror(flip):
    images = [noise_image(40, 60), noise_image(70, 50)]
    config, canvas = ImageConfig(short=64, long=90), (96, 96)
    coins = None if flip is None else torch.tensor(flip)
    made = run(make_batch(images, BOXES), coins, config, canvas)
    for i, (image, rows) in enumerate(zip(images, BOXES, strict=True)):
        height, width = image.shape[:2]
        ((new_height,), (new_width,)) = by_floats(np.array([height]), np.array([width]), 64, 90)
        assert made.size[i].tolist() == [new_height, new_width]
        # Each axis by its own rounded ratio, as the reference does.
        sx, sy = new_width / width, new_height / height
        assert made.scale[i].tolist() == pytest.approx([sx, sy, sx, sy], rel=1e-6)
        for k, (x1, y1, x2, y2) in enumerate(rows):
            x1, x2 = (min(max(x * sx, 0), new_width) for x in (x1, x2))
            y1, y2 = (min(max(y * sy, 0), new_height) for y in (y1, y2))
            if flip and flip[i]:
                x1, x2 = new_width - x2, new_width - x1
            box = made.targets.boxes[i, k].tolist()
            assert box == pytest.approx([x1, y1, x2, y2], rel=1e-5, abs=1e-4)
    # Padded slots stay 0, mirrored or not.
    assert (made.targets.boxes[1, 1] == 0).all()
    assert made.targets.valid.tolist() == [[True, True], [True, False]]


def test_edges_scale_and_mirror_without_clipping():
    edges = np.zeros((1, 1, 3, 4), np.float32)
    edges[0, 0, 0] = [-10, 5, 70, 12]
    edges[0, 0, 1] = [70, 12, 20, 50]
    batch = make_batch([noise_image(40, 60)], [[[0.0, 0, 60, 40]]], edges)
    config, canvas = ImageConfig(short=60, long=90), (64, 96)
    plain = run(batch, None, config, canvas).targets.edges
    torch.testing.assert_close(plain, torch.from_numpy(edges[:, 0]) * 1.5)
    mirrored = run(batch, torch.tensor([True]), config, canvas).targets.edges[0]
    assert mirrored[0].tolist() == pytest.approx([105, 7.5, -15, 18])
    assert mirrored[1].tolist() == pytest.approx([-15, 18, 60, 75])
    # A padded edge has no length, wherever it lies.
    assert torch.equal(mirrored[2, :2], mirrored[2, 2:])


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("flip", [False, True])
def test_bitmaps_are_opencvs_nearest(name, flip):
    (height, width), (short, long) = SIZES[name]
    rng = np.random.default_rng(3)
    bitmaps = rng.integers(0, 2, (2, height, width), dtype=np.uint8)
    batch = make_batch(
        [noise_image(height, width)], [[[1.0, 1, 9, 9], [2, 2, 8, 8]]], bitmaps=[bitmaps]
    )
    config = ImageConfig(short=short, long=long)
    made = run(batch, torch.tensor([flip]), config, (160, 160))
    new_height, new_width = (int(v) for v in made.size[0])
    maps = made.targets.bitmaps
    assert maps is not None
    for k in range(2):
        expected = cv2.resize(bitmaps[k], (new_width, new_height), interpolation=cv2.INTER_NEAREST)
        expected = expected[:, ::-1] if flip else expected
        assert np.array_equal(maps[0, k, :new_height, :new_width].numpy(), expected)
    assert maps.sum() == maps[..., :new_height, :new_width].sum()


def test_compiled_equals_eager(compiled):
    edges = np.random.default_rng(0).uniform(0, 50, (2, 2, 5, 4)).astype(np.float32)
    images = [noise_image(40, 60), noise_image(70, 50)]
    maps = [np.random.default_rng(1).integers(0, 2, (2, 30, 40), dtype=np.uint8)] * 2
    batch = make_batch(images, [BOXES[0], BOXES[1] * 2], edges, maps)
    arguments = batch, torch.tensor([True, False]), ImageConfig(short=64, long=90), (96, 96)
    fast, slow = compiled(run)(*arguments), run(*arguments)
    torch.testing.assert_close(fast.image, slow.image, rtol=1e-5, atol=1e-4)
    assert torch.equal(fast.size, slow.size)
    for a, b in zip(fast.targets, slow.targets, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


def test_a_row_that_only_fills_the_batch_is_finite():
    batch = make_batch([noise_image(40, 60), np.zeros((1, 1, 3), np.uint8)])
    made = run(batch, torch.tensor([True, True]), ImageConfig(short=64, long=90), (96, 96))
    assert made.image.isfinite().all()
    assert made.scale.isfinite().all()
    assert not made.targets.valid.any()


# ---- the reference's own pipeline on set A: image 0 as it is, image 1 mirrored ----

GoldenSet = tuple[dict[str, Tensor], dict[str, Any], Batch]


@pytest.fixture(scope="module")
def set_a(golden_file: Callable) -> GoldenSet:
    tensors = load_file(golden_file("goldens_A_lite.safetensors"))
    facts = json.loads(golden_file("goldens_A.json").read_text())
    # OpenCV decodes to BGR.
    images = [tensors[f"raw.{i}"].numpy()[..., ::-1].copy() for i in range(2)]
    boxes, bitmaps = [], []
    for i, image in enumerate(images):
        kept = [a for a in facts["coco"]["annotations"] if a["image_id"] == i + 1]
        kept = [a for a in kept if not a["iscrowd"] and min(a["bbox"][2:]) >= 1]
        rows = np.array([a["bbox"] for a in kept], np.float32)
        boxes.append(np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:]], axis=1).tolist())
        size = image.shape[:2]
        rles = [coco_mask.merge(coco_mask.frPyObjects(a["segmentation"], *size)) for a in kept]
        bitmaps.append(np.stack([coco_mask.decode(rle) for rle in rles]))
    batch = make_batch(images, boxes, bitmaps=bitmaps, stored=(260, 300))
    return tensors, facts, batch


SET_A = ImageConfig(short=256, long=320)
FLIPPED = torch.tensor([False, True])


def grey_levels(ours: Tensor, theirs: Tensor) -> Tensor:
    """Absolute difference of normalised images in grey levels."""
    return ((ours - theirs) * torch.tensor(SET_A.std)[:, None, None]).abs()


def test_training_images_reproduce_the_reference(set_a):
    tensors, facts, batch = set_a
    made = run(batch, FLIPPED, SET_A, (256, 320))
    differ = grey_levels(made.image, tensors["train.img"])
    assert differ.max() <= 1
    assert differ.mean() <= 0.3
    for i, meta in enumerate(facts["train.meta"]):
        assert made.size[i].tolist() == meta["img_shape"][:2]
        torch.testing.assert_close(made.scale[i], torch.tensor(meta["scale_factor"]))


def test_test_images_reproduce_the_reference(set_a):
    tensors, facts, batch = set_a
    made = run(batch, None, SET_A, (256, 320))
    for i in range(2):
        expected = tensors[f"test{i}.img"]
        height, width = expected.shape[2:]
        differ = grey_levels(made.image[i : i + 1, :, :height, :width], expected)
        assert differ.max() <= 1
        assert differ.mean() <= 0.3
        assert made.size[i].tolist() == facts[f"test{i}.meta"]["img_shape"][:2]


def test_training_boxes_reproduce_the_reference(set_a):
    tensors, _, batch = set_a
    made = run(batch, FLIPPED, SET_A, (256, 320)).targets
    for i in range(2):
        expected = tensors[f"train.gt_bboxes.{i}"]
        assert made.valid[i].sum() == len(expected)
        boxes = made.boxes[i, : len(expected)]
        torch.testing.assert_close(boxes, expected, rtol=0, atol=1e-4)


def test_training_bitmaps_reproduce_the_reference(set_a):
    tensors, _, batch = set_a
    maps = run(batch, FLIPPED, SET_A, (256, 320)).targets.bitmaps
    assert maps is not None
    for i in range(2):
        expected = tensors[f"train.gt_masks.{i}"]
        count, height, width = expected.shape
        assert torch.equal(maps[i, :count, :height, :width], expected)


# ---- multi-scale training and large-scale jitter ----

MULTI = ImageConfig(short=64, long=120, train_short=(40, 72), mean=(0, 0, 0), std=(1, 1, 1))
JITTER = ImageConfig(jitter=(0.1, 2.0), jitter_size=64, mean=(0, 0, 0), std=(1, 1, 1))
WIDE = Bucket("wide", 1.0, None, 80, 100, 4, 6, 0)


def seen(config: ImageConfig, sizes: list[tuple[int, int]], first: int = 0):
    canvas = training_canvas(WIDE, config)
    seed = torch.arange(first, first + len(sizes))
    return random_view(torch.tensor(sizes, dtype=torch.float32), seed, config, canvas), canvas


def test_the_shorter_side_is_any_of_the_range():
    view, canvas = seen(MULTI, [(50, 60)] * 4000)
    sides, counts = view.size[:, 0].unique(return_counts=True)
    assert sides.tolist() == list(range(40, 73))
    # Each as likely: 121 expected, and 5 standard deviations of it.
    assert (counts - 4000 / 33).abs().max() < 5 * (4000 / 33) ** 0.5
    assert view.corner is None
    assert 0.45 < view.flip.float().mean() < 0.55
    # An image that is limited by its longer side is so at every scale.
    view, _ = seen(MULTI, [(20, 100)] * 50)
    assert view.size[:, 1].unique().tolist() == [120]
    assert canvas == (96, 128)
    for size in ((50, 50), (60, 61), (33, 100)):
        view, _ = seen(MULTI, [size] * 300)
        assert (view.size <= torch.tensor(canvas)).all()


def test_the_factor_of_the_jitter_is_uniform():
    view, canvas = seen(JITTER, [(48, 96)] * 4000)
    assert canvas == (64, 64)
    longer = view.size[:, 1]
    assert (longer.min().item(), longer.max().item()) == (6, 128)
    share = torch.histc(longer.float(), bins=4, min=6, max=128) / 4000
    assert (share - 0.25).abs().max() < 0.04
    # Aspect is kept, to whole pixels.
    assert ((2 * view.size[:, 0] - longer).abs() <= 1).all()
    assert view.corner is not None
    beyond = (view.size - 64).clamp(min=0)
    assert (view.corner >= 0).all()
    assert (view.corner <= beyond).all()
    # Windows lie anywhere between both ends.
    cut = beyond[:, 1] > 20
    where = view.corner[cut, 1] / beyond[cut, 1]
    assert (where == 0).any()
    assert (where == 1).any()
    assert abs(where.mean() - 0.5) < 0.04


def test_noise_is_each_samples_own():
    """Neither its neighbours in the batch nor their number change how an image is seen."""
    sizes = [(50, 60), (40, 90), (70, 71), (33, 80)]
    for config in (MULTI, JITTER):
        together, _ = seen(config, sizes, first=7)
        for i, size in enumerate(sizes):
            alone, _ = seen(config, [size], first=7 + i)
            for a, b in zip(together, alone, strict=True):
                if a is not None and b is not None:
                    assert torch.equal(a[i : i + 1], b)
                else:
                    assert a is b is None
    flips = [seen(config, [(50, 60)] * 64)[0].flip for config in (ImageConfig(), MULTI, JITTER)]
    assert torch.equal(flips[0], flips[1])
    assert torch.equal(flips[0], flips[2])


def brute(image: np.ndarray, view: View, i: int, canvas: tuple[int, int]) -> np.ndarray:
    """An image as OpenCV resizes it, cropped, mirrored and padded by slices."""
    height, width = view.size[i].tolist()
    made = cv2.resize(image.astype(np.float32), (width, height))
    if view.corner is not None:
        row, column = view.corner[i].tolist()
        made = made[row : row + canvas[0], column : column + canvas[1]]
        below, beside = canvas[0] - made.shape[0], canvas[1] - made.shape[1]
        made = np.pad(made, ((0, below), (0, beside), (0, 0)), constant_values=128)
    if view.flip[i]:
        made = made[:, ::-1]
    padded = np.zeros((*canvas, 3), np.float32)
    padded[: made.shape[0], : made.shape[1]] = made
    return padded


@pytest.mark.parametrize("config", [MULTI, JITTER], ids=["multi-scale", "jitter"])
def test_pixels_are_those_that_opencv_and_slices_give(config):
    sizes = [(50, 60), (40, 90), (70, 100), (33, 80)] * 6
    images = [noise_image(*size, seed=i) for i, size in enumerate(sizes)]
    batch = make_batch(images)
    view, canvas = seen(config, sizes)
    made = prepare(batch, view, config, canvas, torch.float32)
    for i, image in enumerate(images):
        expected = brute(image, view, i, canvas)
        np.testing.assert_allclose(made.image[i].permute(1, 2, 0).numpy(), expected, atol=0.02)
        shown = np.argwhere((expected != 0).any(-1)).max(0) + 1
        assert made.size[i].tolist() == shown.tolist()


def test_objects_move_with_their_pixels():
    """Bright rectangles, found again in the pictures, are where boxes and edges say."""
    config, count = ImageConfig(jitter=(0.8, 2.0), jitter_size=64), 60
    images, boxes = [], []
    edges = np.zeros((count, 1, 4, 4), np.float32)
    for i in range(count):
        rng = np.random.default_rng(i)
        x, y, w, h = *rng.integers(0, 40, 2), *rng.integers(12, 30, 2)
        image = np.zeros((70, 80, 3), np.uint8)
        image[y : y + h, x : x + w] = 255
        corners = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])
        edges[i, 0] = np.concatenate([corners, np.roll(corners, -1, 0)], axis=1)
        images.append(image)
        boxes.append([[float(v) for v in (x, y, x + w, y + h)]])
    bitmaps = [(image[None, ..., 0] > 0).astype(np.uint8) for image in images]
    batch = make_batch(images, boxes, edges, bitmaps)
    view, canvas = seen(config, [(70, 80)] * count)
    made = prepare(
        batch, view, replace(config, mean=(0, 0, 0), std=(1, 1, 1)), canvas, torch.float32
    )
    gt, gone, cut = made.targets, 0, 0
    assert gt.bitmaps is not None
    for i in range(count):
        bright = (made.image[i, 0].numpy() > 127.5) & (made.image[i, 0].numpy() != 128)
        ys, xs = np.nonzero(bright)
        if not gt.valid[i, 0]:
            gone += 1
            assert len(ys) == 0
            assert (gt.boxes[i] == 0).all()
            continue
        box = gt.boxes[i, 0].tolist()
        assert box == pytest.approx([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], abs=1.1)
        whole = np.array(boxes[i][0]) * made.scale[i].numpy()
        cut += (box[2] - box[0]) < (whole[2] - whole[0]) - 0.5
        # The outline is the whole object's; within the window it covers the same pixels.
        zero = torch.zeros(1, dtype=torch.long)
        window = torch.tensor([[0.0, 0, 64, 64]])
        outline = gt.edges[i : i + 1], gt.edge_gt[i : i + 1]
        covered = polygon_targets(*outline, window, zero, zero, 64)[0].numpy()
        assert (covered != bright).mean() < 0.03
        nearest = gt.bitmaps[i, 0].numpy() > 0
        assert (nearest != bright).mean() < 0.03
    assert gone >= 1
    assert cut >= 5


@pytest.mark.slow
def test_both_compile_to_the_same(compiled):
    sizes = [(50, 60), (40, 90)]
    batch = make_batch([noise_image(*size) for size in sizes], BOXES)
    edges = torch.tensor(np.random.default_rng(0).uniform(0, 50, (2, 10, 4)), dtype=torch.float32)
    batch = batch._replace(edges=edges, edge_gt=torch.arange(10).repeat(2, 1) // 5)

    def both(batch: Batch) -> list[Inputs]:
        made = []
        for config in (MULTI, JITTER):
            canvas = training_canvas(WIDE, config)
            view = random_view(batch.size, batch.seed, config, canvas)
            made.append(prepare(batch, view, config, canvas, torch.float32))
        return made

    for fast, slow in zip(compiled(both)(batch), both(batch), strict=True):
        torch.testing.assert_close(fast.image, slow.image, rtol=1e-5, atol=2e-3)
        assert torch.equal(fast.size, slow.size)
        assert torch.equal(fast.targets.valid, slow.targets.valid)
        torch.testing.assert_close(fast.targets.boxes, slow.targets.boxes, rtol=1e-5, atol=1e-4)
