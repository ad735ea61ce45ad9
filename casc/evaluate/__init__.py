"""COCO's figures of detections: ground truth, matching, AP.

`casc.evaluate(detector, shards)` is `casc.evaluate.run.evaluate`: the package can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        from casc.evaluate.run import evaluate

        return evaluate(*arguments, **named)


sys.modules[__name__].__class__ = _Package
