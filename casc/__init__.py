"""Cascade Mask R-CNN as pure functions that torch.compile captures whole.

Four functions are all that most programs need; docs/python.md shows them:

    detector = casc.load("runs/coco_1x")
    results = detector("photo.jpg")
    casc.evaluate(detector, "shards")
    casc.train(recipe)
    casc.shard("COCO", "shards")
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from casc.evaluate.run import evaluate as evaluate
    from casc.inference.load import load as load
    from casc.train.loop import train as train
    from data_tools.shard import shard as shard


def make_callable(package: str, place: str) -> None:
    """Let a call of a package be one of a function in it, imported when it is first called.

    Args:
        package: its name, from its own `__init__`.
        place: module and function, such as casc.train.loop.train.
    """
    module, _, name = place.rpartition(".")

    class Package(ModuleType):
        def __call__(self, *arguments: Any, **named: Any) -> Any:
            return getattr(importlib.import_module(module), name)(*arguments, **named)

    sys.modules[package].__class__ = Package


def __getattr__(name: str) -> Any:
    """Import a function when it is first asked for: torch takes seconds."""
    # Of `casc.evaluate` and `casc.train` the packages are the functions.
    if name in ("evaluate", "train"):
        return importlib.import_module(f"casc.{name}")
    places = {"load": "casc.inference.load", "shard": "data_tools.shard"}
    if name in places:
        return getattr(importlib.import_module(places[name]), name)
    raise AttributeError(f"module 'casc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["evaluate", "load", "shard", "train", "__version__"]
