import hashlib
import os
import signal
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from faulty_server import Answer, FaultyServer, Request, serving

from casc.data.index import read_index
from casc.data.loader_config import TrainLoaderConfig, check_loading
from casc.data.remote import join, location, open_remote, read_remote
from casc.data.status import RETRYING, Status
from casc.data.stream import evaluation_batches, training_batches
from casc.errors import UserError
from casc.evaluate.ground_truth import ground_truth_from_shards

QUICK = TrainLoaderConfig(workers=0, timeout=0.3, backoff=0.01, retries=3)
CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "www").mkdir()
    (tmp_path / "www/file").write_bytes(CONTENT)
    with serving(tmp_path / "www") as faulty:
        yield faulty


def fetch(
    server: FaultyServer, loading: TrainLoaderConfig = QUICK, size: int | None = len(CONTENT)
):
    status = Status()
    with open_remote(f"{server.url}/file", size, loading, status) as stream:
        return stream.read(), status


@pytest.mark.parametrize(
    ("root", "name", "expected"),
    [
        ("shards", "train/a.tar", "shards/train/a.tar"),
        ("/x/", "a.tar", "/x/a.tar"),
        ("http://h:80/x/", "train/a b.tar", "http://h:80/x/train/a%20b.tar"),
        (Path("http://h:80/x"), "a.tar", "http://h:80/x/a.tar"),
        (Path("s3://bucket/x"), "a.tar", "s3://bucket/x/a.tar"),
        ("https://h/x?key=1/2", "a.tar", "https://h/x/a.tar?key=1/2"),
        ("file:///x/y%20z", "a.tar", "/x/y z/a.tar"),
        (Path("file:///x/y"), "a.tar", "/x/y/a.tar"),
        (Path("memory://x"), "a.tar", "memory://x/a.tar"),
        ("pipe:cat /x", "a b.tar", "pipe:cat /x/'a b.tar'"),
        ("pipe:get {} | gunzip", "a.tar", "pipe:get a.tar | gunzip"),
        (Path("pipe:./get.sh {}"), "a.tar", "pipe:./get.sh a.tar"),
    ],
)
def test_places(root, name, expected):
    assert join(location(root), name) == expected


def test_a_whole_file(server):
    assert fetch(server)[0] == CONTENT
    assert fetch(server, size=None)[0] == CONTENT
    assert [request.start for request in server.requests] == [0, 0]


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_dropped_connection_goes_on_at_its_byte(server, size):
    server.behave = lambda request: Answer(drop_after=100_000 if request.number < 4 else None)
    data, status = fetch(server, size=size)
    assert data == CONTENT
    # At most three times the same bytes would have been 600,000.
    starts = [request.start for request in server.requests]
    assert starts == [0, 100_000, 200_000]
    assert len(status.notes) == 2
    assert "closed too early at byte 100,000 of 300,000; retry 1 of 3 in 0.0 s" in status.notes[0]


def test_a_server_without_ranges_is_read_over(server):
    server.behave = lambda request: Answer(
        drop_after=100_000 * request.number if request.number < 3 else None, ranges=False
    )
    assert fetch(server)[0] == CONTENT
    assert [request.start for request in server.requests] == [0, 100_000, 200_000]


def test_a_stalled_server_is_asked_again(server):
    server.behave = lambda request: Answer(stall_after=50_000 if request.number == 1 else None)
    began = time.monotonic()
    data, status = fetch(server)
    assert data == CONTENT
    assert time.monotonic() - began < 20
    assert "no bytes came in time at byte 50,000" in status.notes[0]


def test_a_server_that_stalls_for_good_is_given_up(server):
    server.behave = lambda request: Answer(stall_after=0)
    with pytest.raises(
        UserError,
        match=r"/file: no bytes came in time at byte 0 of 300,000; gave up after 3 retries; mend"
        r" the server or the network, or raise --loading\.retries or --loading\.timeout$",
    ):
        fetch(server)
    assert len(server.requests) == 4


