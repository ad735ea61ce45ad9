"""What a step may cost besides time; a figure that rises has to be raised here, with a reason."""

from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from casc.bench.budgets import READS, Recorder, audit_inference, record_training
from casc.bench.worker import compilations
from casc.data.batch import Batch
from casc.device.compute import Compute
from casc.model import detector
from casc.model.box_head import BoxHeadConfig
from casc.model.detector_config import DetectorConfig
from casc.model.losses import mean_losses
from casc.model.steps import make_detect_step, make_loss_step

EAGER = Compute(compile=False)


def with_capacity(config: DetectorConfig, capacity) -> DetectorConfig:
    return replace(config, mask_head=replace(config.mask_head, capacity=capacity))


@pytest.mark.parametrize(
    ("read", "count"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.numpy(), 1),
        (lambda x: bool(x.any()), 1),
        (lambda x: int(x[0]), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.unique(), 1),
        (lambda x: [float(v) for v in x], 3),
        (lambda x: torch.where(x > 0, x, 0).topk(2), 0),
    ],
)
def test_the_audit_sees_every_read(read, count):
    x = torch.tensor([1.0, -1.0, 2.0])
    with Recorder() as recorder:
        read(x)
    assert recorder.audit().host_reads == count


@pytest.mark.parametrize(("capacity", "reads"), [("counted", 1), ("full", 0)])
def test_a_training_step_of_the_reference_model(capacity, reads):
    # Fewer samples than the reference's are the same operators, sooner.
    config = DetectorConfig(box_head=BoxHeadConfig(samples=16))
    audit = record_training(with_capacity(config, capacity)).audit()
    assert audit.host_reads == reads
    assert audit.operators <= 4500


def test_inference_of_the_reference_model():
    audit = audit_inference(DetectorConfig())
    assert audit.host_reads == 0
    assert audit.operators <= 1800


def graph_operators(function, *args) -> list[str]:
    """The operators of a function's graph, made without a look at any value."""
    graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*args)
    return [
        n.target._schema.name
        for n in graph.graph.nodes
        if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload)
    ]


def test_the_graph_of_a_step_reads_nothing(tiny, tiny_batch):
    """Losses and gradients, all masks included."""
    config, image, canvas = tiny
    config = with_capacity(config, "full")
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    names = list(detector.trainable(config, params))
    step = make_loss_step(config, image, canvas, EAGER)

    def run(params, buffers, columns):
        leaves = {k: v.detach().requires_grad_(k in names) for k, v in params.items()}
        total, _ = mean_losses(step(leaves, buffers, Batch(*columns)))
        return torch.autograd.grad(total, [leaves[k] for k in names])

    made = graph_operators(run, params, buffers, tuple(tiny_batch((2, 1))))
    assert "casc::nms" in made
    assert "casc::bag_backward" in made
    assert not READS.intersection(made)
    assert len(made) <= 4600


def test_the_graph_of_inference_reads_nothing(tiny, tiny_batch):
    config, image, canvas = tiny
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    step = make_detect_step(config, image, canvas, EAGER)

    def run(params, buffers, columns):
        return tuple(step(params, buffers, Batch(*columns)))

    made = graph_operators(run, params, buffers, tuple(tiny_batch((2, 1))))
    assert "casc::nms" in made
    assert not READS.intersection(made)
    assert len(made) <= 2200


def test_compilations_are_counted():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    compiled(torch.ones(2))
    assert compilations() == {"graphs": 1, "graph_breaks": 0, "recompiles": 0}
    compiled(torch.ones(3))
    assert compilations()["graphs"] == 2
