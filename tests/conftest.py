import functools
import hashlib
import io
import json
import logging
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from casc.data.batch import Batch
from casc.data.index import Bucket, Category, Index, Shard, Split, write_index
from casc.data.stream import TrainLoaderConfig
from casc.device import compilers
from casc.model.anchors import AnchorConfig
from casc.model.box_head import BoxHeadConfig
from casc.model.detector_config import DetectorConfig, InferenceConfig
from casc.model.fpn import FPNConfig
from casc.model.mask_head import MaskHeadConfig
from casc.model.preprocess import ImageConfig
from casc.model.resnet import ResNetConfig
from casc.model.rpn import RPNConfig
from casc.train.optim import Optim
from casc.train.recipe import Recipe
from casc.train.schedule import Schedule

TESTS = Path(__file__).resolve().parent

# Read when torch first compiles. A fixed folder, so that only the first run is cold.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(TESTS.parent / ".cache" / "inductor"))
os.environ.setdefault("CASC_CACHE", str(TESTS.parent / ".cache"))
# torch writes down all that it compiles where this log has a handler, and pytest gives one to each
# log that keeps its records to itself.
logging.getLogger("torch.__trace").propagate = True
# Tests' tensors are small: more threads would mostly wait for each other.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

hypothesis.settings.register_profile(
    "casc",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=50,
    # Fixtures here hold no state between examples.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("casc")


# In seconds, roughly, on two busy cores; what isn't listed takes less.
LONGEST = {
    "test_verify_compiled.py": 400,
    "test_small_recipes.py": 400,
    "test_steps.py": 250,
    "test_exported_programs.py": 170,
    "test_verify.py": 150,
    "test_distributed.py": 150,
    "test_npu_verify.py": 110,
    "test_vit.py": 60,
    "test_rpn.py": 60,
    "test_elastic.py": 100,
    "test_npu_training.py": 95,
    "test_step_bench.py": 90,
    "test_trajectories.py": 80,
    "test_compile_cache.py": 70,
    "test_chaos.py": 90,
    "test_convert_goldens.py": 60,
    "test_finetuning.py": 50,
    "test_fuzz.py": 40,
    "test_report_browser.py": 40,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `just chaos` and `just fuzz` are told."""
    parser.addoption("--minutes", type=float, help="of chaos; by default the suite's short form")
    parser.addoption("--seed", type=int, default=0, help="of chaos and fuzzing")
    parser.addoption("--cases", type=int, default=300, help="of each kind of fuzzing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first, so that two processes end at about the same time."""
    items.sort(key=lambda item: -LONGEST.get(item.path.name, 0))


_tried_once = functools.cache(compilers.find_fault)


@pytest.fixture(autouse=True)
def compilers_tried_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tests have a compile cache of their own, but the machine's compilers stay the same."""
    if request.path.name != "test_compilers.py":
        monkeypatch.setattr(compilers, "find_fault", _tried_once)


@pytest.fixture
def compiled() -> Callable[[Callable], Callable]:
    """Compiles a function as the step does; an empty cache keeps tests independent."""
    torch.compiler.reset()
    return lambda f: torch.compile(f, fullgraph=True, dynamic=False)


@pytest.fixture(params=["eager", "compiled"])
def mode(request: pytest.FixtureRequest) -> Callable[[Callable], Callable]:
    """Runs a test twice: on a function as it is, and on it compiled."""
    if request.param == "eager":
        return lambda f: f
    return request.getfixturevalue("compiled")


@pytest.fixture(scope="session")
def unit_goldens() -> dict[str, Tensor]:
    """What single functions of the reference computed on made-up inputs."""
    tensors = load_file(TESTS / "goldens" / "goldens_unit.safetensors")
    return {k: v.long() if v.dtype == torch.int32 else v for k, v in tensors.items()}


@pytest.fixture(scope="session")
def golden_file() -> Callable[[str], Path]:
    """The path of a file in tests/goldens; skips the test where the copy leaves it out."""

    def find(name: str) -> Path:
        path = TESTS / "goldens" / name
        if not path.exists():
            pytest.skip(f"tests/goldens/{name} is not in this copy")
        return path

    return find


TINY_CANVAS = (96, 128)


@pytest.fixture(scope="session")
def tiny() -> tuple[DetectorConfig, ImageConfig, tuple[int, int]]:
    """A detector that steps in a fraction of a second, its resize, and its canvas."""
    config = DetectorConfig(
        classes=3,
        backbone=ResNetConfig(depth=18, width=16),
        fpn=FPNConfig(channels=32),
        rpn=RPNConfig(
            channels=32,
            samples=32,
            train_pre_nms=64,
            train_proposals=64,
            test_pre_nms=64,
            test_proposals=32,
        ),
        box_head=BoxHeadConfig(samples=32, channels=64),
        mask_head=MaskHeadConfig(convs=1, channels=16),
        inference=InferenceConfig(detections=10),
    )
    return config, ImageConfig(short=96, long=128), TINY_CANVAS


@pytest.fixture(scope="session")
def tiny_batch() -> Callable[..., Batch]:
    """Makes a batch for `tiny` with so many random ellipses per image."""

    def make(objects: Sequence[int], *, capacity: int = 5, edges: int = 12, seed: int = 0) -> Batch:
        rng = np.random.default_rng(seed)
        count = len(objects)
        sizes = np.array([(60, 96), (72, 80), (48, 64), (72, 96)], np.float32)
        size = np.stack([sizes[i % len(sizes)] for i in range(count)])
        image = np.zeros((count, 72, 96, 3), np.uint8)
        boxes = np.zeros((count, capacity, 4), np.float32)
        polygons = np.zeros((count, capacity, edges, 4), np.float32)
        labels = np.zeros((count, capacity), np.int64)
        angle = np.linspace(0, 2 * np.pi, edges + 1)
        for i, (height, width) in enumerate(size.astype(int)):
            image[i, :height, :width] = rng.integers(0, 256, (height, width, 3))
            for k in range(objects[i]):
                half = rng.uniform(8, 22, 2)
                centre = rng.uniform(half, np.array([width, height]) - half)
                points = centre + half * np.stack([np.cos(angle), np.sin(angle)], -1)
                polygons[i, k] = np.concatenate([points[:-1], points[1:]], -1)
                boxes[i, k] = np.concatenate([points.min(0), points.max(0)])
                labels[i, k] = rng.integers(0, 3)
        valid = np.arange(capacity) < np.array(objects)[:, None]
        image_id = torch.arange(count) + 1
        return Batch(
            image=torch.from_numpy(image),
            size=torch.from_numpy(size),
            boxes=torch.from_numpy(boxes),
            labels=torch.from_numpy(labels),
            valid=torch.from_numpy(valid),
            edges=torch.from_numpy(polygons).flatten(1, 2),
            edge_gt=torch.arange(capacity).repeat_interleave(edges).repeat(count, 1),
            image_id=image_id,
            seed=image_id + 1000 * seed,
        )

    return make


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
                whole = (folder / name).read_bytes()
                digest = hashlib.sha256(whole).hexdigest()
                entries.append(Shard(name, bucket, train, samples, len(whole), digest))
            made[split] = Split(
                samples=sum(entry.samples for entry in entries),
                train_samples=sum(entry.samples for entry in entries if entry.train),
                buckets=(
                    Bucket("wide", 1.0, None, 48, 64, 3, 12, 0),
                    Bucket("tall", 0.0, 1.0, 64, 48, 3, 12, 0),
                ),
                shards=tuple(entries),
            )
        index = Index((Category(1, "red"), Category(2, "green")), made)
        write_index(folder, index)
        return index

    return write


@pytest.fixture
def tiny_recipe(tmp_path, write_shards) -> Recipe:
    """A recipe for seconds on a CPU, eager and in float32, with shards to train on."""
    write_shards(
        tmp_path / "shards",
        {
            "train": [(0, 5, True), (1, 4, True), (0, 1, False)],
            "val": [(0, 3, True), (1, 2, False)],
        },
    )
    return Recipe(
        name="tiny",
        data=tmp_path / "shards",
        out=tmp_path / "run",
        init="random",
        epochs=2,
        train_split="train",
        val_split="val",
        device="cpu",
        dtype="float32",
        compile=False,
        evaluate_every=0,
        log_every=1,
        optim=Optim(lr=0.01, reference_batch=2),
        schedule=Schedule(drops=(1,), warmup_steps=3, warmup_limit=1.0),
        image=ImageConfig(short=64, long=64),
        loading=TrainLoaderConfig(workers=1, window=4),
        model=DetectorConfig(
            classes=2,
            backbone=ResNetConfig(depth=18, norm="gn", width=32, frozen_stages=-1),
            fpn=FPNConfig(channels=32, norm="gn"),
            anchors=AnchorConfig(scale=2),
            rpn=RPNConfig(
                channels=32,
                samples=32,
                train_pre_nms=50,
                train_proposals=40,
                test_pre_nms=50,
                test_proposals=20,
            ),
            box_head=BoxHeadConfig(samples=16, channels=32),
            mask_head=MaskHeadConfig(convs=1, channels=32, norm="gn"),
            inference=InferenceConfig(detections=10),
        ),
    )
