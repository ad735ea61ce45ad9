import datetime
import os
import socket
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from casc import distributed
from casc.distributed import (
    ALONE,
    Exchange,
    Ranks,
    from_main,
    gather,
    mean,
    process_group,
    ranks_from_environment,
)
from casc.errors import TransientError, UserError
from casc.train.loop import train


def launch(function, *args, world=2):
    """Run function(*args) on ranks as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_entry, (world, port, function, args), nprocs=world)  # type: ignore[attr-defined]


def _entry(rank, world, port, function, args):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    function(*args)


def collectives():
    ranks = ranks_from_environment()
    with process_group(ranks, torch.device("cpu")):
        # Once all have come, a step may take long.
        assert dist.group.WORLD is not None
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        assert backend.options._timeout == datetime.timedelta(hours=2)
        shapes = [(4, 3, 3, 3), (8, 4, 1, 1), (1, 8, 2, 2), (7,), ()]
        params = []
        for i, shape in enumerate(shapes):
            value = torch.zeros(shape)
            if value.dim() == 4 and i != 2:
                value = value.to(memory_format=torch.channels_last)
            params.append(value.requires_grad_())
        exchange = Exchange(params, ranks)
        expected = []
        for rank in range(2):
            generator = torch.Generator().manual_seed(rank)
            expected.append([torch.randn(shape, generator=generator) for shape in shapes])
        for rounds in (1, 3, 1):
            for i in range(rounds):
                pairs = zip(params, expected[ranks.rank], strict=True)
                loss = torch.stack([(param * g).sum() for param, g in pairs]).sum()
                exchange.backward(loss, last=i == rounds - 1)
            for param, a, b in zip(params, *expected, strict=True):
                assert param.grad is not None
                torch.testing.assert_close(param.grad, rounds * (a + b) / 2)
                assert param.grad.stride() == param.stride()
                param.grad = None
        assert mean(torch.tensor([1.0, 3.0]) * ranks.rank, ranks).tolist() == [0.5, 1.5]
        assert from_main(("x", ranks.rank), ranks) == ("x", 0)
        assert gather(ranks.rank, ranks) == ([0, 1] if ranks.main else [])
    assert not dist.is_initialized()


def test_collectives():
    launch(collectives)


def test_alone_nothing_is_sent():
    value = torch.ones(3).requires_grad_()
    Exchange([value], ALONE).backward(2 * value.sum(), last=False)
    assert value.grad is not None
    assert value.grad.tolist() == [2, 2, 2]
    assert gather(1, ALONE) == [1]
    assert from_main(1, ALONE) == 1
    with process_group(ALONE, torch.device("cpu")) as device:
        assert device.type == "cpu"


def test_environment(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_from_environment() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK isn't set: start with torchrun"):
        ranks_from_environment()
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert ranks_from_environment() == Ranks(2, 1)
    assert not ranks_from_environment().main


def test_ranks_that_do_not_come_are_not_waited_for_long(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_JOINING", datetime.timedelta(seconds=1))
    began = time.monotonic()
    with (
        pytest.raises(
            TransientError, match=r"^rank 0 of 2: can't join the other ranks \(.*torchrun"
        ),
        process_group(ranks_from_environment(), torch.device("cpu")),
    ):
        pass
    assert time.monotonic() - began < 300
    assert not dist.is_initialized()


def train_and_save(recipe, path):
    state = train(recipe).state
    plain = {k: v.detach().contiguous() for k, v in state.params.items()}
    save_file(plain, path.format(os.environ["RANK"]))


@pytest.mark.slow
def test_two_ranks_train_alike_and_resume(tiny_recipe, tmp_path):
    recipe = replace(tiny_recipe, batch=1, max_steps=4, save_steps=2, evaluate_every=1, epochs=1)
    path = str(tmp_path / "{}.safetensors")
    launch(train_and_save, replace(recipe, max_steps=2), path)
    launch(train_and_save, recipe, path)
    broken = [load_file(path.format(rank)) for rank in (0, 1)]
    launch(train_and_save, replace(recipe, out=tmp_path / "straight"), path)
    straight = load_file(path.format(0))
    for name, value in straight.items():
        assert torch.equal(value, broken[0][name])
        assert torch.equal(value, broken[1][name])
    log = (recipe.folder / "log.jsonl").read_text()
    assert log.count('"kind": "train", ') == 4
    assert '"Batch_Size": "2 (2 x 1)"' in log
