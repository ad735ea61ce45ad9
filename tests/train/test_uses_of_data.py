"""What training uses of a data set: boxes without masks, regions to ignore, empty images."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import casc
from casc.checkpoints.converting import convert
from casc.checkpoints.foreign import Stated
from casc.cli import main as cli
from casc.data.index import read_index, training_split, write_index
from casc.data.stream import evaluation_batches, training_batches
from casc.errors import UserError
from casc.inference.predict import predict
from casc.inference.settings import Views
from casc.train.derived import trained_split
from casc.train.loop import train
from casc.train.recipe_checks import check
from data_tools.plan import Settings
from data_tools.shard import shard

COLOURS = [(230, 40, 40), (40, 230, 40)]


def data_set(root, *, segmentation=(), count=6, **fields):
    """Two coloured rectangles an image; by default their boxes are all that is known of them."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(1, count + 1):
            image = rng.integers(0, 60, (48, 64, 3), dtype=np.uint8)
            for label in range(2):
                w, h = rng.integers(12, 24, 2).tolist()
                x, y = int(rng.integers(0, 64 - w)), int(rng.integers(0, 48 - h))
                image[y : y + h, x : x + w] = COLOURS[label]
                outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                annotations.append(
                    {
                        "id": len(annotations) + 1, "image_id": i, "category_id": label + 1,
                        "bbox": [x, y, w, h], "iscrowd": 0, "area": w * h,
                        "segmentation": outline if segmentation == "outline" else segmentation,
                    } | fields
                )  # fmt: skip
            Image.fromarray(image).save(root / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 48})
        names = [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}]
        data = {"images": images, "annotations": annotations, "categories": names}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(data))
    return root


@pytest.fixture
def boxes_recipe(tiny_recipe, tmp_path):
    """A recipe without masks on shards of boxes alone."""
    shard(data_set(tmp_path / "coco"), tmp_path / "boxes", say=lambda _: None)
    model = replace(tiny_recipe.model, masks="none")
    return replace(tiny_recipe, data=tmp_path / "boxes", model=model)


def test_a_run_without_masks_from_shards_to_report(boxes_recipe, tmp_path, capsys):
    recipe = replace(boxes_recipe, epochs=2, evaluate_every=1, save_steps=2, keep_last=0)
    train(recipe)
    log = [json.loads(line) for line in (recipe.folder / "log.jsonl").read_text().splitlines()]
    steps = [record for record in log if record["kind"] == "train"]
    assert len(steps) == 6
    assert any(record["s0.positives"] > 0 for record in steps)
    assert not [name for record in steps for name in record if "mask" in name]
    figures = [record["figures"] for record in log if record["kind"] == "evaluation"]
    assert len(figures) == 2
    assert all(name.startswith("box_") for each in figures for name in each)
    weights = load_file(recipe.folder / "checkpoints/step-00000006/weights.safetensors")
    assert not [name for name in weights if "mask" in name]

    # Resumed from the middle it is the same run.
    broken = replace(recipe, out=tmp_path / "broken")
    train(replace(broken, max_steps=3))
    again = train(replace(broken, max_steps=6)).state
    for name, value in again.params.items():
        assert torch.equal(value, weights[name]), name

    trained = casc.load(recipe.folder, device="cpu")
    image = tmp_path / "coco/val/1.png"
    found = trained(image, threshold=0.0)
    assert len(found) > 0
    assert found.masks is None
    assert found[0].masks is None
    assert all(each.mask is None for each in found)
    assert all("segmentation" not in result for result in found.to_coco())
    assert all("mask" not in each for each in found.to_dict()["detections"])
    assert found.draw().size[0] > 0
    made = predict(trained, [image], tmp_path / "predicted", threshold=0.0, log=lambda _: None)
    assert {key for result in made.results for key in result} == {
        "image_id", "category_id", "bbox", "score", "file_name",
    }  # fmt: skip

    with pytest.raises(UserError, match=r"model\.masks none: checkpoints for other programs"):
        convert(str(recipe.folder), tmp_path / "theirs.pth", to="mmdetection", stated=Stated())
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(recipe.folder)])
    assert not stop.value.code
    page = (recipe.folder / "report.html").read_text()
    assert "summed box IoU" in page
    assert "Mask AP" not in page
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", str(recipe.folder), str(recipe.data), "--split", "val"])
    assert not stop.value.code
    assert "mask" not in capsys.readouterr().out.splitlines()[-13]


