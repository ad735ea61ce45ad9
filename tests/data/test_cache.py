import multiprocessing
import os
import signal
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from faulty_server import Answer, serving

from casc.data import cache
from casc.data.cache import cached_shard
from casc.data.index import Shard
from casc.data.loader_config import TrainLoaderConfig
from casc.data.status import Status
from casc.errors import UserError

SIZE = 100_000


@pytest.fixture
def server(tmp_path):
    (tmp_path / "www").mkdir()
    with serving(tmp_path / "www") as faulty:
        yield faulty


@pytest.fixture
def shards(server) -> list[Shard]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(5):
        content = rng.bytes(SIZE)
        (server.folder / f"{i}.tar").write_bytes(content)
        made.append(Shard(f"{i}.tar", 0, True, 1, SIZE, sha256(content).hexdigest()))
    return made


@pytest.fixture
def loading(tmp_path) -> TrainLoaderConfig:
    return TrainLoaderConfig(
        cache=tmp_path / "cache", cache_gb=3.5 * SIZE / 1e9, timeout=5, backoff=0.001, retries=2
    )


def get(server, shard: Shard, loading: TrainLoaderConfig) -> bytes | None:
    found = cached_shard(f"{server.url}/{shard.name}", shard, loading, Status())
    if found is None:
        return None
    with found.stream as stream:
        return stream.read()


def held(loading: TrainLoaderConfig) -> set[str]:
    return {path.name for path in Path(str(loading.cache)).iterdir()}


def test_it_fetches_once_and_removes_what_was_not_read_for_longest(server, shards, loading):
    names = [f"{shard.sha256}.tar" for shard in shards]
    for at in (0, 1, 2):
        assert get(server, shards[at], loading) == (server.folder / f"{at}.tar").read_bytes()
        time.sleep(0.01)
    get(server, shards[0], loading)
    assert len(server.requests) == 3
    assert held(loading) == set(names[:3])
    get(server, shards[3], loading)  # there is room for three: 1 goes, 0 was read after it
    assert held(loading) == {names[0], names[2], names[3]}
    time.sleep(0.01)
    get(server, shards[1], loading)
    assert held(loading) == {names[0], names[3], names[1]}
    assert len(server.requests) == 5


def test_one_url_more_makes_no_second_copy(server, shards, loading):
    get(server, shards[0], loading)
    (server.folder / "again.tar").write_bytes((server.folder / "0.tar").read_bytes())
    get(server, replace(shards[0], name="again.tar"), loading)
    assert len(server.requests) == 1


def test_an_interrupted_fetch_goes_on(server, shards, loading):
    loading.cache.mkdir()
    content = (server.folder / "0.tar").read_bytes()
    part = loading.cache / f"{shards[0].sha256}.{SIZE}.part"
    part.write_bytes(content[:60_000])
    assert get(server, shards[0], loading) == content
    assert [request.start for request in server.requests] == [60_000]
    assert held(loading) == {f"{shards[0].sha256}.tar"}


def test_a_torn_part_is_fetched_anew(server, shards, loading):
    loading.cache.mkdir()
    content = (server.folder / "0.tar").read_bytes()
    part = loading.cache / f"{shards[0].sha256}.{SIZE}.part"
    part.write_bytes(bytes(30_000))
    assert get(server, shards[0], loading) == content
    assert [request.start for request in server.requests] == [30_000, 0]


def test_a_file_that_was_cut_by_a_crash_is_fetched_anew(server, shards, loading):
    content = get(server, shards[0], loading)
    (loading.cache / f"{shards[0].sha256}.tar").write_bytes(b"")
    assert get(server, shards[0], loading) == content
    assert len(server.requests) == 2


def test_parts_of_the_dead_make_room(server, shards, loading):
    loading.cache.mkdir()
    for shard in shards[1:4]:
        (loading.cache / f"{shard.sha256}.{SIZE}.part").write_bytes(b"x")
    assert get(server, shards[0], loading) is not None
    assert len([name for name in held(loading) if name.endswith(".part")]) == 2


def test_no_room_beside_what_others_fetch(server, shards, loading):
    loading.cache.mkdir()
    others = [shard.sha256 for shard in shards[1:4]]
    for name in others:
        (loading.cache / f"{name}.{SIZE}.part").write_bytes(b"x")
    holding = [cache._locked(loading.cache / f"{name}.lock") for name in others]
    for lock in holding:
        lock.__enter__()
    assert get(server, shards[0], loading) is None
    for lock in holding:
        lock.__exit__(None, None, None)


def test_a_shard_larger_than_the_cache(server, shards, loading):
    small = replace(loading, cache_gb=0.5 * SIZE / 1e9)
    with pytest.raises(UserError, match=r"--loading.cache-gb 5e-05: 0\.tar alone has 0\.0001 GB"):
        get(server, shards[0], small)


def test_a_cache_that_can_not_be_written(server, shards, loading, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--loading.cache .*file: can't keep .*; choose another"):
        get(server, shards[0], replace(loading, cache=tmp_path / "file"))


def test_a_full_disk(server, shards, loading, monkeypatch):
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_download", full)
    with pytest.raises(UserError, match=r"can't keep .*No space left on device; lower --loading"):
        get(server, shards[0], loading)


def _many(url: str, shards: list[Shard], loading: TrainLoaderConfig, seed: int) -> None:
    for i in np.random.default_rng(seed).integers(0, len(shards), 30).tolist():
        found = cached_shard(f"{url}/{shards[i].name}", shards[i], loading, Status())
        if found is not None:
            with found.stream as stream:
                assert sha256(stream.read()).hexdigest() == shards[i].sha256


def test_many_processes_and_one_that_is_killed(server, shards, loading):
    """They fetch, wait for each other and remove each other's files all the time."""
    server.behave = lambda request: Answer(drop_after=70_000 if request.number % 3 == 0 else None)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_many, args=(server.url, shards, loading, i)) for i in range(4)
    ]
    for process in processes:
        process.start()
    time.sleep(0.1)
    os.kill(processes[0].pid or 0, signal.SIGKILL)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes[1:]] == [0, 0, 0]
    tars = [path for path in loading.cache.iterdir() if path.suffix == ".tar"]
    assert 1 <= len(tars) <= 3
    for path in tars:
        assert sha256(path.read_bytes()).hexdigest() == path.stem


def test_processes_that_want_one_shard_fetch_it_once(server, shards, loading):
    server.behave = lambda request: Answer(drop_after=20_000)  # slowly
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_many, args=(server.url, shards[:1], loading, i)) for i in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [request.start for request in server.requests] == [0, 20_000, 40_000, 60_000, 80_000]
