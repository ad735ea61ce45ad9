"""Tests on an emulated NPU. It needs processes of its own: a device's name is for good."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
EMULATOR = HERE / "emulator"


@pytest.fixture(scope="session")
def emulator() -> dict[str, str]:
    """The environment in which `import torch` finds NPUs; compiles them if need be."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler (g++), and the emulated NPU is compiled from source")
    if shutil.which("ninja") is None:
        pytest.skip("no ninja, with which torch compiles extensions: pip install ninja")
    environment = {"PYTHONPATH": os.pathsep.join([str(EMULATOR), str(HERE.parents[1])])}
    run_python(["-c", "import torch; assert torch.npu.device_count() == 2"], environment)
    return environment


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """`run_ranks(program, *args, environment=, world=)` starts ranks as torchrun would."""

    def run(program: str, *args: object, environment: dict[str, str], world: int = 1) -> None:
        command = [str(HERE / "programs" / program), *map(str, args)]
        if world == 1:
            run_python(command, environment)
            return
        # A port for each group that the program makes: an earlier one's may be in use still.
        with ExitStack() as held:
            free = [held.enter_context(socket.socket()) for _ in range(8)]
            for each in free:
                each.bind(("127.0.0.1", 0))
            ports = [str(each.getsockname()[1]) for each in free]
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "PORTS": ",".join(ports)}
        ranks = [
            start_python(command, environment | shared | {"RANK": str(i), "LOCAL_RANK": str(i)})
            for i in range(world)
        ]
        for rank in ranks:
            finish(rank)

    return run


@pytest.fixture(scope="session")
def run_module() -> Callable[..., str]:
    """`run_module(name, *args, environment=)` is python -m; gives its output."""

    def run(name: str, *args: object, environment: dict[str, str]) -> str:
        return run_python(["-m", name, *map(str, args)], environment)

    return run


def start_python(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=1800)  # a guard against hanging, no measure
    finally:
        process.kill()
    assert process.returncode == 0, f"{process.args}\n{output[-6000:]}"
    return output


def run_python(command: list[str], environment: dict[str, str]) -> str:
    return finish(start_python(command, environment))
