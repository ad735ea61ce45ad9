# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
"""`casc bench graph`: what a step will launch on a card, and what bounds it; needs no card.

The step is lowered by Inductor as on the card (`casc.bench.no_gpu`) and read: launches and bytes
of each part, and the time below which the card can't get.
"""

import json
import re
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from casc.bench import no_gpu
from casc.bench.batch import CLASSES, Load, made_up_batch
from casc.bench.cards import CARDS, Card
from casc.config import from_json
from casc.device.compute import Compute
from casc.model import detector, steps
from casc.model.detector_config import DetectorConfig
from casc.model.preprocess import ImageConfig

SHARED_FILES = ("layers", "linear", "losses", "boxes", "noise", "detector", "steps", "row_sums")
"""Files whose operators belong to the part that calls them."""
VIEWS = frozenset(
    {
        "view",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "transpose",
        "permute",
        "t",
        "split",
        "unbind",
        "alias",
        "detach",
        "diagonal",
        "_unsafe_view",
        "split_with_sizes",
        "as_strided",
        "empty",
        "new_empty",
        "empty_like",
        "_reshape_alias",
        "device",
        "size",
    }
)
"""Operators that launch nothing."""


class GraphJob(NamedTuple):
    """What to lower."""

    what: Literal["train", "inference"]
    canvas: tuple[int, int]
    batch: int
    objects: int
    card: str
    dtype: str = "bfloat16"
    capacity: str = "full"
    """Of the mask heads: full, or counted, which is two graphs each way."""
    model: dict[str, Any] | None = None
    """The detector as JSON; None: the reference's."""
    image: dict[str, Any] | None = None
    """What is done to images, as JSON; None: they are taken as they are."""


def report(job: GraphJob) -> dict[str, Any]:
    """Lower a step, mask heads at full capacity, and say what it will launch.

    Changes torch for the whole process: run it in one of its own.
    """
    card = CARDS[job.card]
    no_gpu.pretend(card)
    config = DetectorConfig(classes=CLASSES)
    if job.model is not None:
        config = from_json(DetectorConfig, job.model, "model")
    graphs = lower(job, config)
    return {
        "what": job.what, "canvas": job.canvas, "batch": job.batch, "dtype": job.dtype,
        "card": card.name, **summary(graphs, card),
    }  # fmt: skip


