import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from casc.data.batch import Batch
from casc.data.index import Category, Index, read_index
from casc.data.loader_config import EvalLoaderConfig, TrainLoaderConfig
from casc.data.stream import training_batches
from casc.data.workers import BatchStream
from casc.device.compute import Compute
from casc.distributed import ALONE, process_group, ranks_from_environment
from casc.errors import TransientError, UserError
from casc.evaluate.ground_truth import ground_truth_from_shards
from casc.evaluate.metrics import Evaluation, evaluate_detections, read_evaluation, write_evaluation
from casc.evaluate.run import evaluate_split
from casc.inference.detector import Detector
from casc.model.detector_config import DetectorConfig
from casc.model.forward_detect import Detections
from casc.model.preprocess import ImageConfig

CPU = torch.device("cpu")


def guess(image_id: int) -> Detections:
    """Two boxes that depend on the image alone; those of training images hit now and then."""
    generator = torch.Generator().manual_seed(image_id)
    corner = torch.rand(2, 2, generator=generator) * 24
    boxes = torch.cat([corner, corner + 12 + torch.rand(2, 2, generator=generator) * 8], dim=1)
    labels = torch.randint(0, 2, (2,), generator=generator)
    scores = torch.rand(2, generator=generator)
    return Detections(boxes, scores, labels, torch.tensor([True, image_id % 3 > 0]), soft())


def soft() -> torch.Tensor:
    return torch.linspace(0.4, 1, 28).expand(2, 28, 28).contiguous()


def detecting(find: Callable[[Batch], Detections]) -> Detector:
    class Finder(Detector):
        def detect(self, batch, size, inference=None, image=None):
            return find(batch)

    config, image = DetectorConfig(classes=2), ImageConfig(short=64, long=64)
    categories = (Category(1, "red"), Category(2, "green"))
    return Finder({}, {}, config, image, Compute(compile=False), CPU, categories)


def guesser() -> Detector:
    def find(batch: Batch) -> Detections:
        each = [guess(abs(i)) for i in batch.image_id.tolist()]
        return Detections(*(torch.stack(t) for t in zip(*(one[:5] for one in each), strict=True)))

    return detecting(find)


@pytest.fixture
def shards(tmp_path: Path, write_shards) -> tuple[Path, Index]:
    folder = tmp_path / "shards"
    index = write_shards(folder, {"val": [(0, 7, True), (1, 5, True), (0, 4, True), (1, 1, False)]})
    return folder, index


def evaluated(folder: Path, index: Index, **more) -> Evaluation | None:
    return evaluate_split(
        guesser(), folder, index, "val", batch=2, loading=TrainLoaderConfig(workers=0), **more
    )


def test_a_worker_that_dies_while_the_detector_works_is_named(shards):
    """Inside a training run too, whose own workers it isn't one of."""
    folder, index = shards
    ours: list[BatchStream] = []
    calls: list[int] = []

    def find(batch: Batch) -> Detections:
        calls.append(1)
        if len(calls) == 2:  # worker 1's first batch
            os.kill(ours[0].pids[1], signal.SIGKILL)
            time.sleep(30)  # torch raises here
        return Detections._make(t if t is None else t[None] for t in guess(0))

    training = training_batches(
        folder,
        index.splits["val"],
        seed=0,
        steps=range(99),
        batch=1,
        loading=TrainLoaderConfig(workers=1),
    )
    next(training)
    with (
        training.explained(),
        pytest.raises(
            TransientError, match=r"^loader: worker 1 \(process \d+\) was killed \("
        ) as told,
    ):
        evaluate_split(
            detecting(find),
            folder,
            index,
            "val",
            batch=1,
            loading=EvalLoaderConfig(workers=2),
            opened=ours.append,
        )
    assert f"process {ours[0].pids[1]})" in str(told.value)
    assert "val/00000" in str(told.value)
    assert "--loading.window" not in str(told.value)
    training.close()


def of_whole(folder: Path, index: Index) -> Evaluation:
    """Without parts, ranks or loaders."""
    truth = ground_truth_from_shards(folder, index, "val")
    outputs = [
        (
            Detections._make(t if t is None else t[None] for t in guess(image["id"])),
            torch.tensor([image["id"]]),
            torch.tensor([[image["height"], image["width"]]]),
        )
        for image in truth["images"]
    ]
    return evaluate_detections(
        ((f, i, s.float()) for f, i, s in outputs), truth, [c.id for c in index.categories]
    )


@pytest.mark.parametrize("processes", [None, 1])
def test_a_split_is_evaluated(shards, processes: int | None):
    folder, index = shards
    seen: list[int] = []
    evaluation = evaluated(folder, index, watch=seen.append, processes=processes)
    assert evaluation is not None
    assert evaluation == of_whole(folder, index)
    assert evaluation.images == sum(seen) == 17
    assert evaluation.figures["bbox"]["AP50"]


def test_missing_images_are_noticed(shards):
    folder, index = shards
    split = index.splits["val"]
    wrong = replace(index, splits={"val": replace(split, samples=split.samples + 1)})
    with pytest.raises(UserError, match="18 images by its index, of which 17"):
        evaluated(folder, wrong)


def on_a_rank(rank: int, world: int, port: int, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = ranks_from_environment()
    with process_group(ranks, CPU):
        evaluation = evaluated(folder, read_index(folder), ranks=ranks)
    assert (evaluation is not None) == ranks.main
    if evaluation is not None:
        write_evaluation(evaluation, out)


def test_ranks_share_the_images(shards, tmp_path: Path):
    folder, index = shards
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "evaluation.json"
    mp.spawn(on_a_rank, (2, port, folder, out), nprocs=2)  # type: ignore[attr-defined]
    assert read_evaluation(out) == evaluated(folder, index, ranks=ALONE)
