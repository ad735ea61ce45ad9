from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from safetensors.torch import load_file

from casc.evaluate.mask_rle import encode_masks, paste_masks

GOLDENS = Path(__file__).parents[1] / "goldens" / "paste.safetensors"


def soft_masks(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 7, 7, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(28, 28), mode="bilinear").sigmoid()[:, 0]


def encode_whole(mask: np.ndarray) -> Any:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def paste_by_hand(mask: np.ndarray, box: list[float], height: int, width: int) -> np.ndarray:
    """Bilinear interpolation at pixel centres, zero around the mask, in float64."""
    x0, y0, x1, y1 = box
    size = len(mask)
    padded = np.pad(mask, 2)
    out = np.zeros((height, width))
    for y in range(height):
        v = (y + 0.5 - y0) / (y1 - y0) * size - 0.5
        for x in range(width):
            u = (x + 0.5 - x0) / (x1 - x0) * size - 0.5
            if -1 <= v < size and -1 <= u < size:
                j, i = int(np.floor(v)), int(np.floor(u))
                b, a = v - j, u - i
                four = padded[j + 2 : j + 4, i + 2 : i + 4]
                out[y, x] = np.array([1 - b, b]) @ four @ np.array([1 - a, a])
    return out


def test_masks_equal_the_reference_to_the_bit():
    # Section 5 of the reference's unit cases, the masks packed to bits.
    golden = load_file(GOLDENS)
    prob, boxes, scale = (golden[f"paste.{k}"] for k in ("prob", "boxes_scaled", "scale_factor"))
    count, height, width = golden["paste.shape"].tolist()
    bits = np.unpackbits(golden["paste.masks_packed"].numpy(), axis=1, count=height * width)
    masks = bits.reshape(count, height, width).astype(bool)
    pasted = paste_masks(prob, boxes / scale, height, width)
    assert (pasted.numpy() == masks).all()
    for rle, mask in zip(encode_masks(prob, boxes / scale, height, width), masks, strict=True):
        assert rle["counts"].encode() == encode_whole(mask)["counts"]


def test_masks_equal_interpolation_by_hand():
    masks = soft_masks(4)
    boxes = torch.tensor(
        [[3.3, 2.1, 30.7, 25.9], [-6, -4, 20, 18], [25, 20, 60, 50], [10.5, 10.5, 11.5, 12]]
    )
    pasted = paste_masks(masks, boxes, 32, 40).numpy()
    for mask, box, got in zip(masks.double().numpy(), boxes.tolist(), pasted, strict=True):
        soft = paste_by_hand(mask, box, 32, 40)
        clear = np.abs(soft - 0.5) > 1e-5
        assert ((soft >= 0.5) == got)[clear].all()
        assert clear.mean() > 0.99


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.8])
def test_other_thresholds_reach_all_pixels(threshold: float):
    masks = torch.ones(1, 28, 28)
    box = [-50.0, 20.0, 200.0, 300.0]
    pasted = paste_masks(masks, torch.tensor([box]), 320, 240, threshold)[0].numpy()
    soft = paste_by_hand(np.ones((28, 28)), box, 320, 240)
    clear = np.abs(soft - threshold) > 1e-4
    assert ((soft >= threshold) == pasted)[clear].all()