def lower(job: GraphJob, config: DetectorConfig) -> list[no_gpu.Lowered]:
    """The graphs of the step, forward before backward."""
    config = replace(config, mask_head=replace(config.mask_head, capacity=job.capacity))
    image = ImageConfig(short=min(job.canvas), long=max(job.canvas))
    if job.image is not None:
        image = from_json(ImageConfig, job.image, "image")
    dtype = getattr(torch, job.dtype)
    # What "auto" comes to on a card: its check wants one that runs.
    compute = Compute(dtype, torch.channels_last, roi_kernel="triton", nms_kernel="triton")
    found: list[no_gpu.Lowered] = []
    backend = no_gpu.lowering(found, compute.options or {})
    # A backend of one's own has its own options.
    compute = compute._replace(backend=backend)
    load = Load(job.canvas, job.batch, job.objects if job.what == "train" else 0)
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    params = steps.to_format(params, torch.channels_last)
    learn = detector.trainable(config, params)
    batch = made_up_batch(load, config.classes)
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)

    def fake(value: Tensor, *, grad: bool = False) -> Tensor:
        with mode:
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="cuda:0", requires_grad=grad
            )

    params = {name: fake(value, grad=name in learn) for name, value in params.items()}
    buffers = {name: fake(value) for name, value in buffers.items()}
    batch = type(batch)(*(None if value is None else fake(value) for value in batch))
    make = steps.make_loss_step if job.what == "train" else steps.make_detect_step
    step = make(config, image, job.canvas, compute)
    # The one read of a counted step, between its graphs: what is lowered serves any number.
    steps.read_counts = lambda rois: [len(stage.valid) // 2 for stage in rois]
    with mode:
        step(params, buffers, batch)
    return found


def summary(graphs: list[no_gpu.Lowered], card: Card) -> dict[str, Any]:
    """Launches, bytes and the bound, by part and in all."""
    parts: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
    fallbacks: Counter[str] = Counter()
    on_host = 0
    for lowered in graphs:
        nodes = {node.name: node for node in lowered.graph.graph.nodes}
        on_host += len(
            re.findall(r"empty_strided_cpu\(|\.item\(\)|async_compile\.cpp", lowered.code)
        )
        for scheduled, size in lowered.launches:
            inner = scheduled[0].node if len(scheduled) == 1 else None
            if type(inner).__name__ == "MultiOutput" or type(scheduled[0]).__name__.startswith(
                "Nop"
            ):
                continue
            origins = [
                origin
                for sub in scheduled
                if sub.node is not None
                for origin in sub.node.get_origins()
            ]
            launches = 1
            operator = str(getattr(inner, "op_overload", None) or "")
            library = operator or str(getattr(inner, "python_kernel_name", None) or "")
            # What is fused around a convolution names it as an origin, but doesn't compute it.
            computed = {o.name for o in origins if o.name in nodes} if library else set()
            flops = sum(_flops(nodes[name]) for name in computed)
            if operator:
                fallbacks[operator] += 1
            if operator.startswith("casc."):
                node = next(nodes[o.name] for o in origins if o.name in nodes)
                launches, size = _inside(node)
            seconds = max(size / card.bytes_per_s, flops / card.flops)
            entry = parts[_part(origins) + (" backward" if lowered.backward else "")]
            for i, value in enumerate((launches, size, seconds * 1e3)):
                entry[i] += value
    ordered = sorted(parts.items(), key=lambda item: -item[1][0])
    return {
        "graphs": len(graphs),
        "on_host": on_host,
        "launches": int(sum(entry[0] for entry in parts.values())),
        "bytes": int(sum(entry[1] for entry in parts.values())),
        "bound_ms": sum(entry[2] for entry in parts.values()),
        "launches_by_part": {name: int(entry[0]) for name, entry in ordered},
        "bytes_by_part": {name: int(entry[1]) for name, entry in ordered},
        "bound_ms_by_part": {name: entry[2] for name, entry in ordered},
        "fallbacks": dict(fallbacks.most_common()),
    }


def _part(origins: list) -> str:
    """The file of the innermost function that isn't everybody's, by most of the operators."""
    votes: Counter[str] = Counter()
    for origin in origins:
        files = re.findall(r'/casc/[\w/]*?(\w+)\.py"', origin.stack_trace or "")
        own = [name for name in files if name not in SHARED_FILES]
        if files:
            votes[(own or files)[-1]] += 1
    return votes.most_common(1)[0][0] if votes else "other"


def _flops(node: Any) -> float:
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in flop_registry:
        return 0.0
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return float(flop_registry[packet](*args, **kwargs, out_val=node.meta["val"]))


def _inside(node: Any) -> tuple[int, float]:
    """Launches and bytes of an operator of our own, by running its Python over fake tensors."""
    from torch._library.custom_ops import OPDEFS

    function = OPDEFS[node.target._schema.name]._init_fn
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = torch._guards.detect_fake_mode([args, kwargs])
    assert mode is not None
    with mode, _Count() as count:
        function(*args, **kwargs)
    return count.launches, count.bytes


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[1].rstrip("_") not in VIEWS:
            self.launches += 1
            for leaf in torch.utils._pytree.tree_leaves((args, kwargs, out)):
                if isinstance(leaf, Tensor):
                    self.bytes += leaf.numel() * leaf.element_size()
        return out


if __name__ == "__main__":
    print(json.dumps(report(GraphJob(**json.loads(sys.argv[1])))))
