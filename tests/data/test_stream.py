import itertools
import time
from collections import Counter
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch

from casc.data.batch import Batch
from casc.data.collate import collate
from casc.data.plan import noise_seed, plan_epoch
from casc.data.sample import iter_tar, read_sample
from casc.data.stream import (
    TrainLoaderConfig,
    ahead,
    evaluation_batches,
    to_device,
    training_batches,
)
from casc.errors import UserError

EMPTY = Batch(*(torch.zeros(0) for _ in range(9)))
SHARDS = [(0, 7, True), (1, 5, True), (0, 4, True), (1, 3, False)]


def ids(batches) -> list[list[int]]:
    return [batch.image_id.tolist() for _, batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_follow_the_plan(tmp_path, write_shards, workers):
    split = write_shards(tmp_path, {"train": SHARDS}).splits["train"]
    loading = TrainLoaderConfig(workers=workers, window=4)
    common = {"seed": 5, "batch": 2, "loading": loading}
    plan = plan_epoch(split, seed=5, epoch=0, world=1, batch=2, workers=workers, window=4)
    assert plan.steps == 6 + 3
    items = list(training_batches(tmp_path, split, steps=range(18), **common))
    assert [bucket for bucket, _ in items][:9] == plan.buckets(0).tolist()
    for epoch in (0, 1):
        batches = items[9 * epoch : 9 * epoch + 9]
        seen = Counter(itertools.chain(*ids(batches)))
        assert set(seen) == set(range(1, 17))
        assert sum(seen.values()) == 18
        for bucket, batch in batches:
            shape = (48, 64) if bucket == 0 else (64, 48)
            assert batch.image.shape == (2, *shape, 3)
            expected = [noise_seed(5, epoch, i) for i in batch.image_id.tolist()]
            assert batch.seed.tolist() == expected
    assert ids(items[:9]) != ids(items[9:])
    # A resumed stream is the tail, also across the epoch's end.
    for start in (4, 9, 13):
        tail = list(training_batches(tmp_path, split, steps=range(start, 18), **common))
        assert ids(tail) == ids(items[start:])
        for (_, a), (_, b) in zip(tail, items[start:], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a[:8], b[:8], strict=True))


def test_ranks_share_an_epoch(tmp_path, write_shards):
    split = write_shards(tmp_path, {"train": SHARDS}).splits["train"]
    runs = [
        list(
            training_batches(
                tmp_path, split, seed=0, steps=range(6), batch=1, world=3, rank=rank,
                loading=TrainLoaderConfig(workers=0),
            )
        )
        for rank in range(3)
    ]  # fmt: skip
    assert len({str([bucket for bucket, _ in run]) for run in runs}) == 1
    seen = Counter(i for run in runs for batch in ids(run) for i in batch)
    assert set(seen) == set(range(1, 17))
    assert sum(seen.values()) == 18


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation(tmp_path, write_shards, workers):
    split = write_shards(tmp_path, {"val": SHARDS}).splits["val"]
    loading = TrainLoaderConfig(workers=workers)
    items = list(evaluation_batches(tmp_path, split, batch=4, loading=loading))
    assert all(len(batch) == 4 for batch in ids(items))
    seen = Counter(i for batch in ids(items) for i in batch)
    assert seen.pop(-1) == 1
    assert seen == Counter(range(1, 20))
    parts = [
        list(
            evaluation_batches(tmp_path, split, batch=2, world=2, rank=rank, loading=loading)
        )
        for rank in (0, 1)
    ]  # fmt: skip
    seen = Counter(i for part in parts for batch in ids(part) for i in batch if i >= 0)
    assert seen == Counter(range(1, 20))


def test_workers_end_with_the_stream(tmp_path, write_shards):
    split = write_shards(tmp_path, {"train": SHARDS}).splits["train"]
    before = len(active_children())
    stream = training_batches(tmp_path, split, seed=0, steps=range(10**6), batch=2)
    for _ in range(3):
        next(stream)
    assert len(active_children()) == before + 2
    stream.close()
    assert len(active_children()) == before


