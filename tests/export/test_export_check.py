"""How detections are compared: what counts as a rounding, and what doesn't."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from casc.export.check import Agreement, Tolerances, compare_image
from casc.export.pictures import batches, generated_pictures, read_pictures
from casc.model.detector_config import InferenceConfig
from casc.model.forward_detect import Detections

CONFIG = InferenceConfig(score_threshold=0.3, nms_iou=0.5, detections=5)
TOLERANCES = Tolerances()
BOXES = [[10.0, 10, 50, 40], [60, 20, 90, 80], [12, 70, 40, 95], [0, 0, 5, 5]]


def found(scores, boxes=BOXES, labels=(0, 1, 0, 2)) -> Detections:
    """One image's detections, padded to the five that there may be."""
    n, most = len(scores), CONFIG.detections
    masks = torch.zeros(most, 4, 4)
    made = Detections(
        torch.zeros(most, 4),
        torch.zeros(most),
        torch.zeros(most, dtype=torch.long),
        torch.arange(most) < n,
        masks,
    )
    made.boxes[:n], made.scores[:n] = torch.tensor(boxes[:n]).reshape(-1, 4), torch.tensor(scores)
    made.labels[:n], masks[:n] = torch.tensor(labels[:n]), torch.rand(n, 4, 4)
    return made


def picked(detections: Detections, rows: list[int]) -> Detections:
    """The same detections, of which only `rows` are left, in that order."""
    count = int(detections.valid.sum())
    order = [*rows, *range(count, CONFIG.detections), *(i for i in range(count) if i not in rows)]
    moved = Detections(*(t[order] for t in detections if t is not None))
    return moved._replace(valid=torch.arange(CONFIG.detections) < len(rows))


def agreement(a: Detections, b: Detections) -> Agreement:
    there, back = (compare_image(*pair, CONFIG, TOLERANCES) for pair in ((a, b), (b, a)))
    assert there == back
    return there


def test_the_same_detections_agree_exactly():
    result = agreement(one := found([0.9, 0.8, 0.7]), one)
    assert result == Agreement(images=1, paired=3)
    assert result.within(TOLERANCES)


def test_no_detections_agree_too():
    result = agreement(found([], []), found([], []))
    assert result == Agreement(images=1, empty=1)
    assert result.within(TOLERANCES)


def test_equal_scores_may_come_in_any_order():
    one = found([0.9, 0.8, 0.8, 0.8])
    assert agreement(one, picked(one, [0, 3, 1, 2])) == Agreement(images=1, paired=4)


@pytest.mark.parametrize("field", ["boxes", "scores", "masks"])
def test_differences_are_found_and_measured(field):
    one, by = found([0.9, 0.8, 0.7]), 2 * getattr(TOLERANCES, field)
    value = getattr(one, field).clone()
    value.view(5, -1)[1, 0] -= by
    result = agreement(one, one._replace(**{field: value}))
    assert getattr(result, field) == pytest.approx(by, rel=1e-2)
    assert not result.within(TOLERANCES)
    assert result.within(replace(TOLERANCES, **{field: 2 * by}))


def test_what_is_not_a_number_agrees_with_nothing():
    one = found([0.9, 0.8, 0.7])
    assert one.masks is not None
    masks = one.masks.clone()
    masks[0, 0, 0] = torch.nan
    assert not compare_image(one, one._replace(masks=masks), CONFIG, TOLERANCES).within(TOLERANCES)
    boxes = one.boxes.clone()
    boxes[0, 0] = torch.nan
    assert not compare_image(one, one._replace(boxes=boxes), CONFIG, TOLERANCES).within(TOLERANCES)


@pytest.mark.parametrize("change", ["missing", "elsewhere", "another class"])
def test_a_detection_without_a_partner_is_a_difference(change):
    one = found([0.9, 0.8, 0.7])
    if change == "missing":
        other = picked(one, [0, 2])
    elif change == "elsewhere":
        other = one._replace(boxes=one.boxes + torch.tensor([0.0, 0, 3, 0]))
    else:
        other = one._replace(labels=one.labels + 1)
    result = agreement(one, other)
    assert result.unpaired > 0
    assert result.borderline == 0
    assert not result.within(TOLERANCES)


def test_a_score_at_the_threshold_may_fall_on_either_side():
    just = CONFIG.score_threshold + TOLERANCES.scores / 2
    one = found([0.9, 0.8, just])
    result = agreement(one, picked(one, [0, 1]))
    assert result == Agreement(images=1, paired=2, borderline=1)
    assert result.within(TOLERANCES)


def test_the_last_of_a_full_list_may_be_either_of_two():
    boxes = [*BOXES, [100.0, 100, 120, 130]]
    one = found([0.9, 0.8, 0.7, 0.6, 0.5], boxes, (0, 1, 0, 2, 1))
    boxes = [*BOXES, [150.0, 100, 180, 130]]
    other = found([0.9, 0.8, 0.7, 0.6, 0.5], boxes, (0, 1, 0, 2, 1))
    other = other._replace(masks=one.masks)
    assert agreement(one, other) == Agreement(images=1, paired=4, borderline=2)
    # Not so the best of them.
    boxes = [[150.0, 100, 180, 130], *boxes[1:]]
    assert agreement(one, found([0.9, 0.8, 0.7, 0.6, 0.5], boxes, (0, 1, 0, 2, 1))).unpaired == 2


@pytest.mark.parametrize(("width", "excused"), [(20.0, True), (14.0, False)])
def test_an_overlap_at_the_limit_may_suppress_or_not(width, excused):
    # 20 of 40 pixels: an overlap of exactly a half with the box that is better.
    boxes = [[0.0, 0, 40, 10], [0, 0, width, 10]]
    one = found([0.9, 0.8], boxes, (0, 0))
    result = agreement(one, picked(one, [0]))
    assert (result.borderline, result.unpaired) == ((1, 0) if excused else (0, 1))


def test_generated_pictures_are_of_many_sizes_and_always_the_same():
    pictures, again = (generated_pictures((96, 128)) for _ in range(2))
    assert len(pictures) == 10
    assert len({size for _, size in pictures}) > 5
    for (image, (height, width)), (same, _) in zip(pictures, again, strict=True):
        assert image.shape == (96, 128, 3)
        assert image.dtype == torch.uint8
        assert torch.equal(image, same)
        assert not image[height:].any()
        assert not image[:, width:].any()


def test_batches_are_filled_up():
    made = list(batches(generated_pictures((32, 32), 5), 2))
    assert [count for _, _, count in made] == [2, 2, 1]
    assert all(pixels.shape == (2, 32, 32, 3) and size.shape == (2, 2) for pixels, size, _ in made)
    assert torch.equal(made[2][0][0], made[2][0][1])


def test_a_picture_that_fits_is_put_in_the_corner(tmp_path):
    """As it is, without a warning of memory that mustn't be written to."""
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    ((found, size),) = read_pictures([str(tmp_path / "a.png")], (32, 48))
    assert size == (20, 30)
    assert np.array_equal(found[:20, :30].numpy(), image)
    assert not found[20:].any()
    assert not found[:, 30:].any()
