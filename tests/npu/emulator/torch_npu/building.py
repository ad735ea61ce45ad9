"""Compiles the device on first use, and loads it."""

import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

SOURCES = Path(__file__).parent / "csrc"
NAME = "npu_emulator"


def library_folder() -> Path:
    """Where this version of the device is kept, under torch's own folder for extensions."""
    digest = hashlib.sha256(f"{torch.__version__} {sys.version}".encode())
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.read_bytes())
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions"
    return Path(root) / f"{NAME}-{digest.hexdigest()[:12]}"


def extension() -> ModuleType:
    """The device's half in C++, compiled if it isn't there yet."""
    folder = library_folder()
    whole = folder / "whole"
    if not whole.exists():
        from torch.utils.cpp_extension import load

        folder.mkdir(parents=True, exist_ok=True)
        sources = [str(file) for file in sorted(SOURCES.glob("*.cpp"))]
        # Several processes may ask at once: torch lets one do it while the others wait.
        module = load(NAME, sources, build_directory=str(folder), extra_cflags=["-O1", "-g0"])
        assert isinstance(module, ModuleType)
        whole.touch()
        return module
    # As `load` does, but without its imports and a build that has nothing to do.
    spec = importlib.util.spec_from_file_location(NAME, folder / f"{NAME}.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