def test_a_loader_that_is_not_read_to_its_end_leaves_nothing_open(tmp_path, write_shards):
    split = write_shards(tmp_path, {"train": SHARDS}).splits["train"]
    stream = training_batches(
        tmp_path, split, seed=0, steps=range(9), batch=2, loading=TrainLoaderConfig(workers=0)
    )
    next(stream)
    before = {link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    assert any(path.suffix == ".tar" for path in before)
    del stream  # without the garbage collector's help: it doesn't run during training
    after = {link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    assert not any(path.suffix == ".tar" for path in after)


def test_to_device(tmp_path, write_shards):
    split = write_shards(tmp_path, {"train": SHARDS}).splits["train"]
    _, batch = next(
        training_batches(
            tmp_path, split, seed=0, steps=range(1), batch=2, loading=TrainLoaderConfig(workers=0),
            bitmaps=True,
        )
    )  # fmt: skip
    moved = to_device(batch, torch.device("meta"))
    assert moved.regions is None
    assert all(t is not None and t.is_meta for t in moved[:-1])
    assert to_device(batch._replace(bitmaps=None), torch.device("meta")).bitmaps is None
    assert batch.bitmaps is not None
    assert np.array_equal(batch.bitmaps.sum((2, 3)) > 0, batch.valid)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bitmaps", [False, True])
def test_workers_hand_over_what_is_collated(tmp_path, write_shards, workers, bitmaps):
    split = write_shards(tmp_path, {"train": SHARDS}).splits["train"]
    pairs = {
        int(key): read_sample(image, record)
        for shard in split.shards
        for key, image, record in iter_tar(tmp_path / shard.name)
    }
    stream = training_batches(
        tmp_path, split, seed=0, steps=range(9), batch=2,
        loading=TrainLoaderConfig(workers=workers),
        bitmaps=bitmaps,
    )  # fmt: skip
    # All at once: no batch may be written over by a later one.
    for bucket, batch in list(stream):
        samples = [pairs[i] for i in batch.image_id.tolist()]
        for k, sample in enumerate(samples):
            height, width = sample.image.shape[:2]
            assert batch.size[k].tolist() == [height, width]
            assert np.array_equal(batch.image[k, :height, :width], sample.image)
            assert batch.image[k].int().sum() == sample.image.astype(int).sum()
            objects = len(sample.boxes)
            assert batch.valid[k].sum() == objects
            assert np.array_equal(batch.boxes[k, :objects], sample.boxes)
            assert np.array_equal(batch.labels[k, :objects], sample.labels)
        again = collate(samples, split.buckets[bucket], seeds=batch.seed.tolist(), bitmaps=bitmaps)
        for ours, theirs in zip(batch, again, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert ours.dtype == theirs.dtype
                assert ours.is_contiguous()
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("workers", [0, 1])
def test_ids_and_sizes_do_not_keep_images_alive(tmp_path, write_shards, workers):
    split = write_shards(tmp_path, {"train": SHARDS}).splits["train"]
    _, batch = next(
        training_batches(
            tmp_path,
            split,
            seed=0,
            steps=range(1),
            batch=2,
            loading=TrainLoaderConfig(workers=workers),
        )
    )
    assert batch.image_id.untyped_storage().nbytes() < 100
    assert batch.size.untyped_storage().nbytes() < 100


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 1), (2, 3)])
def test_workers_that_are_far_ahead_write_over_nothing(tmp_path, write_shards, workers, prefetch):
    """Memory is used again; a slow reader must find each batch as it was made."""
    split = write_shards(tmp_path, {"train": SHARDS}).splits["train"]
    made = {
        workers: training_batches(
            tmp_path, split, seed=1, steps=range(24), batch=2,
            loading=TrainLoaderConfig(workers=workers, prefetch=prefetch, window=4),
        )
        for workers in (0, workers)
    }  # fmt: skip
    images = {}
    for _, batch in made[0]:
        images.update(zip(batch.image_id.tolist(), batch.image, strict=True))
    held = []
    for _, batch in made[workers]:
        time.sleep(0.02)  # by now the workers have gone as far as they can
        held.append(batch)
    assert len(held) == 24
    for batch in held:
        for image_id, image in zip(batch.image_id.tolist(), batch.image, strict=True):
            assert torch.equal(image, images[image_id])


def test_workers_with_unequal_shares_write_over_nothing(tmp_path, write_shards):
    """When others have ended, a worker is asked for more batches ahead than usual."""
    split = write_shards(tmp_path, {"val": [(0, 17, True), (1, 1, True)]}).splits["val"]
    expected = {}
    for _, batch in evaluation_batches(
        tmp_path, split, batch=1, loading=TrainLoaderConfig(workers=0)
    ):
        expected[int(batch.image_id)] = batch.image[0]
    held = []
    for _, batch in evaluation_batches(
        tmp_path, split, batch=1, loading=TrainLoaderConfig(workers=2, prefetch=1)
    ):
        time.sleep(0.02)
        held.append(batch)
    assert sorted(int(batch.image_id) for batch in held) == list(range(1, 19))
    assert all(torch.equal(b.image[0], expected[int(b.image_id)]) for b in held)


def test_too_little_shared_memory_says_what_to_do(tmp_path, write_shards, monkeypatch):
    split = write_shards(tmp_path, {"train": SHARDS}).splits["train"]

    def refuse(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to resize file: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(UserError, match=r"shared memory .*--loading\.workers"):
        next(training_batches(tmp_path, split, seed=0, steps=range(2), batch=2))


def test_ahead_hands_on_every_batch_and_its_copy(tmp_path, write_shards):
    split = write_shards(tmp_path, {"train": SHARDS}).splits["train"]

    def batches():
        return training_batches(
            tmp_path, split, seed=0, steps=range(5), batch=2, loading=TrainLoaderConfig(workers=0)
        )

    plain = list(batches())
    moved = list(ahead(batches(), torch.device("meta")))
    assert [bucket for bucket, _, _ in moved] == [bucket for bucket, _ in plain]
    for (_, host, device), (_, expected) in zip(moved, plain, strict=True):
        assert torch.equal(host.image, expected.image)
        assert torch.equal(host.image_id, expected.image_id)
        assert all(t.is_meta for t in device if t is not None)
        assert device.image.shape == expected.image.shape
    for _, host, device in ahead(batches(), torch.device("cpu")):
        assert all(a is b for a, b in zip(host, device, strict=True))


def test_ahead_takes_no_batch_before_it_is_asked():
    taken = []

    def batches():
        for i in range(3):
            taken.append(i)
            yield i, EMPTY

    stream = ahead(batches(), torch.device("cpu"))
    assert next(stream)[0] == 0
    # The host mustn't wait for a batch that the step doesn't need yet.
    assert taken == [0]
