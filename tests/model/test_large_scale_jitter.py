"""Large-scale jitter against Detectron2's ResizeScale, FixedSizeCrop and RandomFlip, rendered anew.

Of an annotation its DatasetMapper keeps what shapely leaves of the polygons, and with
recompute_boxes their bounds; filter_empty_instances drops those without area.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from casc.data.batch import Batch
from casc.model import noise
from casc.model.preprocess import ImageConfig, prepare, random_view

SIDE = 64
RAW = ImageConfig(antialias=True, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CONFIG = replace(RAW, jitter=(0.1, 2.0), jitter_size=SIDE)
STORED = (80, 100)


def sizes_of(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """The resized height and width, in double precision."""
    scale = min(SIDE * factor / size[0], SIDE * factor / size[1])
    height, width = np.round(np.multiply(size, scale)).astype(int).tolist()
    return height, width


def rendered(image: np.ndarray, factor: float, where: float, flip: bool) -> np.ndarray:
    """Resize by Pillow, crop, pad to the right and below, and mirror all of it."""
    height, width = sizes_of(image.shape[:2], factor)
    made = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    beyond = np.maximum(np.subtract((height, width), SIDE), 0)
    row, column = np.round(beyond * where).astype(int)
    made = made[row : row + SIDE, column : column + SIDE]
    canvas = np.full((SIDE, SIDE, 3), 128, np.uint8)
    canvas[: made.shape[0], : made.shape[1]] = made
    return canvas[:, ::-1] if flip else canvas


def clipped(ring: np.ndarray) -> np.ndarray:
    """A convex ring cut by the canvas, side after side (Sutherland and Hodgman, 1974)."""
    for axis, sign, limit in ((0, 1, 0), (0, -1, -SIDE), (1, 1, 0), (1, -1, -SIDE)):
        made = []
        for a, b in zip(ring, np.roll(ring, -1, 0), strict=True):
            da, db = sign * a[axis] - limit, sign * b[axis] - limit
            if da >= 0:
                made.append(a)
            if (da >= 0) != (db >= 0):
                made.append(a + (b - a) * da / (da - db))
        ring = np.array(made).reshape(-1, 2)
    return ring


def images(count: int) -> list[np.ndarray]:
    """Smooth pictures: noise would hide what rounding does."""
    made = []
    for i in range(count):
        rng = np.random.default_rng(i)
        small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        size = int(rng.integers(40, 101)), int(rng.integers(40, 81))
        made.append(np.asarray(small.resize(size, Image.Resampling.BICUBIC)))
    return made


def batch_of(pictures: list[np.ndarray], rings: list[np.ndarray]) -> Batch:
    """One convex polygon of six corners in each, whose annotated box is too large."""
    count = len(pictures)
    pixels = torch.zeros(count, *STORED, 3, dtype=torch.uint8)
    for i, picture in enumerate(pictures):
        pixels[i, : picture.shape[0], : picture.shape[1]] = torch.from_numpy(picture.copy())
    ring = torch.from_numpy(np.stack(rings)).float()
    low, high = ring.amin(1) - 1.5, ring.amax(1) + 1.5
    return Batch(
        image=pixels,
        size=torch.tensor([picture.shape[:2] for picture in pictures], dtype=torch.float32),
        boxes=torch.cat([low, high], 1)[:, None],
        labels=torch.zeros(count, 1, dtype=torch.long),
        valid=torch.ones(count, 1, dtype=torch.bool),
        edges=torch.cat([ring, ring.roll(-1, 1)], 2),
        edge_gt=torch.zeros(count, ring.shape[1], dtype=torch.long),
        image_id=torch.arange(count),
        seed=torch.arange(count) * 977 + 5,
    )


@pytest.fixture(scope="module")
def case() -> tuple[Batch, list[np.ndarray], list[np.ndarray]]:
    pictures, rings = images(60), []
    for i, picture in enumerate(pictures):
        rng = np.random.default_rng(1000 + i)
        angle = np.sort(rng.uniform(0, 2 * np.pi, 6))
        middle = rng.uniform(0.1, 0.9, 2) * picture.shape[1::-1]
        rings.append(middle + rng.uniform(3, 20) * np.stack([np.cos(angle), np.sin(angle)], 1))
    return batch_of(pictures, rings), pictures, rings


def drawn(batch: Batch, i: int) -> tuple[float, float, bool]:
    """The factor, the place of the crop and the flip that an image's noise stands for."""
    seed = batch.seed[i : i + 1]
    scale, where, flip = (
        noise.uniform(seed, purpose, 1).double().item()
        for purpose in (noise.SCALE, noise.CROP, noise.FLIP)
    )
    return 0.1 + 1.9 * scale, where, flip < 0.5