def test_a_run_that_scores_masks_from_shards_to_predictions(tiny_recipe, tmp_path):
    """In training, evaluation, prediction, with tiles and flips, and kept out of other formats."""
    head = replace(tiny_recipe.model.mask_head, scoring=True)
    recipe = replace(tiny_recipe, model=replace(tiny_recipe.model, mask_head=head), max_steps=4)
    recipe = replace(recipe, evaluate_every=1, save_steps=2, keep_last=0)
    whole = train(recipe).state
    log = [json.loads(line) for line in (recipe.folder / "log.jsonl").read_text().splitlines()]
    losses = [r["loss_mask_iou"] for r in log if r["kind"] == "train"]
    assert len(losses) == 4
    assert any(losses)
    broken = replace(recipe, out=tmp_path / "broken")
    train(replace(broken, max_steps=3))
    again = train(broken).state
    for name, value in again.params.items():
        assert torch.equal(value, whole.params[name]), name

    image = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)).save(image)
    trained = casc.load(recipe.folder, device="cpu")
    for views in (Views(), Views(flips=True, tiles=50)):
        found = replace(trained, views=views)(image, threshold=0.0)
        assert len(found) > 0
        told = [each.mask_score for each in found]
        assert all(0 <= fit <= each.score for fit, each in zip(told, found, strict=True))
        assert [each["mask_score"] for each in found.to_coco()] == told
        assert [each["mask_score"] for each in found.to_dict()["detections"]] == told
        assert [each.mask_score for each in found[:1]] == told[:1]
    with pytest.raises(UserError, match=r"model\.mask_head\.scoring True: only casc reads"):
        convert(str(recipe.folder), tmp_path / "theirs.pth", to="mmdetection", stated=Stated())


def test_boxes_alone_are_refused_with_what_mends_it(boxes_recipe):
    recipe = replace(boxes_recipe, model=replace(boxes_recipe.model, masks="heads"))
    with pytest.raises(UserError) as error:
        check(recipe, read_index(recipe.data))
    said = str(error.value)
    assert "of 12 annotations none is usable (12 no_mask)" in said
    assert "--model.masks none trains on 12 boxes" in said
    check(boxes_recipe, read_index(recipe.data))


@pytest.mark.parametrize("masks", ["heads", "none"])
def test_nothing_to_train_on_is_refused_with_the_reasons(boxes_recipe, tmp_path, masks: str):
    out = tmp_path / "useless"
    shard(data_set(tmp_path / "nothing", area=0), out, say=lambda _: None)
    recipe = replace(boxes_recipe, data=out, model=replace(boxes_recipe.model, masks=masks))
    with pytest.raises(UserError, match=r"of 12 annotations none.*12 degenerate_box") as e:
        check(recipe, read_index(out))
    assert "--model.masks none" not in str(e.value)


def mixed(root):
    """Six images: outlines, outlines and boxes, boxes alone, a crowd and a degenerate box."""
    data_set(root, segmentation="outline")
    file = root / "annotations/instances_train.json"
    data = json.loads(file.read_text())
    entries = data["annotations"]
    for i in (3, 4, 5, 8):
        entries[i]["segmentation"] = []
    entries[7]["iscrowd"] = 1
    entries[9]["ignore"] = 1
    entries[11]["area"] = 0
    file.write_text(json.dumps(data))
    return entries


def seen(folder, split, **wanted):
    """By image id the boxes and the regions of an epoch's batches."""
    found = {}
    stream = training_batches(
        folder, split, seed=0, steps=range(6), batch=1, regions=True, **wanted
    )
    for _, batch in stream:
        assert batch.regions is not None
        pair = batch.boxes[0][batch.valid[0]], batch.regions[0]
        rows = [sorted(map(tuple, boxes.tolist())) for boxes in pair]
        found[int(batch.image_id[0])] = rows
        assert batch.valid.sum() == len(rows[0])
    return found


