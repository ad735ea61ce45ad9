import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from casc.data.index import Bucket, Category, Index, Shard, Split, write_index


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _sample(rng: np.random.Generator, image_id: int, width: int, height: int, train: bool):
    """A picture of up to three bright rectangles; the class is the colour channel."""
    image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    annotations = []
    for k in range(int(rng.integers(1, 4)) if train else 0):
        w, h = rng.integers(10, 24, 2).tolist()
        x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        label = int(rng.integers(0, 2))
        image[y : y + h, x : x + w, label] = 230
        annotations.append(
            {
                "id": image_id * 10 + k,
                "category_id": label + 1,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                "label": label,
                "train": True,
                "box": [x, y, x + w, y + h],
            }
        )
    coded = io.BytesIO()
    Image.fromarray(image).save(coded, "PNG")
    record = {
        "image_id": image_id,
        "file_name": f"{image_id:012d}.png",
        "width": width,
        "height": height,
        "orientation": 1,
        "train": train,
        "annotations": annotations,
    }
    return coded.getvalue(), json.dumps(record).encode()


@pytest.fixture
def write_shards() -> Callable[..., Index]:
    """Write shards of generated pictures without the sharding tool.

    `write_shards(folder, {"train": [(bucket, samples, train), ...]})` makes each split's
    shards; bucket 0 is landscape (64 x 48), bucket 1 portrait (48 x 64).
    """
    sizes = [(64, 48), (48, 64)]

    def write(folder: Path, splits: dict[str, list[tuple[int, int, bool]]], seed: int = 0) -> Index:
        rng = np.random.default_rng(seed)
        made, image_id = {}, 0
        for split, shards in splits.items():
            entries = []
            for number, (bucket, samples, train) in enumerate(shards):
                name = f"{split}/{number:06d}.tar"
                (folder / split).mkdir(parents=True, exist_ok=True)
                with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as archive:
                    for _ in range(samples):
                        image_id += 1
                        image, record = _sample(rng, image_id, *sizes[bucket], train)
                        _add(archive, f"{image_id:012d}.png", image)
                        _add(archive, f"{image_id:012d}.json", record)
                size = (folder / name).stat().st_size
                entries.append(Shard(name, bucket, train, samples, size, ""))
            made[split] = Split(
                samples=sum(entry.samples for entry in entries),
                train_samples=sum(entry.samples for entry in entries if entry.train),
                buckets=(
                    Bucket("wide", 1.0, None, 48, 64, 3, 4, 0),
                    Bucket("tall", 0.0, 1.0, 64, 48, 3, 4, 0),
                ),
                shards=tuple(entries),
            )
        index = Index((Category(1, "red"), Category(2, "green")), made)
        write_index(folder, index)
        return index

    return write
