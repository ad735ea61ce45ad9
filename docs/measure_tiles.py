"""Measure what tiles and larger canvases do to a detector: `python docs/measure_tiles.py`.

A narrow detector with group norms learns coloured discs and squares of 10 to 18 pixels on images of
64 pixels. Then it looks for such objects in an image of 6,000 x 400, as a whole and with tiles; and
in 24 more images of 64 pixels, on their own canvas and on larger ones, with group norms over the
image, as inference has them, and over all of the canvas. All data is generated, in the folder
`runs/tiles`.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

import casc
from casc.data.batch import Batch
from casc.evaluate.coco_results import ImageDetections
from casc.inference.detector import Detector
from casc.inference.settings import Settings, Views
from casc.model.anchors import AnchorConfig
from casc.model.box_head import BoxHeadConfig
from casc.model.preprocess import ImageConfig
from casc.printing import say
from casc.recipes.demo import demo
from casc.train.optim import Optim
from casc.train.schedule import Schedule

FOLDER = Path("runs/tiles")
COLOURS = ((220, 60, 60), (60, 200, 60), (70, 90, 230))
SMALL, LARGE = (64, 64), (400, 6000)
TRAIN, EPOCHS, OBJECTS, SMALL_IMAGES = 100, 8, 1500, 24


def draw(
    rng: np.random.Generator, size: tuple[int, int], wanted: int
) -> tuple[np.ndarray, list[dict]]:
    """Objects that don't touch on a grey ground with noise, and COCO's annotations of them."""
    height, width = size
    image = rng.integers(60, 140, (height, width, 1), dtype=np.uint8).repeat(3, axis=2)
    taken, annotations = np.zeros((height, width), bool), []
    for _ in range(50 * wanted):
        if len(annotations) == wanted:
            break
        radius, label = rng.uniform(5, 9), int(rng.integers(len(COLOURS)))
        x, y = rng.uniform(radius + 1, [width - radius - 1, height - radius - 1])
        corners = 24 if label else 4
        angle = 2 * np.pi * (np.arange(corners) / corners + rng.random())
        outline = np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)
        (x0, y0), (x1, y1) = np.floor(outline.min(axis=0)), np.ceil(outline.max(axis=0))
        window = slice(int(y0) - 2, int(y1) + 2), slice(int(x0) - 2, int(x1) + 2)
        starts, stops = ([getattr(w, end) for w in window] for end in ("start", "stop"))
        if min(starts) < 0 or stops[0] > height or stops[1] > width or taken[window].any():
            continue
        taken[window] = True
        ys, xs = np.mgrid[window] + 0.5
        ends = np.roll(outline, -1, axis=0) - outline
        lines = zip(outline, ends, strict=True)
        sides = [(xs - px) * dy - (ys - py) * dx for (px, py), (dx, dy) in lines]
        inside = np.max(sides, axis=0) <= 0
        noise = rng.integers(-25, 26, (int(inside.sum()), 1))
        image[window][inside] = np.clip(np.array(COLOURS[label]) + noise, 0, 255)
        low, high = outline.min(axis=0), outline.max(axis=0)
        annotations.append(
            {
                "category_id": label + 1,
                "bbox": [*low.tolist(), *(high - low).tolist()],
                "area": float(inside.sum()),
                "iscrowd": 0,
                "segmentation": [outline.reshape(-1).tolist()],
            }
        )
    return image, annotations


def make(split: str, count: int, size: tuple[int, int], objects: int) -> None:
    """Write a split in COCO's layout."""
    folder = FOLDER / "images"
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        rng = np.random.default_rng([len(split), number])
        image, found = draw(rng, size, objects)
        Image.fromarray(image).save(folder / split / f"{number}.jpg", quality=92)
        entry = {"id": number, "file_name": f"{number}.jpg", "height": size[0], "width": size[1]}
        images.append(entry)
        for each in found:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **each})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(("red", "green", "blue"))]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))


@dataclass(frozen=True, eq=False)
class OnLargerCanvas(Detector):
    """The same detector, which sees images on a canvas of so many times each side."""

    times: int = 1

    def find(self, batches: Iterable[tuple[Batch, tuple[int, int]]]) -> Iterator[ImageDetections]:
        """Yield what is found in each image."""
        return super().find((batch, (h * self.times, w * self.times)) for batch, (h, w) in batches)


def main() -> None:
    """Generate, train, evaluate."""
    make("train2017", TRAIN, SMALL, 3)
    make("val2017", 1, LARGE, OBJECTS)
    make("more", SMALL_IMAGES, SMALL, 3)
    casc.shard(FOLDER / "images", FOLDER / "shards", say=say)
    base = demo()
    model = replace(
        base.model,
        classes=len(COLOURS),
        backbone=replace(base.model.backbone, width=16),
        fpn=replace(base.model.fpn, channels=32),
        anchors=AnchorConfig(scale=2.5),
        rpn=replace(base.model.rpn, channels=32, samples=64, train_proposals=60),
        box_head=BoxHeadConfig(samples=24, channels=64),
        mask_head=replace(base.model.mask_head, convs=1, channels=16),
    )
    recipe = replace(
        base,
        name="tiles",
        data=FOLDER / "shards",
        out=FOLDER / "run",
        epochs=EPOCHS,
        evaluate_every=0,
        image=ImageConfig(short=SMALL[0], long=SMALL[1]),
        optim=Optim(lr=0.03, reference_batch=4, clip_norm=10.0),
        schedule=Schedule(kind="cosine", warmup_steps=20),
        model=model,
    )
    casc.train(recipe)
    detector = casc.load(FOLDER / "run").with_settings(Settings(detections=100))
    for name, views in (
        ("whole", Views()),
        ("--tiles 64", Views(tiles=64)),
    ):
        looking = detector.with_views(views)
        most = 1000 if views.tiles else 100
        figures = casc.evaluate(looking, FOLDER / "shards", batch=1, max_dets=most).figures
        box, mask = (figures[kind][key(most)] for kind in ("bbox", "segm"))
        say(f"{name}: box AP {box:.3f}, mask AP {mask:.3f}")
    kept = {f.name: getattr(detector, f.name) for f in fields(detector) if f.init}
    for times in (1, 2, 3):
        larger = OnLargerCanvas(**kept, times=times)
        for over, way in (
            ("the image", nullcontext()),
            ("all of it", mock.patch("casc.model.detector.image_cells", return_value=None)),
        ):
            with way:
                figures = casc.evaluate(larger, FOLDER / "shards", "more").figures
            say(f"canvas x {times}, norms over {over}: box AP {figures['bbox']['AP']:.3f}")


def key(most: int) -> str:
    """What the figure is called."""
    return "AP" if most == 100 else f"AP@{most}"


if __name__ == "__main__":
    main()
