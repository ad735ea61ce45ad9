"""Which compiler makes a device's steps: each is tried on a small loss before it is used.

That one is installed says little: it may be made for another release of torch, or lack what it
calls. So it compiles a loss with its backward, runs both, and what comes out is compared with the
CPU's. This takes seconds and is done in a process of its own, as a compiler that fails may take
the process with it, and as the device's package can load but one of its compilers.
"""

import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from casc.device.devices import (
    COMPILER_PACKAGES,
    CompileBackend,
    Compiler,
    choose_device,
    traits,
)
from casc.errors import UserError
from casc.json_files import read_json, write_json

# Of the loss and its gradients: wide enough for convolutions in TF32 and HF32, and far below what
# a wrong order of operands or a part left out makes of them.
TOLERANCE = 0.02
_SECONDS = 600


class Trial(NamedTuple):
    """How a compiler did."""

    compiler: Compiler
    fault: str
    """What went wrong, in one line; empty if nothing did."""

    def __str__(self) -> str:
        return f"{self.compiler.name} doesn't work: {self.fault}"


def choose_compiler(
    name: CompileBackend, device: torch.device, folder: Path | None = None
) -> tuple[Compiler | None, list[Trial]]:
    """The compiler to use; `auto` takes the first of the device's that works.

    Args:
        name: the recipe's `compile_backend`.
        device: from `choose_device`.
        folder: where answers are kept, from `use_cache`; else they last as long as the process.

    Returns:
        The compiler, None where not one works; and those that were tried before it and don't.

    Raises:
        UserError: the one asked for doesn't work, or isn't for this device.
    """
    compilers = traits(device).compilers
    if name == "auto":
        failed = []
        for compiler in compilers:
            trial = tried(compiler, device, folder)
            if not trial.fault:
                return _loaded(compiler), failed
            failed.append(trial)
        return None, failed
    asked = next((compiler for compiler in compilers if compiler.name == name), None)
    if asked is None:
        names = ", ".join(compiler.name for compiler in compilers)
        raise UserError(f"--compile-backend {name}: not for {device.type}; it has auto, {names}")
    fault = tried(asked, device, folder).fault
    if fault and folder:  # it may have been mended since
        fault = tried(asked, device, folder, again=True).fault
    if fault:
        raise UserError(
            f"--compile-backend {name}: {fault}; {asked.fix}, or use --compile-backend auto"
        )
    return _loaded(asked), []


def tried(
    compiler: Compiler, device: torch.device, folder: Path | None = None, *, again: bool = False
) -> Trial:
    """How a compiler does on a device: what is known of it, or else it is tried.

    Args:
        compiler: from the device's row of the table.
        device: from `choose_device`.
        folder: where answers are kept.
        again: try it, whatever is known.
    """
    if folder is None:
        return Trial(compiler, _fault_in_this_process(compiler, device))
    path = folder / f"compiler-{compiler.name}-{_key(device)}.json"
    # Ranks that start together have one of them try, and read its answer.
    with _locked(folder / "compilers.lock"):
        if not again and path.exists():
            try:
                return Trial(compiler, str(read_json(path)["fault"]))
            except (UserError, KeyError):
                pass  # damaged, so it is tried again
        fault = find_fault(compiler, device)
        when = datetime.now(UTC).isoformat(timespec="seconds")
        write_json({"fault": fault, "when": when, "versions": _versions()}, path)
    return Trial(compiler, fault)


def find_fault(compiler: Compiler, device: torch.device) -> str:
    """Try a compiler in a process of its own; what went wrong in one line, or nothing."""
    code = "from casc.device.compilers import main; main()"
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, compiler.backend, str(device)],
            env=os.environ | {"PYTHONPATH": path} | dict(compiler.environment),
            capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"took more than {_SECONDS} seconds for a small loss"
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return str(json.loads(lines[-1])["fault"])
    said = next((line for line in reversed(done.stderr.strip().splitlines()) if line.strip()), "")
    if done.returncode < 0:
        return f"the process died of {signal.Signals(-done.returncode).name} {said}".strip()
    return said or f"the process ended with {done.returncode}"