def test_half_of_all_answers_are_500(server):
    server.behave = lambda request: (
        Answer(status=500) if request.number % 2 else Answer(drop_after=40_000)
    )
    data, status = fetch(server)
    assert data == CONTENT
    assert "the server says 500 Internal Server Error at byte 0" in status.notes[0]


def test_progress_starts_the_count_of_retries_anew(server):
    server.behave = lambda request: Answer(drop_after=20_000)
    assert fetch(server)[0] == CONTENT
    assert len(server.requests) == 15  # four in a row without a byte would have been too many


def test_a_server_asks_for_patience(server):
    server.behave = lambda request: (
        Answer(status=503, headers={"Retry-After": "1"}) if request.number == 1 else Answer()
    )
    began = time.monotonic()
    assert fetch(server)[0] == CONTENT
    assert time.monotonic() - began >= 1


@pytest.mark.parametrize(
    ("status", "said"),
    [(404, "404 Not Found; the shard is missing there"), (403, "403 Forbidden")],
)
def test_what_will_not_change_is_not_tried_again(server, status, said):
    server.behave = lambda request: Answer(status=status)
    with pytest.raises(UserError, match=f"/file: the server says {said}"):
        fetch(server)
    assert len(server.requests) == 1


def test_a_file_of_another_size_is_refused(server):
    with pytest.raises(UserError, match=r"is 300000 bytes, the index says 300001; .*copy it again"):
        fetch(server, size=len(CONTENT) + 1)


def test_nobody_listens(server):
    place = server.url.replace("127.0.0.1", "127.0.0.2")
    with pytest.raises(UserError, match=r"Connection refused at byte 0; gave up after 3 retries"):
        read_remote(f"{place}/x", QUICK)


