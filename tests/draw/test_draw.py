import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from casc.draw import class_colour, contact_sheet, draw_instances, letters

GREY = 128


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def changed(picture: np.ndarray) -> np.ndarray:
    return (picture != GREY).any(axis=2)


def is_colour(picture: np.ndarray, label: int) -> np.ndarray:
    return (picture == class_colour(label)).all(axis=2)


def names_box(picture: np.ndarray, label: int) -> tuple[int, int, int, int]:
    """Where the name's filled background lies: rows and columns that are mostly its colour."""
    hit = is_colour(picture, label)
    rows = np.flatnonzero([longest_run(row) >= 20 for row in hit])
    columns = np.flatnonzero(hit[rows].any(axis=0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def longest_run(flags: np.ndarray) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def test_box_is_outlined_where_it_is_and_the_rest_stays():
    image = grey(480, 640)
    picture = draw_instances(image, np.array([[100, 200, 400, 420]]), ["cat"], labels=[3])
    assert picture.shape == image.shape
    outline = is_colour(picture, 3)
    assert outline[200, 100:400].all()
    assert outline[419, 100:400].all()
    assert outline[200:420, 100].all()
    assert outline[200:420, 399].all()
    assert not changed(picture)[210:410, 110:390].any()
    assert not changed(picture)[430:].any()
    assert (image == GREY).all()


def test_line_width_follows_the_picture():
    widths = []
    for scale in (1, 4):
        box = np.array([[100.0, 200, 400, 420]]) * scale
        picture = draw_instances(grey(480 * scale, 640 * scale), box, ["cat"], labels=[3])
        row = picture[300 * scale]
        widths.append(int(is_colour(row[None], 3)[0, : 200 * scale].sum()))
    assert widths[0] >= 2
    assert widths[1] == pytest.approx(4 * widths[0], rel=0.3)


def test_mask_is_translucent_with_a_solid_outline():
    mask = np.zeros((1, 480, 640), bool)
    mask[0, 200:400, 100:300] = True
    picture = draw_instances(grey(480, 640), np.array([[100, 200, 300, 400]]), ["cat"], masks=mask)
    inside = picture[300, 200].astype(int)
    colour = np.array(class_colour("cat"))
    assert (np.minimum(colour, GREY) <= inside).all()
    assert (inside <= np.maximum(colour, GREY)).all()
    assert 0.2 < np.abs(inside - GREY).sum() / np.abs(colour - GREY).sum() < 0.6
    assert not changed(picture)[420:].any()


def test_mask_outline_follows_the_shape():
    yy, xx = np.ogrid[:480, :640]
    disc = (yy - 240) ** 2 + (xx - 320) ** 2 < 100**2
    picture = draw_instances(
        grey(480, 640), np.array([[10, 10, 630, 470]]), ["o"], labels=[1], masks=disc[None]
    )
    ring = is_colour(picture, 1)
    for angle in np.linspace(0, 2 * np.pi, 16, endpoint=False):
        y, x = 240 + 99 * np.sin(angle), 320 + 99 * np.cos(angle)
        assert ring[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3].any()
    assert not ring[200:280, 280:360].any()


@pytest.mark.parametrize("size", [(480, 640), (60, 80)])
def test_polygons_masks_and_rle_look_the_same(size: tuple[int, int]):
    height, width = size
    part = [width * 0.2, height * 0.3, width * 0.8, height * 0.4, width * 0.5, height * 0.9]
    parts: Any = [part]  # the stubs know no polygons
    rle = coco_mask.merge(coco_mask.frPyObjects(parts, height, width))
    box = np.array([[0.2 * width, 0.3 * height, 0.8 * width, 0.9 * height]])
    image = grey(height, width)
    by_rle = draw_instances(image, box, ["cat"], masks=[rle])
    by_mask = draw_instances(image, box, ["cat"], masks=[coco_mask.decode(rle)])
    by_polygon = draw_instances(image, box, ["cat"], polygons=[[part]])
    assert (by_rle == by_mask).all()
    # Two rasterisers may differ along the outline, no more.
    assert (changed(by_polygon) == changed(by_mask)).mean() > 0.985


def test_name_is_written_above_the_box_and_readable():
    picture = draw_instances(
        grey(480, 640), np.array([[100, 200, 400, 420]]), ["giraffe"], labels=[1], scores=[0.87]
    )
    left, top, right, bottom = names_box(picture[:200], 1)
    assert left == 100
    assert bottom >= 199
    assert 12 <= bottom - top <= 40
    assert 60 <= right - left <= 200
    ink = (picture[top:bottom, left:right] < 40).all(axis=2)
    assert ink.sum() > 100


@pytest.mark.parametrize("size", [(480, 640), (30, 40), (1500, 2000), (12, 900), (900, 12)])
@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_name_stays_in_the_picture(size: tuple[int, int], corner: tuple[int, int]):
    height, width = size
    x, y = corner[0] * width * 0.9, corner[1] * height * 0.9
    box = np.array([[x, y, x + width * 0.1, y + height * 0.1]])
    picture = draw_instances(grey(height, width), box, ["traffic light"], labels=[1], scores=[0.5])
    left, top, right, bottom = names_box(picture, 1)
    edge = picture.shape
    # The whole name is there: padding of its own colour on all sides of the ink.
    tag = picture[top:bottom, left:right]
    # Lines of the box may run through the same rows, so look where there is ink.
    ink = np.argwhere((tag < 40).all(axis=2))
    assert len(ink) > 50
    assert 0 <= left < right <= edge[1]
    assert 0 <= top < bottom <= edge[0]
    assert ink[:, 1].min() >= 1


def test_names_dont_hide_each_other():
    boxes = np.array([[100, 200, 300, 300], [110, 203, 310, 310], [105, 206, 305, 320]])
    picture = draw_instances(grey(480, 640), boxes, ["aaaaaa"] * 3, labels=[0, 1, 2])
    areas = []
    for label in range(3):
        left, top, right, bottom = names_box(picture, label)
        hit = is_colour(picture, label)[top:bottom, left:right]
        areas.append(sum(longest_run(row) >= 20 for row in hit))
    assert min(areas) >= 4


def test_small_images_are_enlarged_and_large_ones_kept():
    assert max(draw_instances(grey(24, 32), np.zeros((0, 4)), []).shape) >= 400
    assert draw_instances(grey(24, 32), np.zeros((0, 4)), []).shape[1] % 32 == 0
    assert draw_instances(grey(1, 1), np.array([[0, 0, 1, 1]]), ["speck"]).shape[0] >= 400
    assert draw_instances(grey(480, 640), np.zeros((0, 4)), []).shape == (480, 640, 3)
    assert draw_instances(grey(480, 640), np.zeros((0, 4)), [], long_side=320).shape == (
        240,
        320,
        3,
    )


def test_enlarged_boxes_lie_where_the_object_is():
    image = grey(24, 32)
    image[10:14, 20:30] = 200
    picture = draw_instances(image, np.array([[20, 10, 30, 14]]), ["bar"], labels=[1])
    factor = picture.shape[1] // 32
    assert is_colour(picture, 1)[10 * factor, 20 * factor : 30 * factor].all()
    assert (picture[12 * factor, 25 * factor] == 200).all()


def test_thin_images_get_a_margin_for_the_name():
    picture = draw_instances(grey(3, 900), np.array([[100, 0, 500, 3]]), ["wire"], labels=[1])
    assert picture.shape[0] >= 40
    assert (picture[0, :90] == GREY).all()
    assert names_box(picture, 1)[3] <= picture.shape[0]


def test_crowds_are_striped_and_dashed():
    mask = np.ones((1, 480, 640), bool)
    box = np.array([[50, 50, 600, 450]])
    plain = draw_instances(grey(480, 640), box, ["person"], labels=[1], masks=mask)
    crowd = draw_instances(grey(480, 640), box, ["person"], labels=[1], masks=mask, crowds=[True])
    assert len(np.unique(plain[250, 100:500], axis=0)) == 1
    assert len(np.unique(crowd[250, 100:500], axis=0)) == 2
    assert (crowd[50, 50:600] == 0).all(axis=1).any()
    assert not (plain[50, 50:600] == 0).all(axis=1).any()


def test_small_things_lie_on_top_of_large_ones():
    masks = np.zeros((2, 480, 640), bool)
    masks[0, 200:240, 300:340] = True
    masks[1] = True
    boxes = np.array([[300, 200, 340, 240], [0, 0, 640, 480]])
    picture = draw_instances(grey(480, 640), boxes, ["bird", "sky"], labels=[0, 1], masks=masks)
    assert is_colour(picture, 0)[200, 300:340].all()


def test_boxes_beyond_the_image_are_clipped():
    boxes = np.array([[-50, -50, 1000, 900], [700, 500, 800, 600], [-90, -90, -10, -10]])
    picture = draw_instances(grey(480, 640), boxes, ["a", "b", "c"], labels=[1, 2, 3])
    assert is_colour(picture, 1)[240, 0]
    assert is_colour(picture, 1)[240, 639]


def test_long_odd_and_foreign_names_are_written():
    names = ["a very long class name " * 20, "two\nlines", "", "naïve", "猫"]
    boxes = np.tile([[10.0, 100, 60, 200]], (5, 1))
    picture = draw_instances(grey(200, 300), boxes, names)
    assert changed(picture).any()


FOREIGN = ["猫", "狗", "قطة", "كلب", "Кошка", "naïve", "crème", "😀", "🐈‍⬛", "แมว", "γάτα"]


def written(name: str) -> np.ndarray:
    return draw_instances(grey(200, 300), np.array([[10, 100, 200, 190]]), [name], labels=[1])


@pytest.fixture
def forgetful():
    yield
    letters.set_in_type.cache_clear()


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("system", [True, False])
def test_foreign_names_can_be_told_apart(monkeypatch, system: bool):
    """Whatever fonts the machine has; a box for each letter looks the same for all names."""
    letters.set_in_type.cache_clear()
    if not system:
        monkeypatch.setattr(letters, "_SYSTEM", ())
    pictures = [written(name) for name in FOREIGN]
    for i, picture in enumerate(pictures):
        assert not any((picture == other).all() for other in pictures[:i]), FOREIGN[i]
    for name in FOREIGN:
        text, font = letters.set_in_type(name, 20)
        shapes: list[Any] = [font.getmask(c) for c in ["\uffff", *filter(str.isalnum, text)]]
        assert bytes(shapes[0]) not in map(bytes, shapes[1:])
        assert system or text.isascii()


@pytest.mark.usefixtures("forgetful")
def test_without_a_font_names_are_transliterated(monkeypatch):
    letters.set_in_type.cache_clear()
    monkeypatch.setattr(letters, "_SYSTEM", ())
    assert (written("naïve Кошка 猫") == written("naive Koshka Mao")).all()
    monkeypatch.setitem(sys.modules, "anyascii", None)
    letters.set_in_type.cache_clear()
    assert (written("é猫") == written("\\xe9\\u732b")).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_boxes_and_sizes_can_be_drawn(data: st.DataObject):
    height, width = data.draw(st.tuples(st.integers(1, 60), st.integers(1, 60)))
    number = st.floats(-200, 200, width=32)
    boxes = data.draw(st.lists(st.tuples(number, number, number, number), max_size=5))
    count = len(boxes)
    polygons = data.draw(
        st.lists(
            st.lists(st.lists(number, max_size=10), max_size=2), min_size=count, max_size=count
        )
    )
    polygons = [[p[: len(p) // 2 * 2] for p in parts] for parts in polygons]
    masks = data.draw(st.sampled_from([None, np.zeros((count, height, width), bool)]))
    picture = draw_instances(
        grey(height, width),
        np.array(boxes).reshape(-1, 4),
        data.draw(st.lists(st.text(max_size=12), min_size=count, max_size=count)),
        polygons=polygons,
        masks=masks,
        scores=[0.5] * count,
        crowds=[False] * count,
    )
    assert picture.dtype == np.uint8
    assert picture.shape[0] >= height
    assert picture.shape[1] >= width


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((4, 4), np.uint8)}, "image must be"),
        ({"image": np.zeros((4, 4, 3), np.float32)}, "image must be"),
        ({"image": np.zeros((0, 4, 3), np.uint8)}, "image must be"),
        ({"boxes": np.array([[0, 0, np.nan, 1]])}, "box 0 is not finite"),
        ({"names": []}, "0 names for 1 boxes"),
        ({"scores": [0.1, 0.2]}, "2 scores for 1 boxes"),
        ({"masks": np.zeros((1, 5, 5), bool)}, "mask 0 is"),
        ({"long_side": 0}, "long_side"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str):
    given_ = {"image": grey(40, 60), "boxes": np.array([[0, 0, 5, 5]]), "names": ["a"], **change}
    with pytest.raises(ValueError, match=message):
        draw_instances(**given_)


def test_class_colours_are_stable_and_differ():
    first = [class_colour(i) for i in range(21)]
    assert len(set(first)) == 21
    assert class_colour("person") == class_colour("person")
    assert all(0 <= channel <= 255 for colour in first for channel in colour)


def test_hues_differ_for_colour_blind_eyes():
    # Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
    protan = [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ]
    deutan = [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ]
    colours = (np.array([class_colour(i) for i in range(7)]) / 255) ** 2.2
    for matrix in (protan, deutan):
        seen = (colours @ np.array(matrix).T).clip(0, 1) ** (1 / 2.2) * 255
        distance = np.linalg.norm(seen[:, None] - seen[None], axis=2) + 999 * np.eye(7)
        assert distance.min() > 25


def luminance(colour: np.ndarray) -> float:
    """WCAG 2.1."""
    c = np.asarray(colour) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("label", range(21))
def test_ink_stands_out_from_its_label(label: int):
    picture = draw_instances(
        grey(480, 640), np.array([[100, 200, 400, 420]]), ["HHHH"], labels=[label]
    )
    left, top, right, bottom = names_box(picture[:200], label)
    tag = picture[top + 1 : bottom - 1, left:right].reshape(-1, 3)
    back = luminance(np.array(class_colour(label)))
    ratios = [(max(luminance(p), back) + 0.05) / (min(luminance(p), back) + 0.05) for p in tag]
    assert max(ratios) > 4.5


def test_contact_sheet_shows_every_picture():
    pictures = [np.full((60, 80, 3), 50 * (i + 1), np.uint8) for i in range(3)]
    sheet = contact_sheet(pictures, 2, cell=100, gap=10)
    assert sheet.shape == (2 * 60 + 30, 2 * 80 + 30, 3)
    assert (sheet[10:70, 10:90] == 50).all()
    assert (sheet[10:70, 100:180] == 100).all()
    assert (sheet[80:140, 10:90] == 150).all()


def test_contact_sheet_reduces_large_pictures_and_writes_captions():
    pictures = [grey(400, 800), grey(50, 60)]
    plain = contact_sheet(pictures, 2, cell=200)
    titled = contact_sheet(pictures, 2, cell=200, captions=["first", "a much too long one " * 9])
    assert plain.shape[1] == 2 * 200 + 36
    assert titled.shape[0] > plain.shape[0]
    below = titled[112 + 1 :, 12:212]
    assert (below > 200).all(axis=2).any()


def test_contact_sheet_refuses_nonsense():
    with pytest.raises(ValueError, match="empty"):
        contact_sheet([])
    with pytest.raises(ValueError, match="1 captions for 2"):
        contact_sheet([grey(4, 4), grey(4, 4)], captions=["a"])
    with pytest.raises(ValueError, match="columns"):
        contact_sheet([grey(4, 4)], 0)


def test_pictures_can_be_saved(tmp_path):
    picture = draw_instances(grey(60, 80), np.array([[5, 5, 20, 20]]), ["a"])
    Image.fromarray(picture).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert np.asarray(image).shape == picture.shape


def test_names_can_be_read_where_the_picture_is_reduced():
    box = np.array([[300, 400, 1200, 1300]])
    full = draw_instances(grey(1600, 1600), box, ["cat"], labels=[1], seen_at=1600)
    plain = draw_instances(grey(1600, 1600), box, ["cat"], labels=[1])
    reduced = draw_instances(grey(1600, 1600), box, ["cat"], labels=[1], seen_at=320)
    heights = []
    for picture in (plain, full, reduced):
        _, top, _, bottom = names_box(picture[:410], 1)
        heights.append(bottom - top)
    assert heights[0] == heights[1]
    assert heights[2] / (1600 / 320) >= 12
