"""Colour jitter and random erasing against torchvision and numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomErasing
from torchvision.transforms.v2 import functional as vision

from casc.data.batch import Batch
from casc.model import noise
from casc.model.photometric import (
    TRIES,
    colour_factors,
    erased_boxes,
    jitter_colours,
    within,
)
from casc.model.preprocess import ImageConfig, View, plain_view, prepare, random_view

FACTORS = torch.tensor(
    [[1.3, 0.6, 1.4, 0.1], [0.7, 1.4, 0.0, -0.25], [1.0, 1.0, 1.0, 0.5], [0.4, 0.0, 2.0, 0.0]]
)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """[B, 12, 15, 3], with grey, black, white and pure pixels among them."""
    rng = np.random.default_rng(seed)
    made = rng.integers(0, 256, (count, 12, 15, 3)).astype(np.float32)
    special = [[0, 0, 0], [255] * 3, [9] * 3, [255, 0, 0], [0, 255, 0], [0, 0, 255], [7, 7, 90]]
    made[:, 3, :7] = special
    return torch.from_numpy(made)


def by_torchvision(image: torch.Tensor, factors: list[float]) -> torch.Tensor:
    """The four of them on one image [h, w, 3], in the order that they have here."""
    made = image.permute(2, 0, 1) / 255
    made = vision.adjust_brightness(made, factors[0])
    made = vision.adjust_contrast(made, factors[1])
    made = vision.adjust_saturation(made, factors[2])
    return vision.adjust_hue(made, factors[3]).permute(1, 2, 0) * 255


def test_colours_are_torchvisions(mode):
    images = pictures(4)
    # Contrast goes by the mean of the image, not of what is around it.
    inside = torch.zeros(4, 12, 15, dtype=torch.bool)
    sizes = [(12, 15), (12, 9), (7, 15), (5, 8)]
    for i, (h, w) in enumerate(sizes):
        inside[i, :h, :w] = True
    made = mode(jitter_colours)(images, inside, FACTORS)
    for i, (h, w) in enumerate(sizes):
        expected = by_torchvision(images[i, :h, :w], FACTORS[i].tolist())
        torch.testing.assert_close(made[i, :h, :w], expected, rtol=0, atol=0.01)


def test_each_of_the_four_alone_and_none():
    images, inside = pictures(1), torch.ones(1, 12, 15, dtype=torch.bool)
    nothing = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    torch.testing.assert_close(jitter_colours(images, inside, nothing), images, rtol=0, atol=1e-3)
    for i, value in enumerate((1.7, 0.3, 1.9, 0.2)):
        factors = nothing.clone()
        factors[0, i] = value
        expected = by_torchvision(images[0], factors[0].tolist())
        made = jitter_colours(images, inside, factors)[0]
        torch.testing.assert_close(made, expected, rtol=0, atol=0.01)


def test_factors_are_uniform_in_torchvisions_ranges():
    found = colour_factors(torch.arange(4000), (0.4, 1.5, 0.2, 0.1))
    for column, (low, high) in zip(
        found.T, ((0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1)), strict=True
    ):
        assert low <= column.min()
        assert column.max() <= high
        share = torch.histc(column, 4, low, high) / 4000
        assert (share - 0.25).abs().max() < 0.04
    assert torch.equal(found[7:9], colour_factors(torch.tensor([7, 8]), (0.4, 1.5, 0.2, 0.1)))
    none = colour_factors(torch.arange(9), (0.0, 0.0, 0.0, 0.0))
    assert torch.equal(none, torch.tensor([[1.0, 1, 1, 0]]).expand(9, 4))


def rectangle(seed: int, height: int, width: int, probability: float) -> list[int]:
    """torchvision's way to draw one, from the same numbers in double precision."""
    drawn = noise.uniform(torch.tensor([seed]), noise.ERASE, 1 + 4 * TRIES)[0].double().numpy()
    if drawn[0] >= probability:
        return [0, 0, 0, 0]
    for i in range(TRIES):
        share, shape, y, x = drawn[1:].reshape(4, TRIES)[:, i]
        area = height * width * (0.02 + 0.31 * share)
        ratio = np.exp(np.log(0.3) + (np.log(3.3) - np.log(0.3)) * shape)
        h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if h < height and w < width:
            top, left = int(y * (height - h + 1)), int(x * (width - w + 1))
            return [left, top, left + w, top + h]
    return [0, 0, 0, 0]


def test_rectangles_are_drawn_as_torchvision_draws_them(mode):
    sizes = torch.tensor([[80, 100], [33, 40], [100, 20]]).repeat(200, 1)
    found = mode(erased_boxes)(torch.arange(600), sizes, 0.7)
    same = [
        rectangle(i, int(sizes[i, 0]), int(sizes[i, 1]), 0.7) == found[i].tolist()
        for i in range(600)
    ]
    # float32 may round another way where a side ends in one half.
    assert sum(same) >= 597
    assert 0.25 < (found[:, 2] == 0).float().mean() < 0.35


