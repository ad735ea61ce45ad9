"""Generate a large data set of small images in COCO's layout, to time and weigh sharding.

    python docs/make_large_set.py FOLDER --images 200000 --objects 4 --points 85

makes an annotation file of 1 GB. The images are hard links to a few hundred distinct JPEG files,
and the outlines of objects are drawn from a few thousand. docs/data.md has what it showed.
"""

import argparse
import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

DISTINCT, OUTLINES = 200, 2000


def main() -> None:
    """Make it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--objects", type=int, default=4, help="on each image")
    parser.add_argument("--points", type=int, default=85, help="of each outline")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 48), help="width and height")
    settings = parser.parse_args()
    rng = np.random.default_rng(0)
    for name in ("annotations", "train", "distinct"):
        (settings.folder / name).mkdir(parents=True)
    files = [settings.folder / "distinct" / f"{i}.jpg" for i in range(DISTINCT)]
    for file in files:
        file.write_bytes(picture(rng, *settings.size))
    shapes = [outline(rng, settings.points, *settings.size) for _ in range(OUTLINES)]
    with (settings.folder / "annotations/instances_train.json").open("w") as out:
        out.write('{"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}], "images": [')
        for i in range(settings.images):
            name = f"{i:012d}.jpg"
            os.link(files[i % DISTINCT], settings.folder / "train" / name)
            width, height = settings.size
            entry = {"id": i, "file_name": name, "width": width, "height": height}
            out.write((", " if i else "") + json.dumps(entry))
        out.write('], "annotations": [')
        chosen = rng.integers(OUTLINES, size=settings.images * settings.objects).tolist()
        for i, shape in enumerate(chosen):
            head = f'{{"id": {i}, "image_id": {i // settings.objects}, '
            out.write((", " if i else "") + head + shapes[shape])
        out.write("]}")


def picture(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG file of smooth noise."""
    noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    data = io.BytesIO()
    noise.resize((width, height), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
    return data.getvalue()


def outline(rng: np.random.Generator, points: int, width: int, height: int) -> str:
    """The fields of an annotation that all images may share, as JSON without its head."""
    turn = np.linspace(0, 2 * np.pi, points, endpoint=False)
    centre = rng.uniform(0.2, 0.8, 2) * (width, height)
    radius = rng.uniform(0.05, 0.15) * width * (1 + 0.2 * rng.uniform(size=(points, 1)))
    ring = (centre + radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)).round(2)
    low, size = ring.min(axis=0), np.ptp(ring, axis=0)
    fields = {
        "category_id": int(rng.integers(1, 3)),
        "iscrowd": 0,
        "bbox": [round(float(v), 2) for v in (*low, *size)],
        "area": round(float(size.prod()) * 0.75, 2),
        "segmentation": [ring.reshape(-1).tolist()],
    }
    return json.dumps(fields)[1:]


if __name__ == "__main__":
    main()