def test_windows_dont_change_whole_image_sampling():
    masks, height, width = soft_masks(6, 1), 90, 120
    boxes = torch.tensor(
        [
            [0, 0, 120, 90],
            [-40, -30, 500, 400],
            [5.2, 6.1, 30.4, 80.8],
            [100, 70, 180, 160],
            [-90, -80, -10, -5],
            [60, 40, 60.01, 40.01],
        ]
    )
    pasted = paste_masks(masks, boxes, height, width)
    y = (torch.arange(height) + 0.5)[None] - boxes[:, 1:2]
    x = (torch.arange(width) + 0.5)[None] - boxes[:, 0:1]
    y = y / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    x = x / (boxes[:, 2:3] - boxes[:, 0:1]) * 2 - 1
    grid = torch.stack(
        [x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1
    )
    whole = torch.nn.functional.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]
    assert (pasted == (whole >= 0.5)).all()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_run_lengths_equal_those_of_whole_masks(data: st.DataObject):
    height, width = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 24))
    edge = st.one_of(
        st.floats(-30, 40, width=32), st.sampled_from([0.0, float(height), float(width)])
    )
    boxes = []
    for _ in range(data.draw(st.integers(1, 3))):
        (xa, xb), (ya, yb) = (sorted(data.draw(st.tuples(edge, edge))) for _ in range(2))
        boxes.append([xa, ya, xb, yb])
    masks = soft_masks(len(boxes), data.draw(st.integers(0, 50)))
    masks = masks if data.draw(st.booleans()) else torch.ones_like(masks)
    pasted = paste_masks(masks, torch.tensor(boxes), height, width).numpy()
    encoded = encode_masks(masks, torch.tensor(boxes), height, width)
    for rle, mask in zip(encoded, pasted, strict=True):
        expected = encode_whole(mask)
        assert rle["size"] == list(expected["size"])
        assert rle["counts"].encode() == expected["counts"]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    threshold=st.sampled_from([0.5, 0.5, 0.05, 0.3, 0.71, 1.0]),
    kind=st.sampled_from(["soft", "noise", "hard", "level", "constant", "outside"]),
)
def test_run_lengths_equal_at_any_threshold_and_of_odd_masks(
    seed: int, threshold: float, kind: str
):
    generator = torch.Generator().manual_seed(seed)
    height, width, count = 75, 100, 12
    masks = soft_masks(count, seed)
    if kind == "noise":
        masks = torch.rand(masks.shape, generator=generator)
    elif kind == "hard":
        masks = masks.round()
    elif kind == "level":  # rounding decides everywhere
        masks = threshold + (masks - 0.5) * 1e-5
    elif kind == "constant":
        masks = torch.full_like(masks, threshold)
    elif kind == "outside":  # not probabilities
        masks = masks * 40 - 10
        masks[0, 3, 4] = torch.nan
        masks[1, 3, 4] = torch.inf
    side = torch.randn(count, 2, generator=generator).mul(1.3).exp() * 12
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width + 20, height + 20])
    boxes = torch.cat([corner - 20, corner - 20 + side], dim=1)
    boxes[0, 2:] = boxes[0, :2] + 1e-4  # narrower than rounding is bounded for
    boxes[1, 2] = boxes[1, 0] - 0.5  # turned inside out
    pasted = paste_masks(masks, boxes, height, width, threshold).numpy()
    encoded = encode_masks(masks, boxes, height, width, threshold)
    for rle, mask in zip(encoded, pasted, strict=True):
        assert rle["counts"].encode() == encode_whole(mask)["counts"]


def test_masks_over_whole_columns_join_their_runs():
    masks = torch.ones(1, 28, 28)
    box = torch.tensor([[2.0, -50, 7, 90]])
    rle = encode_masks(masks, box, 20, 10)[0]
    assert (
        rle["counts"].encode() == encode_whole(paste_masks(masks, box, 20, 10)[0].numpy())["counts"]
    )
    decoded: Any = rle
    assert coco_mask.area(decoded) == 5 * 20


def test_empty_boxes_and_no_boxes():
    masks = soft_masks(2)
    boxes = torch.tensor([[10.0, 10, 10, 20], [4.0, 4, 4, 4]])
    pasted = paste_masks(masks, boxes, 30, 30)
    assert pasted.shape == (2, 30, 30)
    assert len(encode_masks(masks, boxes, 30, 30)) == 2
    assert paste_masks(masks[:0], boxes[:0], 30, 30).shape == (0, 30, 30)
    assert encode_masks(masks[:0], boxes[:0], 30, 30) == []


@pytest.mark.parametrize(
    ("masks", "boxes", "size", "threshold", "message"),
    [
        ((2, 28, 28), (1, 4), (9, 9), 0.5, "boxes"),
        ((28, 28), (1, 4), (9, 9), 0.5, "masks"),
        ((1, 28, 28), (1, 4), (0, 9), 0.5, "size"),
        ((1, 28, 28), (1, 4), (9, 9), 0.0, "threshold"),
    ],
)
def test_bad_arguments_are_refused(masks, boxes, size: tuple[int, int], threshold, message):
    for function in (paste_masks, encode_masks):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(masks), torch.zeros(boxes), *size, threshold)


@pytest.mark.parametrize("function", [paste_masks, encode_masks])
def test_boxes_that_are_not_finite_are_refused(function):
    with pytest.raises(ValueError, match="finite"):
        function(soft_masks(1), torch.tensor([[0, 0, 5, torch.nan]]), 9, 9)
