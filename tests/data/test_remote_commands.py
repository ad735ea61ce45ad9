"""Commands on shards that lie on a server: the same answers, and all that --loading says."""

import dataclasses
import json
from pathlib import Path

import pytest
from faulty_server import Answer, FaultyServer, serving

import casc.cli.main
import data_tools.cli
from casc.data.index import Index
from casc.train.loop import train

QUICK = ("--loading.timeout", 0.3, "--loading.backoff", 0.01)


@pytest.fixture
def shards(tmp_path, write_shards) -> Index:
    return write_shards(tmp_path / "www", {"train": [(0, 5, True), (1, 4, True)]})


@pytest.fixture
def server(tmp_path, shards):
    with serving(tmp_path / "www") as faulty:
        yield faulty


def run(main, *args) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def fails_at_first(request) -> Answer:
    return Answer(status=503 if request.number == 1 and request.path.endswith(".tar") else None)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("workers", [1, 2])
def test_check_finds_on_a_server_what_it_finds_in_a_folder(
    server: FaultyServer, shards, capsys, workers
):
    args = ("--workers", workers, "--no-progress", *QUICK)
    local = run(data_tools.cli.main, "check", server.folder, *args), capsys.readouterr()
    server.behave = fails_at_first
    remote = run(data_tools.cli.main, "check", server.url, *args), capsys.readouterr()
    assert (remote[0], remote[1].out) == (local[0], local[1].out)
    lines = remote[1].err.splitlines()
    retried = [line for line in lines if line.startswith("warning: http") and "503" in line]
    assert len(retried) == 2
    assert [line for line in lines if line not in retried] == local[1].err.splitlines()
    first, second = shards.splits["train"].shards
    flip(server.folder / first.name)
    (server.folder / second.name).unlink()
    assert run(data_tools.cli.main, "check", server.url, *args) == 1
    faults = capsys.readouterr().err.splitlines()
    assert faults[0] == f"{first.name}: its content has changed (SHA-256 differs)"
    assert any(line.startswith(f"{second.name}: the server says 404") for line in faults)


def test_check_gives_up_on_a_server_that_stalls(server: FaultyServer, capsys):
    server.behave = lambda request: Answer(stall_after=99 if "tar" in request.path else None)
    args = ("--workers", 1, "--loading.timeout", 0.2, "--loading.retries", 0)
    assert run(data_tools.cli.main, "check", server.url, *args) == 1
    error = capsys.readouterr().err
    assert error.count("no bytes came in time at byte 99 of") == 2
    assert "gave up after 0 retries" in error


def test_show_from_a_server_with_a_cache(server: FaultyServer, tmp_path, capsys):
    sheets = []
    for place in (server.folder, server.url, server.url):
        sheets.append(tmp_path / f"{len(sheets)}.png")
        cache = ("--loading.cache", tmp_path / "cache")
        assert run(data_tools.cli.main, "show", place, "--out", sheets[-1], "--n", 9, *cache) == 0
    assert "9 samples" in capsys.readouterr().out
    assert len({sheet.read_bytes() for sheet in sheets}) == 1
    assert sum(request.path.endswith(".tar") for request in server.requests) == 2


def test_commands_run_only_where_that_is_allowed(server: FaultyServer, tmp_path, capsys):
    args = (f"pipe:cat {server.folder}", "--out", tmp_path / "sheet.png")
    assert run(data_tools.cli.main, "show", *args) == 1
    assert "add --loading.allow-commands" in capsys.readouterr().err
    assert run(data_tools.cli.main, "show", *args, "--loading.allow-commands") == 0
    assert (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize(
    "args",
    [("show", "x", "--loading.retries", -1), ("check", "x", "--loading.cache-gb", 0)],
)
def test_settings_out_of_range(args, capsys):
    assert run(data_tools.cli.main, *args) == 1
    assert str(args[2]) in capsys.readouterr().err


def test_eval_on_a_server(tiny_recipe, tmp_path, capsys):
    recipe = dataclasses.replace(tiny_recipe, max_steps=1, evaluate_every=0)
    train(recipe)
    figures = []
    with serving(Path(recipe.data)) as server:
        server.behave = fails_at_first
        for place in (recipe.data, server.url):
            out = tmp_path / f"{len(figures)}.json"
            args = ("--out", out, "--device", "cpu", "--loading.workers", 0, *QUICK)
            assert run(casc.cli.main.main, "eval", recipe.folder, place, *args) == 0
            figures.append(json.loads(out.read_text()))
        told = capsys.readouterr()
        assert f"of {server.url}, cpu" in told.out
        assert "503" in told.err
    assert figures[0] == figures[1]