def test_what_is_trained_on_and_what_is_ignored(boxes_recipe, tmp_path):
    entries = mixed(tmp_path / "mixed")
    out = tmp_path / "mixed-shards"
    index = shard(tmp_path / "mixed", out, say=lambda _: None)
    assert read_index(out) == index
    whole = index.splits["train"]
    counts = whole.report["annotations"]
    assert (counts["trained"], counts["trained_without_masks"]) == (5, 9)
    assert whole.train_samples == 4

    def corners(i):
        x, y, w, h = entries[i]["bbox"]
        return float(x), float(y), float(x + w), float(y + h)

    def expected(objects, ignored, room):
        padding = [(0.0, 0.0, 0.0, 0.0)] * (room - len(ignored))
        return [sorted(map(corners, objects)), sorted([*map(corners, ignored), *padding])]

    # Images 3 and 5 have objects, but masks of none.
    room = whole.buckets[0].regions
    truth = {1: ([0, 1], []), 2: ([2], [3]), 4: ([6], [7]), 6: ([10], [])}
    found = seen(out, whole)
    assert found == {i: expected(a, b, room) for i, (a, b) in truth.items()}

    boxes = training_split(whole, masks=False)
    assert boxes.train_samples == 6
    assert boxes.buckets[0].edges == 1
    truth |= {2: ([2, 3], []), 3: ([4, 5], []), 5: ([8], [9])}
    found = seen(out, boxes, masks=False)
    assert found == {i: expected(a, b, room) for i, (a, b) in truth.items()}
    # Evaluation reads the split as it is.
    images = [i for _, b in evaluation_batches(out, whole, batch=2) for i in b.image_id.tolist()]
    assert sorted(i for i in images if i >= 0) == list(range(1, 7))


def test_shards_of_an_earlier_casc_serve_unless_something_new_is_asked(boxes_recipe, tmp_path):
    mixed(tmp_path / "mixed")
    out = tmp_path / "old"
    index = shard(tmp_path / "mixed", out, say=lambda _: None)
    old = {
        name: replace(
            split,
            buckets=tuple(replace(b, boxes=None, regions=None) for b in split.buckets),
            shards=tuple(replace(s, maskless=False) for s in split.shards),
        )
        for name, split in index.splits.items()
    }
    write_index(out, replace(index, splits=old))
    data = json.loads((out / "index.json").read_text())
    for split in data["splits"].values():
        for entry in (*split["buckets"], *split["shards"]):
            for key in ("boxes", "regions", "maskless"):
                entry.pop(key, None)
    (out / "index.json").write_text(json.dumps(data))
    index = read_index(out)
    heads = replace(boxes_recipe.model, masks="heads")
    recipe = replace(boxes_recipe, data=out, model=heads)
    check(recipe, index)
    assert trained_split(recipe, index) == index.splits["train"]
    for model, flag in (
        (replace(heads, masks="none"), "--model.masks none"),
        (replace(heads, ignore="crowds"), "--model.ignore crowds"),
    ):
        with pytest.raises(UserError, match=f"{flag}: the shards are of an earlier casc.*again"):
            check(replace(recipe, model=model), index)
    # Where sharding found neither crowds nor objects without a mask there is nothing to know.
    clean = replace(old["train"], report={})
    assert training_split(clean, masks=False, regions=True).train_samples == 4


@pytest.mark.parametrize("masks", ["heads", "none"])
def test_images_without_objects_are_trained_on_as_background(tiny_recipe, tmp_path, masks: str):
    root, out = data_set(tmp_path / "coco", segmentation="outline", count=4), tmp_path / "kept"
    file = root / "annotations/instances_train.json"
    data = json.loads(file.read_text())
    data["annotations"] = [e for e in data["annotations"] if e["image_id"] not in (2, 3)]
    file.write_text(json.dumps(data))
    index = shard(root, out, settings=Settings(negatives=True), say=lambda _: None)
    assert index.splits["train"].train_samples == 4
    recipe = replace(
        tiny_recipe, data=out, batch=1, epochs=1, model=replace(tiny_recipe.model, masks=masks)
    )
    train(recipe)
    log = [json.loads(line) for line in (recipe.folder / "log.jsonl").read_text().splitlines()]
    steps = [record for record in log if record["kind"] == "train"]
    assert len(steps) == 4
    assert all(np.isfinite(record["loss"]) for record in steps)
    empty = [record for record in steps if record["rpn.positives"] == 0]
    assert len(empty) == 2
    for record in empty:
        assert record["rpn.samples"] > 0
        assert record["s0.positives"] == 0
        assert record["s0.samples"] > 0
        assert record["loss_rpn_bbox"] == 0
        assert record.get("s0.loss_mask", 0) == 0
