import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from casc.data.index import Index
from data_tools.plan import Settings
from data_tools.shard import Run, shard_dataset

SETTINGS = Settings(
    aspects=(1 / 1.36, 1.0, 1.36),
    max_size=None,
    samples_per_shard=4,
    shard_mib=256.0,
    trace_tolerance=None,
)


class Coco:
    """A small data set in COCO's layout, in the making."""

    def __init__(self, root: Path, split: str = "train") -> None:
        self.root, self.split = root, split
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.categories = [{"id": 3, "name": "cat"}, {"id": 1, "name": "ant"}]
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / split).mkdir(exist_ok=True)

    @property
    def file(self) -> Path:
        return self.root / "annotations" / f"instances_{self.split}.json"

    def image(
        self,
        width: int = 60,
        height: int = 50,
        *,
        data: bytes | None = None,
        name: str | None = None,
        **fields: Any,
    ) -> int:
        """Add an image of noise, or of the given bytes; gives its id."""
        number = fields.get("id", 7 + 5 * len(self.images))
        name = name or f"{number}.jpg"
        path = self.root / self.split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(width, height, seed=number) if data is None else data)
        entry = {"id": number, "file_name": name, "width": width, "height": height, **fields}
        self.images.append(entry)
        return number

    def object(self, image_id: int, *, drop: tuple[str, ...] = (), **fields: Any) -> int:
        """Add an annotation of a 20 x 10 rectangle, changed by `fields`; gives its id."""
        entry = {
            "id": 100 + len(self.annotations),
            "image_id": image_id,
            "category_id": 3,
            "bbox": [10, 10, 20, 10],
            "area": 200.0,
            "iscrowd": 0,
            "segmentation": [[10, 10, 30, 10, 30, 20, 10, 20]],
            **fields,
        }
        self.annotations.append({k: v for k, v in entry.items() if k not in drop})
        return self.annotations[-1].get("id", -1)

    def write(self) -> Path:
        data = {
            "images": self.images,
            "annotations": self.annotations,
            "categories": self.categories,
        }
        self.file.write_text(json.dumps(data))
        return self.root

    def shard(self, out: Path | None = None, **settings: Any) -> tuple[Index, Path]:
        """Write the annotation file, make shards, and give their index and folder."""
        self.write()
        out = out or self.root.with_name("shards")
        index = shard_dataset(self.root, out, None, SETTINGS._replace(**settings), quiet())
        return index, out


def quiet(workers: int = 1) -> Run:
    return Run(workers=workers, progress=False, say=lambda _: None)


def picture(
    width: int, height: int, *, kind: str = "JPEG", mode: str = "RGB", seed: int = 0
) -> bytes:
    """An encoded image of smooth noise."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    out = io.BytesIO()
    noise.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(out, kind)
    return out.getvalue()


@pytest.fixture
def coco(tmp_path: Path) -> Coco:
    """An empty data set."""
    return Coco(tmp_path / "coco")


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., bytes]:
    return picture


@pytest.fixture
def varied(coco: Coco) -> Coco:
    """Twelve images of several aspects, some without objects, with a crowd."""
    sizes = [(60, 50), (50, 60), (64, 40), (40, 64), (50, 50)]
    for i in range(12):
        number = coco.image(*sizes[i % 5])
        for k in range(i % 4):
            coco.object(number, category_id=1 + 2 * (k % 2))
    counts = [400, 30, 2570]
    coco.object(7, iscrowd=1, segmentation={"size": [50, 60], "counts": counts}, area=30)
    return coco


@pytest.fixture
def quiet_run() -> Callable[..., Run]:
    return quiet


@pytest.fixture
def settings() -> Settings:
    return SETTINGS


@pytest.fixture
def another_coco(tmp_path: Path) -> Callable[[str], Coco]:
    """Makes a further data set of the given name."""
    return lambda name: Coco(tmp_path / name)