def test_any_url_of_fsspec(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/fsspec-test/file", CONTENT)
    with open_remote("memory://fsspec-test/file", len(CONTENT), QUICK, start=1000) as stream:
        assert stream.read() == CONTENT[1000:]
    with pytest.raises(UserError, match="memory://fsspec-test/none: not found"):
        read_remote("memory://fsspec-test/none", QUICK)
    with pytest.raises(UserError, match="nonsense://x: fsspec doesn't know how to open it"):
        read_remote("nonsense://x", QUICK)


def test_a_missing_backend_is_named(monkeypatch):
    def no_backend(_: str):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", no_backend)
    with pytest.raises(UserError, match=r"Install s3fs to access S3\); casc\[remote\] brings"):
        read_remote("s3://bucket/x", QUICK)


@pytest.mark.parametrize("fault", ["stalls", "breaks"])
def test_fsspec_is_tried_again(monkeypatch, fault):
    """What a file system of fsspec's does about time-outs is its own affair."""
    opened: list[int] = []

    class Stream:
        size = len(CONTENT)

        def __init__(self) -> None:
            self.at, self.calls = 0, 0
            opened.append(0)

        def seek(self, at: int) -> None:
            self.at = opened[-1] = at

        def read(self, count: int) -> bytes:
            self.calls += 1
            if self.calls == 2 and len(opened) < 3:
                if fault == "breaks":
                    raise ValueError("some library's very own error")
                time.sleep(1)
            data = CONTENT[self.at : self.at + min(count, 100_000)]
            self.at += len(data)
            return data

        def close(self) -> None:
            pass

    class System:
        def open(self, path: str, mode: str) -> Stream:
            return Stream()

    monkeypatch.setattr("fsspec.core.url_to_fs", lambda place: (System(), place))
    with open_remote("made-up://file", len(CONTENT), QUICK) as stream:
        assert stream.read(len(CONTENT)) == CONTENT
    assert opened == [0, 100_000, 200_000]


def test_commands_need_a_flag(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    place = f"pipe:touch {tmp_path}/ran; cat {tmp_path}/file"
    with pytest.raises(UserError, match=r"run a command in a shell; .*--loading\.allow-comm"):
        open_remote(place, None, QUICK)
    with pytest.raises(UserError, match="would run a command"):
        read_index(f"pipe:touch {tmp_path}/ran; cat {tmp_path}")
    assert not (tmp_path / "ran").exists()
    allowed = TrainLoaderConfig(allow_commands=True, timeout=0.3, backoff=0.01, retries=1)
    assert read_remote(place, allowed) == CONTENT
    with open_remote(place, len(CONTENT), allowed, start=1000) as stream:
        assert stream.read() == CONTENT[1000:]
    with pytest.raises(UserError, match="ended with status 3 at byte 0; gave up after 1 retries"):
        read_remote("pipe:exit 3", allowed)
    began = time.monotonic()
    with pytest.raises(UserError, match="no bytes came in time"):
        read_remote("pipe:sleep 100 | cat", allowed)
    assert time.monotonic() - began < 20


def test_a_url_in_a_path_of_a_command_is_refused():
    with pytest.raises(UserError, match="put the command into a script"):
        location(Path("pipe:curl http://h/x"))


SHARDS = {"train": [(0, 7, True), (1, 5, True), (0, 4, True)]}


def batches(root, split, loading):
    return [
        (bucket, *batch)
        for bucket, batch in training_batches(
            root, split, seed=3, steps=range(9), batch=2, loading=loading
        )
    ]


def same(ours, theirs) -> bool:
    return all(
        a is b is None or a == b if not hasattr(a, "shape") else bool((a == b).all())
        for left, right in zip(ours, theirs, strict=True)
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", [False, True])
def test_training_through_a_server_that_fails_half_the_time(
    tmp_path, server, write_shards, workers, cache
):
    split = write_shards(server.folder, SHARDS).splits["train"]
    local = batches(server.folder, split, TrainLoaderConfig(workers=workers, window=4))

    def behave(request: Request) -> Answer:
        return Answer(status=500) if request.number % 2 else Answer(drop_after=9_000)

    server.behave = behave
    loading = TrainLoaderConfig(
        workers=workers, window=4, timeout=5, backoff=0.001, retries=20,
        cache=tmp_path / "cache" if cache else None,
    )  # fmt: skip
    assert read_index(server.url, loading).splits["train"] == split
    assert read_index(Path(server.url) / "index.json", loading).splits["train"] == split
    warnings: list[str] = []
    stream = training_batches(
        Path(server.url), split, seed=3, steps=range(9), batch=2, loading=loading,
        warn=warnings.append,
    )  # fmt: skip
    remote = [(bucket, *batch) for bucket, batch in stream]
    assert len(remote) == len(local) == 9
    assert same(local, remote)
    assert any("retry 1 of 20" in text for text in warnings)
    if cache:
        names = {f"{shard.sha256}.tar" for shard in split.shards}
        assert set(os.listdir(tmp_path / "cache")) == names  # noqa: PTH208
        asked = len(server.requests)
        assert same(batches(server.url, split, loading), local)
        assert len(server.requests) == asked  # a second run reads from the cache


def test_evaluation_and_its_truth_from_a_server(server, write_shards):
    index = write_shards(server.folder, {"val": SHARDS["train"]})
    split = index.splits["val"]
    seen = [
        i
        for _, batch in evaluation_batches(server.url, split, batch=4, loading=QUICK)
        for i in batch.image_id.tolist()
        if i >= 0
    ]
    assert sorted(seen) == list(range(1, 17))
    here = ground_truth_from_shards(server.folder, index, "val")
    assert ground_truth_from_shards(server.url, index, "val", QUICK) == here


def test_a_shard_that_is_missing_or_damaged_on_the_server(tmp_path, server, write_shards):
    split = write_shards(server.folder, {"train": [(0, 7, True)]}).splits["train"]
    shard = server.folder / split.shards[0].name
    whole = shard.read_bytes()
    shard.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    for loading in (QUICK, TrainLoaderConfig(workers=0, cache=tmp_path / "cache")):
        with pytest.raises(UserError) as error:
            batches(server.url, split, loading)
        found = hashlib.sha256(shard.read_bytes()).hexdigest()
        expected = split.shards[0].sha256
        assert f"000000.tar: its SHA-256 is {found}, the index says {expected}" in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []
    shard.unlink()
    with pytest.raises(
        UserError, match=r"000000\.tar: the server says 404 Not Found; the shard is"
    ):
        batches(server.url, split, QUICK)


def test_the_stuck_report_names_what_a_worker_waits_for(server, write_shards):
    split = write_shards(server.folder, {"train": [(0, 7, True)]}).splits["train"]
    server.behave = lambda request: Answer(stall_after=8_192)
    loading = TrainLoaderConfig(workers=1, timeout=0.2, backoff=60, retries=3)
    stream = training_batches(
        server.url, split, seed=0, steps=range(3), batch=2, loading=loading, warn=lambda _: None
    )
    reports: list[str] = []

    def watch() -> None:
        deadline = time.monotonic() + 20
        while "waiting to retry" not in stream.stuck_report() and time.monotonic() < deadline:
            time.sleep(0.02)
        reports.append(stream.stuck_report())
        os.kill(stream.pids[0], signal.SIGKILL)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with pytest.raises(
        UserError,
        match=r"loader: worker 0 \(process \d+\) was killed \(Killed\) while it was waiting to"
        r" retry train/000000\.tar at byte 8,192, for \d s; .* memory runs out",
    ):
        next(stream)
    watcher.join()
    assert f"worker 0 (process {stream.pids[0]}): waiting to retry train/000000.tar" in reports[0]
    assert "at byte 8,192, for 0 s" in reports[0]


@pytest.mark.parametrize(
    "wrong",
    [{"retries": -1}, {"timeout": 0.0}, {"timeout": float("nan")}, {"backoff": -1.0},
     {"cache_gb": 0.0}, {"window": 0}, {"timeout": float("inf")}],
)  # fmt: skip
def test_settings_that_can_not_be_honoured(wrong):
    flag = next(iter(wrong)).replace("_", "-")
    with pytest.raises(UserError, match=f"--loading.{flag} "):
        check_loading(TrainLoaderConfig(**wrong))
    check_loading(TrainLoaderConfig())


def test_a_status_in_words():
    status = Status()
    assert status.row[1] == 0
    status.set(RETRYING, shard=1, byte=5)
    assert status.row[:3].tolist() == [1, RETRYING, 5]


def test_an_index_that_trickles_or_never_ends(server, monkeypatch):
    server.behave = lambda request: Answer(drop_after=10)  # 10 bytes a connection, 300,000 in all
    quick = TrainLoaderConfig(timeout=5, backoff=0.0, retries=3, deadline=0.5)
    with pytest.raises(UserError, match=r"only [\d,]+ bytes came in --loading.deadline 0.5 sec"):
        read_remote(f"{server.url}/file", quick)
    server.behave = lambda request: Answer()
    monkeypatch.setattr("casc.data.remote.MOST_BYTES", 100_000)
    with pytest.raises(UserError, match="is larger than 100,000 bytes"):
        read_remote(f"{server.url}/file", QUICK)


def test_retries_of_the_index_are_told(server, capsys):
    server.behave = lambda request: Answer(status=503 if request.number == 1 else None)
    assert read_remote(f"{server.url}/file", QUICK) == CONTENT
    assert "warning: http" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x", "file:///etc/passwd", "data:,x"])
def test_redirects_lead_to_http_only(server, target):
    server.behave = lambda request: Answer(status=302, headers={"Location": target})
    scheme = target.partition(":")[0]
    with pytest.raises(UserError, match=rf"/file: the server redirects from http to {scheme}"):
        read_remote(f"{server.url}/file", QUICK)
    assert len(server.requests) == 1


def test_passwords_come_from_netrc_and_stay_with_their_host(server, tmp_path, monkeypatch):
    """A redirect to another name of the machine is another host."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password pw\ndefault login all password all\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    elsewhere = server.url.replace("127.0.0.1", "localhost") + "/file"
    server.behave = lambda request: (
        Answer(status=302, headers={"Location": elsewhere}) if request.number == 1 else Answer()
    )
    assert read_remote(f"{server.url}/file", QUICK) == CONTENT
    assert [request.login for request in server.requests] == ["Basic bWU6cHc=", None]