def test_pixels_are_detectron2s(case, mode):
    batch, pictures, _ = case

    def run(batch: Batch):
        return prepare(
            batch, random_view(batch.size, batch.seed, CONFIG, (SIDE, SIDE)), CONFIG,
            (SIDE, SIDE), torch.float32,
        )  # fmt: skip

    made = mode(run)(batch)
    assert (made.size == SIDE).all()
    larger = 0
    for i, picture in enumerate(pictures):
        factor, where, flip = drawn(batch, i)
        expected = rendered(picture, factor, where, flip).astype(np.float32)
        ours = made.image[i].permute(1, 2, 0).numpy()
        # Pillow rounds to grey levels after each direction.
        assert np.abs(ours - expected).max() <= 1.01
        assert np.abs(ours - expected).mean() < 0.36
        larger += max(sizes_of(picture.shape[:2], factor)) > SIDE
        padded = (expected == 128).all(-1)
        assert (ours[padded] == 128).sum() >= 0.95 * 3 * padded.sum()
    assert 15 < larger < 45


def test_boxes_are_detectron2s(case):
    batch, pictures, rings = case
    view = random_view(batch.size, batch.seed, CONFIG, (SIDE, SIDE))
    made = prepare(batch, view, CONFIG, (SIDE, SIDE), torch.float32).targets
    gone = cut = 0
    for i, (picture, ring) in enumerate(zip(pictures, rings, strict=True)):
        factor, where, flip = drawn(batch, i)
        height, width = sizes_of(picture.shape[:2], factor)
        assert view.size[i].tolist() == [height, width]
        row, column = np.round(np.maximum(np.subtract((height, width), SIDE), 0) * where)
        moved = ring * (width / picture.shape[1], height / picture.shape[0]) - (column, row)
        left = clipped(moved)
        sides = np.ptp(left, axis=0) if len(left) else np.zeros(2)
        assert bool(made.valid[i, 0]) == bool((sides > 1e-5).all())
        if not made.valid[i, 0]:
            gone += 1
            assert (made.boxes[i] == 0).all()
            continue
        if flip:
            left[:, 0] = SIDE - left[:, 0]
        expected = [*left.min(0), *left.max(0)]
        assert made.boxes[i, 0].tolist() == pytest.approx(expected, abs=1e-3)
        cut += len(left) != len(ring)
    assert gone >= 3
    assert cut >= 5


def test_sizes_and_places_are_detectron2s():
    """Many draws, in double precision: they differ where an exact half is rounded, if at all."""
    size = torch.tensor([[427.0, 640], [640, 480], [333, 500], [37, 512]]).repeat(500, 1)
    seed = torch.arange(len(size)) + 10**6
    config = ImageConfig(jitter=(0.1, 2.0), jitter_size=1024)
    view = random_view(size, seed, config, (1024, 1024))
    u, v = (noise.uniform(seed, p, 1).double().numpy() for p in (noise.SCALE, noise.CROP))
    stored = size.double().numpy()
    scale = (1024 * (0.1 + 1.9 * u) / stored).min(1, keepdims=True)
    new = np.round(stored * scale).astype(int)
    corner = np.round(np.maximum(new - 1024, 0) * v).astype(int)
    assert view.corner is not None
    assert (view.size.numpy() != new).sum() <= 1
    same = (view.size.numpy() == new).all(1)
    assert (view.corner.numpy()[same] != corner[same]).sum() <= 1


@pytest.mark.parametrize(
    "sizes", [((60, 90), (17, 25)), ((60, 45), (60, 45)), ((31, 44), (70, 99))]
)
def test_antialiasing_is_pillows_in_floats(sizes):
    """Of single-channel floats Pillow doesn't round."""
    (height, width), (new_height, new_width) = sizes
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    config = replace(RAW, short=min(sizes[1]), long=max(sizes[1]))
    batch = batch_of([image], [np.zeros((6, 2))])
    made = prepare(batch, None, config, (96, 128), torch.float32)
    assert made.size[0].tolist() == [new_height, new_width]
    for channel in range(3):
        whole = Image.fromarray(image[..., channel].astype(np.float32), "F")
        expected = np.asarray(whole.resize((new_width, new_height), Image.Resampling.BILINEAR))
        ours = made.image[0, channel, :new_height, :new_width].numpy()
        np.testing.assert_allclose(ours, expected, atol=2e-3)
    assert (made.image[0, :, new_height:] == 0).all()
