"""Random annotation files, through shards on the disk and back, as pycocotools reads both.

`CASC_DATA_SETS=2000` tries so many data sets; by default there are 50.
"""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from casc.data.index import read_index
from casc.data.sample import iter_tar
from data_tools.plan import Settings
from data_tools.shard import Run, shard_dataset

DATA_SETS = int(os.environ.get("CASC_DATA_SETS", "50"))


def random_segmentation(rng: np.random.Generator, width: int, height: int) -> tuple[Any, Any]:
    """A segmentation in one of COCO's forms, and pycocotools' RLE of it."""
    if rng.random() < 0.3:
        mask = np.zeros((height, width), np.uint8)
        for _ in range(rng.integers(1, 4)):
            x, y = rng.integers(0, width - 4), rng.integers(0, height - 4)
            mask[y : y + rng.integers(2, 20), x : x + rng.integers(2, 20)] = rng.random() < 0.8
        mask[height // 2, width // 2] = 1
        packed: Any = coco_mask.encode(np.asfortranarray(mask))
        if rng.random() < 0.5:
            return {"size": [height, width], "counts": packed["counts"].decode()}, packed
        flat = np.concatenate([[0], mask.T.reshape(-1), [0]])
        cuts = np.flatnonzero(np.diff(flat))
        ends = [0, *cuts.tolist(), height * width]
        counts = np.diff(ends[: len(cuts) + 1] + ([ends[-1]] if cuts[-1] < ends[-1] else []))
        return {"size": [height, width], "counts": counts.tolist()}, packed
    parts = []
    for _ in range(rng.integers(1, 4)):
        centre, radius = (
            rng.uniform(0, [width, height]),
            rng.uniform(3, 25, (rng.integers(3, 9), 1)),
        )
        angle = rng.uniform(0, 2 * np.pi, len(radius))
        if rng.random() < 0.7:
            angle.sort()
        ring = centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        ring = ring.clip(0, [width, height])
        parts.append((ring.round(2) if rng.random() < 0.5 else ring).reshape(-1).tolist())
    return parts, coco_mask.merge(coco_mask.frPyObjects(parts, height, width))


def random_data_set(rng: np.random.Generator, root: Path) -> tuple[dict[str, Any], list[Any]]:
    (root / "annotations").mkdir(parents=True)
    (root / "train").mkdir()
    images, annotations, results = [], [], []
    numbers = rng.permutation(1000)
    for i in range(rng.integers(1, 4)):
        width, height = (int(v) for v in rng.integers(33, 70, 2))
        name = f"sub{i % 2}/{i}.png" if i else "ü 0.png"
        (root / "train" / name).parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "train" / name)
        image_id = int(rng.integers(0, 2**40))
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for _ in range(rng.integers(0, 6)):
            segmentation, rle = random_segmentation(rng, width, height)
            area = int(coco_mask.area(rle))
            entry = {
                "id": int(numbers[len(annotations)]) + 1, "image_id": image_id,
                "category_id": int(rng.choice([2, 7])), "iscrowd": int(rng.random() < 0.15),
                "bbox": [float(v) for v in coco_mask.toBbox(rle)], "segmentation": segmentation,
                "area": float(area if rng.random() < 0.7 else rng.uniform(1, 2000)),
            }  # fmt: skip
            annotations.append(entry)
            shift = rng.integers(-3, 4, 2)
            moved = np.roll(coco_mask.decode(rle), shift, axis=(0, 1))
            found: Any = coco_mask.encode(np.asfortranarray(moved))
            box = [float(v) for v in coco_mask.toBbox(found)]
            score = float(rng.uniform())
            result = {"image_id": image_id, "category_id": entry["category_id"], "score": score}
            results.append({**result, "bbox": box, "segmentation": found})
    order = rng.permutation(len(annotations))
    data = {
        "images": images,
        "annotations": [annotations[i] for i in order],
        "categories": [{"id": 7, "name": "cat"}, {"id": 2, "name": "ant"}],
    }
    (root / "annotations/instances_train.json").write_text(json.dumps(data))
    return data, results


def back(out: Path, categories: list[Any]) -> dict[str, Any]:
    """COCO's format from the shards."""
    images, annotations = [], []
    for shard in read_index(out).splits["train"].shards:
        for _, _, text in iter_tar(out / shard.name):
            record = json.loads(text)
            keys = ("file_name", "width", "height")
            images.append({"id": record["image_id"], **{key: record[key] for key in keys}})
            for entry in record["annotations"]:
                keys = ("id", "category_id", "bbox", "area", "iscrowd", "segmentation")
                entry = {key: entry[key] for key in keys}
                annotations.append({**entry, "image_id": record["image_id"]})
    return {"images": images, "annotations": annotations, "categories": categories}


def read(data: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = json.loads(json.dumps(data))
    coco.createIndex()
    return coco


def figures(truth: COCO, results: list[Any], kind: Any) -> np.ndarray:
    # pycocotools takes a box of every result, and then leaves masks out of it.
    kept = [{k: v for k, v in r.items() if kind == "bbox" or k != "bbox"} for r in results]
    results_of: Any = truth.loadRes
    found = COCOeval(truth, results_of(kept), kind)
    found.evaluate()
    found.accumulate()
    found.summarize()
    return found.stats


def test_shards_give_back_what_pycocotools_reads(tmp_path: Path):
    quiet = Run(workers=1, progress=False, say=lambda _: None)
    for seed in range(DATA_SETS):
        rng, root = np.random.default_rng(seed), tmp_path / str(seed)
        data, results = random_data_set(rng, root)
        shard_dataset(root, root / "out", None, Settings(), quiet)
        with contextlib.redirect_stdout(io.StringIO()):
            before, after = read(data), read(back(root / "out", data["categories"]))
            assert sorted(before.imgs) == sorted(after.imgs), seed
            assert sorted(before.anns) == sorted(after.anns), seed
            for number, entry in before.anns.items():
                other: Any = after.anns[number]
                for key in ("image_id", "category_id", "iscrowd", "bbox", "area"):
                    assert other[key] == entry[key], (seed, number, key)
                masks = before.annToMask(entry), after.annToMask(other)
                assert np.array_equal(*masks), (seed, number)
            if results:
                for kind in ("bbox", "segm"):
                    same = [figures(truth, results, kind) for truth in (before, after)]
                    np.testing.assert_array_equal(*same, err_msg=f"{seed} {kind}")
