from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from casc.draw import class_colour
from casc.errors import UserError
from data_tools.show import show_shards


def test_a_sheet_shows_so_many_samples(varied, tmp_path: Path):
    _, out = varied.shard()
    sheet = tmp_path / "deep" / "sheet.png"
    captions = show_shards(out, sheet, count=4, cell=200)
    assert len(captions) == 4
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        assert image.width >= 2 * 160
        assert image.height >= 2 * 160


def test_the_seed_chooses(varied, tmp_path: Path):
    _, out = varied.shard()
    first = show_shards(out, tmp_path / "a.png", count=5, cell=120)
    assert show_shards(out, tmp_path / "b.png", count=5, cell=120) == first
    assert show_shards(out, tmp_path / "c.png", count=5, seed=1, cell=120) != first
    every = show_shards(out, tmp_path / "d.png", count=99, cell=120)
    assert len(every) == len(set(every)) == 12
    assert sum("evaluation only" in caption for caption in every) == 2
    assert "7: 60 x 50, 0 of 1 to train on" in every


def test_masks_lie_where_the_objects_are(coco, tmp_path: Path):
    number = coco.image(320, 320)
    box = [40, 60, 80, 120]
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    coco.object(number, bbox=box, segmentation=[polygon], category_id=1)
    data = np.zeros((320, 320), np.uint8)
    Image.fromarray(np.dstack([data] * 3)).save(coco.root / "train" / f"{number}.jpg", quality=100)
    _, out = coco.shard()
    show_shards(out, tmp_path / "a.png", count=1, cell=320)
    with Image.open(tmp_path / "a.png") as sheet:
        shown = np.asarray(sheet.convert("RGB")).astype(int)
    gap = 12
    inside = shown[gap + y + 40 : gap + y + h - 40, gap + x + 20 : gap + x + w - 20]
    outside = shown[gap + 240 : gap + 300, gap + 200 : gap + 300]
    # The mask is the class's colour over black, so of its hue and darker.
    hue = inside.mean(axis=(0, 1)) / inside.mean(axis=(0, 1)).max()
    np.testing.assert_allclose(hue, np.array(class_colour(0)) / max(class_colour(0)), atol=0.1)
    assert outside.max() < 8


def test_odd_annotations_can_be_shown(coco, tmp_path: Path):
    number = coco.image()
    coco.object(number, bbox=[-5, -5, 900, 900])
    coco.object(number, bbox=[500, 5, 9, 9], category_id=77)
    coco.object(number, bbox=[5, 5, 0, 0], segmentation=None)
    rle = {"size": [50, 60], "counts": [100, 50, 2850]}
    coco.object(number, iscrowd=1, segmentation=rle)
    _, out = coco.shard()
    assert len(show_shards(out, tmp_path / "a.png")) == 1


def test_wrong_requests_are_refused(varied, tmp_path: Path):
    _, out = varied.shard()
    with pytest.raises(UserError, match=r"no split 'val', only train"):
        show_shards(out, tmp_path / "a.png", split="val")
    with pytest.raises(UserError, match="--n"):
        show_shards(out, tmp_path / "a.png", count=0)
    with pytest.raises(UserError, match="not found"):
        show_shards(tmp_path, tmp_path / "a.png")
