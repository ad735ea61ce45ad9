from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from casc.draw import class_colour
from casc.errors import UserError
from data_tools.choose import Choice
from data_tools.show import show_shards


def test_a_sheet_shows_so_many_samples(varied, tmp_path: Path):
    _, out = varied.shard()
    sheet = tmp_path / "deep" / "sheet.png"
    captions = show_shards(out, sheet, Choice(count=4), cell=200)
    assert len(captions) == 4
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        assert image.width >= 2 * 160
        assert image.height >= 2 * 160


def test_the_seed_chooses(varied, tmp_path: Path):
    _, out = varied.shard()
    first = show_shards(out, tmp_path / "a.png", Choice(5), cell=120)
    assert show_shards(out, tmp_path / "b.png", Choice(5), cell=120) == first
    assert show_shards(out, tmp_path / "c.png", Choice(5, seed=1), cell=120) != first
    every = show_shards(out, tmp_path / "d.png", Choice(99), cell=120)
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
    show_shards(out, tmp_path / "a.png", Choice(1), cell=320)
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
        show_shards(out, tmp_path / "a.png", Choice(0))
    with pytest.raises(UserError, match="not found"):
        show_shards(tmp_path, tmp_path / "a.png")


def shown(out: Path, page: Path, **choice) -> list[int]:
    captions = show_shards(out, page, Choice(**choice), cell=64)
    return [int(caption.partition(":")[0]) for caption in captions]


def test_samples_are_chosen_by_class_and_id(coco, tmp_path: Path):
    ants = [coco.image() for _ in range(5)]
    cats = [coco.image() for _ in range(5)]
    for number in ants:
        coco.object(number, category_id=1)
    for number in cats:
        coco.object(number, category_id=3)
    both = coco.image()
    coco.object(both, category_id=1)
    coco.object(both, category_id=3)
    _, out = coco.shard()
    first, second = "ant", "cat"
    page = tmp_path / "a.png"
    assert set(shown(out, page, count=99, classes=(first,))) == {*ants, both}
    assert set(shown(out, page, count=99, classes=(first, second))) == {*ants, *cats, both}
    some = shown(out, page, count=3, classes=(second,))
    assert len(some) == 3
    assert set(some) <= {*cats, both}
    assert shown(out, page, count=3, classes=(second,)) == some
    several = {tuple(shown(out, page, count=3, seed=i, classes=(second,))) for i in range(8)}
    assert len(several) > 1
    assert set(shown(out, page, count=1, ids=(both, cats[2]))) == {both, cats[2]}
    with pytest.raises(UserError, match=f"--classes {first}x: no such class; is it {first}"):
        shown(out, page, classes=(first + "x",))
    with pytest.raises(UserError, match=r"--ids 999: train of .* has no such image"):
        shown(out, page, ids=(both, 999))
    with pytest.raises(UserError, match="has no such image that fits the other conditions"):
        shown(out, page, ids=(ants[0],), classes=(second,))


def test_samples_are_chosen_by_what_was_found(coco, tmp_path: Path):
    plain, crowded, turned = (coco.image() for _ in range(3))
    for number in (plain, crowded, turned):
        coco.object(number)
    rle = {"size": [50, 60], "counts": [100, 50, 2850]}
    coco.object(crowded, iscrowd=1, segmentation=rle)
    coco.object(turned, bbox=[5, 5, 0, 0])
    _, out = coco.shard()
    page = tmp_path / "a.html"
    assert shown(out, page, problems=("crowd",)) == [crowded]
    assert "crowd: evaluation only" in page.read_text()
    assert set(shown(out, page, problems=("crowd", "degenerate_box"))) == {crowded, turned}
    assert plain not in shown(out, page, problems=("degenerate_box",))
    assert {crowded, turned} <= set(shown(out, page, problems=("all",)))
    with pytest.raises(UserError, match=r"--problems cmyk: none was found; train has .*crowd"):
        shown(out, page, problems=("cmyk",))


def test_a_page_lists_the_annotations_as_text(coco, tmp_path: Path):
    number = coco.image()
    coco.object(number, id=4711)
    coco.object(number, category_id=77)
    _, out = coco.shard()
    evil = "<img src=x onerror=alert(1)>"
    file = out / "index.json"
    file.write_text(file.read_text().replace('"name": "cat"', f'"name": "{evil}"'))
    page = tmp_path / "page.html"
    show_shards(out, page, cell=64)
    text = page.read_text()
    assert evil not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "4711" in text
    assert "category 77" in text
    assert text.count("<img ") == 1
    assert "data:image/webp" in text
