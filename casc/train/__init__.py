"""Training: state, schedule, checkpoints and the loop.

`casc.train(recipe)` is `casc.train.loop.train`: the package can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        from casc.train.loop import train

        return train(*arguments, **named)


sys.modules[__name__].__class__ = _Package