@cache
def _fault_in_this_process(compiler: Compiler, device: torch.device) -> str:
    return find_fault(compiler, device)


def _loaded(compiler: Compiler) -> Compiler:
    """Have the device's package load this compiler, once something is compiled."""
    for name, value in compiler.environment:
        os.environ[name] = value
        # Two compilers behind one of torch's names write into one cache.
        tag = f"-{name}={value}"
        if tag not in torch.compiler.config.cache_key_tag:
            torch.compiler.config.cache_key_tag += tag
    return compiler


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes of this machine."""
    if os.name != "posix":
        yield
        return
    fcntl = importlib.import_module("fcntl")
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _versions() -> dict[str, str]:
    found = {}
    for package in COMPILER_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def _key(device: torch.device) -> str:
    """Of everything that decides how a compiler does, a mend included."""
    names = os.environ.get("CXX", ""), "g++", "clang++", "c++"
    row = traits(device)
    told = [(s.name, os.environ.get(s.name)) for s in row.environment]
    facts = (
        device.type,
        _versions(),
        row.compilers,
        [name and shutil.which(name) for name in names],
        told,
        [os.environ.get(name) for name in row.toolkits],
        Path(__file__).read_bytes(),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


# ---- the process that tries ----


def main() -> None:
    """Try `sys.argv`'s compiler on its device and print what is wrong as JSON."""
    backend, name = sys.argv[1:]
    try:
        fault = wrong_results(backend, choose_device(name))
    except Exception as error:
        fault = first_line(error)
    print(json.dumps({"fault": fault}))


def wrong_results(backend: str | Callable, device: torch.device) -> str:
    """What is wrong with a compiled loss and its gradients; nothing where they are the CPU's."""
    values = _inputs()
    expected = _values_and_gradients(small_loss, values)
    compiled = torch.compile(small_loss, backend=backend, fullgraph=True, dynamic=False)
    made = _values_and_gradients(compiled, [value.to(device) for value in values])
    names = "the loss", "a gradient", "a gradient"
    for name, ours, right in zip(names, made, expected, strict=True):
        error = ((ours.cpu() - right).abs().max() / right.abs().max()).item()
        if not error <= TOLERANCE:  # NaN included
            return f"{name} is {error:.2g} off the CPU's"
    return ""


def small_loss(image: Tensor, weight: Tensor, matrix: Tensor) -> Tensor:
    """What steps are made of: convolution, product, sums, choosing the best, gathering, masks.

    Args:
        image: [2, 3, 16, 16].
        weight: [8, 3, 3, 3].
        matrix: [8, 5].
    """
    features = torch.nn.functional.conv2d(image, weight, padding=1).relu()
    rows = features.flatten(2).transpose(1, 2)
    logits = rows @ matrix
    scores = logits.detach().amax(dim=2)
    best, index = scores.topk(40, dim=1)
    chosen = logits.gather(1, index[..., None].expand(-1, -1, logits.shape[2]))
    kept = best > best.mean(dim=1, keepdim=True)
    losses = torch.where(kept[..., None], torch.nn.functional.softplus(chosen), chosen.square())
    return losses.sum() / kept.sum() + rows.mean()


def first_line(error: BaseException) -> str:
    """The error that a compiler wraps in its own, in one line."""
    while isinstance(inner := getattr(error, "inner_exception", None), BaseException):
        error = inner
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]


def _values_and_gradients(function: Callable, values: list[Tensor]) -> list[Tensor]:
    image, *leaves = (value.requires_grad_(i > 0) for i, value in enumerate(values))
    loss = function(image, *leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _inputs() -> list[Tensor]:
    shapes = (2, 3, 16, 16), (8, 3, 3, 3), (8, 5)
    return [
        (torch.arange(torch.Size(shape).numel(), dtype=torch.float32) * 0.7 + i).sin().view(shape)
        for i, shape in enumerate(shapes)
    ]
