"""Faults in shards: each ends the run with a message that names the shard, and none passes."""

import os
import signal
import threading
import time
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casc.data.stream import TrainLoaderConfig, evaluation_batches, training_batches
from casc.errors import TransientError, UserError
from casc.evaluate.ground_truth import ground_truth_from_shards

COUNT = 8
COPY = r"it is damaged, or not of this index: copy it again from where it was made, or make the"


@pytest.fixture
def shard(tmp_path, write_shards):
    index = write_shards(tmp_path, {"train": [(0, COUNT, True)]})
    return tmp_path / "train/000000.tar", index


def read(shard, workers=0, window=128):
    path, index = shard
    return list(
        training_batches(
            path.parent.parent, index.splits["train"], seed=0, steps=range(COUNT // 2), batch=2,
            loading=TrainLoaderConfig(workers=workers, window=window),
        )
    )  # fmt: skip


def flip(shard, at: int) -> None:
    content = bytearray(shard[0].read_bytes())
    content[at] ^= 0x20
    shard[0].write_bytes(content)


def expect(shard, said: str, **how) -> None:
    with pytest.raises(UserError, match=rf"^[^\n]*train/000000\.tar: {said}[^\n]*$"):
        read(shard, **how)


HASH = r"its SHA-256 is [0-9a-f]{64}, the index says [0-9a-f]{64}"


@pytest.mark.parametrize("how", [{"workers": 1}, {"window": 2}, {}])
def test_the_known_faults(shard, how):
    path, index = shard
    whole = path.read_bytes()
    assert len(read(shard, **how)) == COUNT // 2

    path.write_bytes(whole[:-3000])
    expect(shard, rf"is \d+ bytes, the index says \d+; {COPY}", **how)

    if "workers" in how:
        return  # ending workers takes its time, and the rest is the same for them

    path.write_bytes(whole)
    flip(shard, whole.index(b"IDAT") + 20)  # inside an image
    expect(shard, HASH if "window" not in how else f"({HASH}|000000000001: )", **how)

    path.write_bytes(whole)
    flip(shard, whole.rindex(b'"image_id"'))  # inside a JSON
    expect(shard, f"{HASH}|00000000000. ", **how)

    path.write_bytes(whole)
    flip(shard, whole.index(b"000000000004.png"))  # in a header: tarfile takes it for the end
    expect(shard, rf"{HASH} \(ends after 3 samples, the index says 8\); {COPY}", **how)

    path.unlink()
    expect(shard, "the shard is missing; copy it again from where it was made, or make", **how)
    with pytest.raises(UserError, match=r"000000\.tar: the shard is missing"):
        ground_truth_from_shards(path.parent.parent, index, "train")

    path.mkdir()
    expect(shard, r"can't be opened \(Is a directory\)", **how)


def test_an_image_that_was_never_readable(shard):
    """The hash is right: whoever made the shard put it there."""
    path, index = shard
    content = bytearray(path.read_bytes())
    at = content.index(b"IDAT") + 20
    content[at : at + 40] = bytes(40)
    path.write_bytes(content)
    split = index.splits["train"]
    entry = replace(split.shards[0], sha256=sha256(content).hexdigest())
    index.splits["train"] = replace(split, shards=(entry,))
    expect(shard, "000000000001: can't be decoded: .*; run `data_tools check`")


def test_an_index_that_is_not_the_shards(shard, tmp_path, write_shards):
    path, index = shard
    split = index.splits["train"]
    content = path.read_bytes()
    entry = replace(split.shards[0], sha256=sha256(content).hexdigest(), samples=COUNT + 2)
    index.splits["train"] = replace(
        split, shards=(entry,), samples=COUNT + 2, train_samples=COUNT + 2
    )
    with pytest.raises(UserError, match="ends after 8 samples, the index says 10; run `data_tools"):
        list(
            training_batches(
                path.parent.parent, index.splits["train"], seed=0, steps=range(5), batch=2,
                loading=TrainLoaderConfig(workers=0),
            )
        )  # fmt: skip


@settings(max_examples=25)
@given(
    where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), window=st.sampled_from([2, 128])
)
def test_no_flipped_bit_passes(shard, where, bit, window):
    path, _ = shard
    whole = path.read_bytes()
    content = bytearray(whole)
    content[int(where * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        expect(shard, "", window=window)
    finally:
        path.write_bytes(whole)


@settings(max_examples=20)
@given(where=st.floats(0, 1, exclude_max=True))
def test_no_cut_passes(shard, where):
    path, _ = shard
    whole = path.read_bytes()
    path.write_bytes(whole[: int(where * len(whole))])
    try:
        expect(shard, "is ")
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_faults_are_found_by_whoever_reads_only_a_part(tmp_path, write_shards, workers):
    """The last bytes of a shard are damaged; evaluation's first rank reads its first half."""
    index = write_shards(tmp_path, {"val": [(0, COUNT, True)]})
    path = tmp_path / "val/000000.tar"
    flip((path, index), path.stat().st_size - 1)
    for rank in (0, 1):
        with pytest.raises(UserError, match=HASH):
            list(
                evaluation_batches(
                    tmp_path, index.splits["val"], batch=2, world=2, rank=rank,
                    loading=TrainLoaderConfig(workers=workers),
                )
            )  # fmt: skip


# torch's handler of the signal may raise once more while the loader is being taken down.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_ends_the_run_with_its_name(tmp_path, write_shards, sent):
    split = write_shards(tmp_path, {"train": [(0, 6, True), (1, 5, True)]}).splits["train"]
    stream = training_batches(
        tmp_path, split, seed=0, steps=range(10**9), batch=2, loading=TrainLoaderConfig(workers=2)
    )
    next(stream)
    victim = stream.pids[1]
    killer = threading.Timer(0.3, os.kill, (victim, sent))
    killer.start()
    began = time.monotonic()

    def go_on() -> None:
        with stream.explained():
            while True:
                next(stream)
                time.sleep(0.001)  # a step: torch raises wherever the process happens to be

    with pytest.raises(
        TransientError,
        # torch learns of it from a signal, or by asking, and then not what the cause was.
        match=rf"^loader: worker 1 \(process {victim}\) (was killed \([^)]+\)|ended unexpectedly)"
        r" while it was [^\n]*train/00000\d\.tar at byte [^\n]*; [^\n]*"
        r" lower --loading.workers or --loading.prefetch or --loading.window$",
    ):
        go_on()
    killer.join()
    assert time.monotonic() - began < 30
    stream.close()


def test_other_errors_pass_through_unexplained(tmp_path, write_shards):
    split = write_shards(tmp_path, {"train": [(0, 6, True)]}).splits["train"]
    stream = training_batches(
        tmp_path, split, seed=0, steps=range(2), batch=2, loading=TrainLoaderConfig(workers=0)
    )
    with pytest.raises(RuntimeError, match="something else"), stream.explained():
        raise RuntimeError("something else")
