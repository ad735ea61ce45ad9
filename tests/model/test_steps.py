"""The step itself: one graph, no recompilation, the same numbers as eager.

Everything compiled is compiled once per module, since that is what takes the time.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

from casc.bench.budgets import Recorder
from casc.data.batch import Batch
from casc.device.compute import Compute
from casc.model import detector, steps
from casc.model.anchors import AnchorConfig, grid_anchors
from casc.model.box_head import max_positive
from casc.model.detector_config import DetectorConfig
from casc.model.layers import Params
from casc.model.losses import mean_losses
from casc.model.steps import make_detect_step, make_loss_step, mask_capacity

EAGER = Compute(compile=False)
# Minutes where nothing is compiled yet, a few seconds once it is.
compiles = pytest.mark.slow
# No object, one object, and as many as there can be.
OBJECTS = [(0, 0), (1, 0), (14, 14)]


class Result(NamedTuple):
    total: Tensor
    measures: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


Model = tuple[DetectorConfig, Params, Params]


@pytest.fixture(scope="module")
def tiny(tiny):
    """With samples enough that mask heads run on more than the least number of RoIs."""
    config, image, canvas = tiny
    return replace(config, box_head=replace(config.box_head, samples=96)), image, canvas


@pytest.fixture(scope="module")
def tiny_batch(tiny_batch):
    return partial(tiny_batch, capacity=14)


@pytest.fixture(scope="module")
def model(tiny) -> Model:
    config = tiny[0]
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    return config, params, buffers


def with_capacity(config: DetectorConfig, capacity) -> DetectorConfig:
    return replace(config, mask_head=replace(config.mask_head, capacity=capacity))


def run(step: steps.LossStep, model: Model, batch: Batch) -> Result:
    config, params, buffers = model
    names = detector.trainable(config, params)
    leaves = {k: v.clone().requires_grad_(k in names) for k, v in params.items()}
    total, measures = mean_losses(step(leaves, buffers, batch))
    total.backward()
    return Result(total.detach(), measures, {k: v.grad for k, v in leaves.items()})


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


# ---- compiled, the default way: a graph for all but masks, one read, one for masks ----


class Compiled(NamedTuple):
    step: steps.LossStep
    results: list[Result]
    graphs: int
    breaks: int


@pytest.fixture(scope="module")
def counted(tiny, tiny_batch, model) -> Compiled:
    config, image, canvas = tiny
    torch.compiler.reset()
    counters.clear()
    step = make_loss_step(config, image, canvas, Compute())
    with torch._dynamo.config.patch(recompile_limit=1):
        results = [run(step, model, tiny_batch(objects)) for objects in OBJECTS]
    return Compiled(
        step, results, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    )


def assert_same(made: Result, expected: Result, rtol: float) -> None:
    torch.testing.assert_close(made.total, expected.total, rtol=rtol, atol=0)
    assert made.measures.keys() == expected.measures.keys()
    for name, value in made.measures.items():
        torch.testing.assert_close(
            value, expected.measures[name], rtol=rtol, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, right in expected.gradients.items():
        grad = made.gradients[name]
        assert (grad is None) == (right is None), name
        if grad is not None and right is not None:
            assert (grad - right).norm() <= 10 * rtol * right.norm() + 1e-6, name


@compiles
@pytest.mark.parametrize("case", range(len(OBJECTS)), ids=["none", "one", "full"])
def test_compiled_is_eager(tiny, tiny_batch, model, counted, case):
    config, image, canvas = tiny
    eager = make_loss_step(config, image, canvas, EAGER)
    expected = run(eager, model, tiny_batch(OBJECTS[case]))
    assert_same(counted.results[case], expected, rtol=1e-4)


@compiles
def test_two_graphs_serve_all_stages_and_counts(model, counted):
    slots = 2 * max_positive(model[0].box_head)
    counts = {
        mask_capacity(round(2 * r.measures[f"s{i}.positives"].item()), slots, True)
        for r in counted.results
        for i in range(3)
    }
    assert len(counts) > 1
    assert counted.graphs == 2
    assert counted.breaks == 0


@compiles
def test_nothing_recompiles(tiny_batch, model, counted):
    with torch.compiler.set_stance("fail_on_recompile"):
        for objects, first in zip(OBJECTS, counted.results, strict=True):
            again = run(counted.step, model, tiny_batch(objects))
            # And the same batch gives the same step, bit for bit.
            assert again.total == first.total
            for name, grad in again.gradients.items():
                right = first.gradients[name]
                assert same(grad, right), name


@compiles
def test_frozen_parameters_get_no_gradient(model, counted):
    names = set(detector.trainable(model[0], model[1]))
    for result in counted.results:
        got = {name for name, grad in result.gradients.items() if grad is not None}
        assert got == names
        assert all(g.isfinite().all() for g in result.gradients.values() if g is not None)


# ---- compiled in one piece, in bfloat16 and channels_last: the fast way of accelerators ----


@pytest.fixture(scope="module")
def full_model(tiny) -> Model:
    # One stage: the others would compile the same again.
    config = with_capacity(replace(tiny[0], stages=tiny[0].stages[:1]), "full")
    return config, *detector.init(config, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def full(tiny, tiny_batch, full_model) -> Compiled:
    _, image, canvas = tiny
    config, params, buffers = full_model
    model = config, steps.to_format(params, torch.channels_last), buffers
    torch.compiler.reset()
    counters.clear()
    compute = Compute(torch.bfloat16, torch.channels_last)
    step = make_loss_step(config, image, canvas, compute)
    results = [run(step, model, tiny_batch(OBJECTS[0]))]
    with torch.compiler.set_stance("fail_on_recompile"):
        results += [run(step, model, tiny_batch(n)) for n in OBJECTS[1:]]
    return Compiled(
        step, results, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    )


@compiles
def test_full_capacity_is_a_single_graph(full):
    assert full.graphs == 1
    assert full.breaks == 0


@compiles
@pytest.mark.parametrize("case", range(len(OBJECTS)), ids=["none", "one", "full"])
def test_bfloat16_is_near_float32(tiny, tiny_batch, full_model, full, case):
    _, image, canvas = tiny
    low = full.results[case]
    step = make_loss_step(full_model[0], image, canvas, EAGER)
    exact = run(step, full_model, tiny_batch(OBJECTS[case]))
    assert low.total.dtype == torch.float32
    torch.testing.assert_close(low.total, exact.total, rtol=0.1, atol=0)
    for name in ("loss_rpn_cls", "s0.loss_cls"):
        torch.testing.assert_close(low.measures[name], exact.measures[name], rtol=0.05, atol=0)
    assert low.measures["rpn.positives"] == exact.measures["rpn.positives"]
    for name, grad in low.gradients.items():
        assert (grad is None) == (exact.gradients[name] is None), name
        if grad is not None:
            assert grad.dtype == torch.float32
            assert grad.isfinite().all(), name


@compiles
def test_where_dynamic_shapes_are_dear_each_capacity_is_a_graph(tiny, tiny_batch, full_model):
    _, image, canvas = tiny
    config, params, buffers = full_model
    config = with_capacity(config, "counted")
    torch.compiler.reset()
    counters.clear()
    # How many graphs there are doesn't depend on what makes code of them.
    compute = Compute(dynamic_rois=False, backend="aot_eager")
    step = make_loss_step(config, image, canvas, compute)
    eager = make_loss_step(config, image, canvas, EAGER)
    model = config, params, buffers
    positives, slots = [], 2 * max_positive(config.box_head)
    for objects in OBJECTS:
        batch = tiny_batch(objects)
        made = run(step, model, batch)
        assert_same(made, run(eager, model, batch), rtol=1e-4)
        positives.append(round(2 * made.measures["s0.positives"].item()))
    capacities = {mask_capacity(n, slots, False) for n in positives}
    assert len(capacities) > 1
    assert counters["stats"]["unique_graphs"] == 1 + len(capacities)


# ---- eager variants ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_precision_and_layout_runs(tiny, tiny_batch, model, dtype, memory_format):
    config, image, canvas = tiny
    batch = tiny_batch((2, 1))
    params = steps.to_format(model[1], memory_format)
    compute = Compute(dtype, memory_format, compile=False)
    other = config, params, model[2]
    made = run(make_loss_step(config, image, canvas, compute), other, batch)
    exact = run(make_loss_step(config, image, canvas, EAGER), model, batch)
    if dtype == torch.float32:
        assert_same(made, exact, rtol=1e-3)
    else:
        torch.testing.assert_close(made.total, exact.total, rtol=0.1, atol=0)
    assert all(v.dtype == torch.float32 for v in made.measures.values())


@pytest.mark.parametrize(("capacity", "reads"), [("counted", 1), ("full", 0)])
def test_a_step_reads_this_often(tiny, tiny_batch, model, monkeypatch, capacity, reads):
    config, image, canvas = tiny
    config = with_capacity(config, capacity)
    step = make_loss_step(config, image, canvas, EAGER)
    count = 0

    def counting(method: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            return method(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
            patched.setattr(Tensor, name, counting(getattr(Tensor, name)))
        total, _ = mean_losses(step(model[1], model[2], tiny_batch((2, 1))))
    assert total.isfinite()
    assert count == reads


def test_the_step_keeps_clear_of_what_torch_npu_does_its_own_way(tiny, tiny_batch, model):
    """It differentiates these by operators that can't be traced, or copies a scalar for them."""
    own_gradient = ("binary_cross_entropy_with_logits", "l1_loss", "kl_div", "repeat_interleave")
    copied = ("bitwise_right_shift", "bitwise_left_shift", "__rshift__", "__lshift__")
    config, image, canvas = tiny
    batch = tiny_batch((2, 1))
    seen = []

    class Names(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    step = make_loss_step(config, image, canvas, EAGER)
    with Names(), Recorder() as recorder:
        run(step, model, batch)
    names = {*seen, *(name.split("::")[1].partition(".")[0] for name in recorder.counts)}
    assert {"conv2d", "convolution_backward"} <= names
    assert names.intersection(own_gradient + copied) == set()


def test_the_step_is_pure(tiny, tiny_batch, model):
    config, image, canvas = tiny
    _, params, buffers = model
    before = {k: v.clone() for k, v in (params | buffers).items()}
    batch = tiny_batch((2, 1))
    kept = [None if t is None else t.clone() for t in batch]
    state = torch.get_rng_state()
    step = make_loss_step(config, image, canvas, EAGER)
    first = run(step, model, batch)
    second = run(step, model, batch)
    assert first.total == second.total
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in (params | buffers).items():
        assert torch.equal(tensor, before[name])
    for a, b in zip(batch, kept, strict=True):
        assert same(a, b)


# ---- detection ----


@compiles
def test_compiled_detection_is_eager_in_one_graph(tiny, tiny_batch, model):
    config, image, canvas = tiny
    _, params, buffers = model
    params = {k: v.clone().requires_grad_() for k, v in params.items()}
    torch.compiler.reset()
    counters.clear()
    fast = make_detect_step(config, image, canvas, Compute())
    slow = make_detect_step(config, image, canvas, EAGER)
    for objects in OBJECTS:
        batch: Batch = tiny_batch(objects, seed=len(objects))
        found, expected = fast(params, buffers, batch), slow(params, buffers, batch)
        assert found.valid.any()
        assert torch.equal(found.valid, expected.valid)
        assert torch.equal(found.labels, expected.labels)
        torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.masks, expected.masks, rtol=1e-3, atol=1e-3)
        assert not any(t is None or t.requires_grad for t in found[:5])
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_detection_ignores_ground_truth_and_never_flips(tiny, tiny_batch, model):
    config, image, canvas = tiny
    _, params, buffers = model
    step = make_detect_step(config, replace(image, flip=1.0), canvas, EAGER)
    batch = tiny_batch((2, 1))
    found = step(params, buffers, batch)
    blind = batch._replace(
        boxes=torch.zeros_like(batch.boxes),
        valid=torch.zeros_like(batch.valid),
        seed=batch.seed + 5,
    )
    again = step(params, buffers, blind)
    for a, b in zip(found[:5], again[:5], strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


# ---- the parts around the graphs ----


@given(st.integers(1, 2000), st.data())
def test_a_mask_capacity_holds_and_wastes_little(slots, data):
    count = data.draw(st.integers(0, slots))
    made = mask_capacity(count, slots, True)
    assert max(count, 1) <= made <= slots
    assert made <= steps.LEAST_CAPACITY or made - count < steps.CAPACITY_STEP
    assert mask_capacity(slots, slots, True) == slots


@given(st.integers(1, 2000), st.data())
def test_a_capacity_of_the_ladder_is_the_smallest_that_holds(slots, data):
    count = data.draw(st.integers(0, slots))
    ladder = {mask_capacity(n, slots, False) for n in range(slots + 1)} if slots < 300 else set()
    made = mask_capacity(count, slots, False)
    assert max(count, 1) <= made <= slots
    assert len(ladder) <= len(steps.CAPACITY_SHARES)
    assert not any(count <= step < made for step in ladder)
    assert mask_capacity(slots, slots, False) == slots


def test_anchor_count_counts_anchors(tiny):
    config, _, canvas = tiny
    sizes = [(-(-canvas[0] // s), -(-canvas[1] // s)) for s in config.anchors.strides]
    made = grid_anchors(config.anchors, sizes, torch.device("cpu"))
    assert steps.anchor_count(config.anchors, canvas) == sum(len(a) for a in made)
    # Every level of an 800 x 1088 canvas, as the reference counts them.
    assert steps.anchor_count(AnchorConfig(), (800, 1088)) == 217413


@pytest.mark.parametrize(("flip", "share"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_flips_follow_their_probability(tiny, tiny_batch, flip, share):
    _, image, canvas = tiny
    one = tiny_batch((1,))
    many = Batch(*(None if t is None else t.expand(64, *t.shape[1:]) for t in one))  # type: ignore[arg-type]
    many = many._replace(seed=torch.arange(64))
    made = steps.training_inputs(many, replace(image, flip=flip), canvas, EAGER)
    plain = steps.training_inputs(many, replace(image, flip=0), canvas, EAGER)
    mirrored = (made.targets.boxes != plain.targets.boxes).any(dim=(1, 2)).float().mean().item()
    assert mirrored == pytest.approx(share, abs=0.2 * (0 < share < 1))


def test_to_format_changes_the_layout_only(model):
    _, params, _ = model
    made = steps.to_format(params, torch.channels_last)
    for name, tensor in made.items():
        assert torch.equal(tensor, params[name])
        if tensor.dim() == 4:
            assert tensor.is_contiguous(memory_format=torch.channels_last)