def test_rectangles_are_spread_as_torchvisions_own():
    height, width, count = 60, 90, 1500
    ours = erased_boxes(torch.arange(count), torch.tensor([[height, width]]).repeat(count, 1), 1.0)
    torch.manual_seed(0)
    blank = torch.zeros(3, height, width)
    theirs = [
        RandomErasing.get_params(blank, (0.02, 0.33), (0.3, 3.3), [0.0]) for _ in range(count)
    ]
    rows, columns, heights, widths = np.array([t[:4] for t in theirs], np.float64).T
    mine = ours.double().numpy()
    for a, b in (
        (mine[:, 1], rows), (mine[:, 0], columns),
        (mine[:, 3] - mine[:, 1], heights), (mine[:, 2] - mine[:, 0], widths),
    ):  # fmt: skip
        # Means within five standard errors, and spreads alike.
        assert abs(a.mean() - b.mean()) < 5 * b.std() * np.sqrt(2 / count)
        assert a.std() == pytest.approx(b.std(), rel=0.12)


def test_boxes_to_pixels():
    made = within(torch.tensor([[2, 1, 5, 3], [0, 0, 0, 0]]), (4, 6))
    expected = np.zeros((2, 4, 6), bool)
    expected[0, 1:3, 2:5] = True
    assert np.array_equal(made.numpy(), expected)


# ---- as a part of preparing a batch ----


def batch(copies: int = 1) -> Batch:
    rng = np.random.default_rng(2)
    image = torch.from_numpy(rng.integers(0, 256, (3, 40, 50, 3), dtype=np.uint8))
    none = torch.zeros(3 * copies, 1, dtype=torch.long)
    size = torch.tensor([[40.0, 50], [30, 50], [40, 22]])
    return Batch(
        image.repeat(copies, 1, 1, 1), size.repeat(copies, 1), torch.zeros(3 * copies, 1, 4), none,
        none.bool(), torch.zeros(3 * copies, 1, 4), none, torch.arange(3 * copies),
        torch.tensor([5, 61, 800]).repeat(copies) + 977 * torch.arange(copies).repeat_interleave(3),
    )  # fmt: skip


def test_an_image_is_changed_before_it_is_normalised_and_padded():
    config = ImageConfig(short=40, long=50, colour=(0.4, 0.4, 0.4, 0.1), erase=1.0)
    plain = ImageConfig(short=40, long=50)
    data = batch()
    view = plain_view(data.size, config)._replace(seed=data.seed)
    made = prepare(data, view, config, (64, 64), torch.float32)
    before = prepare(data, view, plain, (64, 64), torch.float32)
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    for i in range(3):
        h, w = view.size[i].tolist()
        factors = colour_factors(data.seed[i : i + 1], config.colour)[0].tolist()
        pixels = (before.image[i, :, :h, :w] * std + mean).permute(1, 2, 0)
        expected = (by_torchvision(pixels, factors).permute(2, 0, 1) - mean) / std
        x0, y0, x1, y1 = rectangle(int(data.seed[i]), h, w, 1.0)
        expected[:, y0:y1, x0:x1] = 0
        assert (x1 - x0) * (y1 - y0) > 20
        torch.testing.assert_close(made.image[i, :, :h, :w], expected, rtol=0, atol=1e-3)
        assert (made.image[i, :, h:] == 0).all()
        assert (made.image[i, :, :, w:] == 0).all()


def test_a_jittered_image_is_changed_and_its_padding_is_not():
    """Colours of what shows of the image alone; what is erased may be padding, too."""
    plain = ImageConfig(jitter=(0.3, 2.0), jitter_size=64, flip=0.5)
    config = replace(plain, colour=(0.4, 0.4, 0.4, 0.1), erase=1.0)
    data = batch(4)
    view = random_view(data.size, data.seed, plain, (64, 64))
    made, before = (prepare(data, view, c, (64, 64), torch.float32) for c in (config, plain))
    mean, std = (torch.tensor(v) for v in (config.mean, config.std))
    padded = 0
    for i in range(12):
        h, w = view.size[i].clamp(max=64).tolist()
        across = slice(64 - w, None) if view.flip[i] else slice(w)
        pixels = before.image[i].permute(1, 2, 0) * std + mean
        factors = colour_factors(data.seed[i : i + 1], config.colour)[0].tolist()
        pixels[:h, across] = by_torchvision(pixels[:h, across], factors)
        outside = torch.ones(64, 64, dtype=torch.bool)
        outside[:h, across] = False
        assert ((pixels[outside] - 128).abs() < 1e-3).all()
        padded += bool(outside.any())
        expected = (pixels - mean) / std
        x0, y0, x1, y1 = rectangle(int(data.seed[i]), 64, 64, 1.0)
        assert x1 > x0
        expected[y0:y1, x0:x1] = 0
        torch.testing.assert_close(made.image[i].permute(1, 2, 0), expected, rtol=0, atol=2e-3)
    assert 3 <= padded < 12


def test_inference_is_left_alone():
    config = ImageConfig(short=40, long=50, colour=(0.4, 0.4, 0.4, 0.1), erase=1.0)
    plain, data = ImageConfig(short=40, long=50), batch()
    view: View | None
    for view in (None, plain_view(data.size, config)):
        made = prepare(data, view, config, (64, 64), torch.float32)
        assert torch.equal(made.image, prepare(data, view, plain, (64, 64), torch.float32).image)
