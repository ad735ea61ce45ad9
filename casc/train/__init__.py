"""Training: state, schedule, checkpoints and the loop.

`casc.train(recipe)` is `casc.train.loop.train`: the package can be called.
"""

from casc import make_callable

make_callable(__name__, "casc.train.loop.train")
