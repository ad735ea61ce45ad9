"""COCO's figures of detections: ground truth, matching, AP.

`casc.evaluate(detector, shards)` is `casc.evaluate.run.evaluate`: the package can be called.
"""

from casc import make_callable

make_callable(__name__, "casc.evaluate.run.evaluate")
