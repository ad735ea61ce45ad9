"""Suppression by a fixed number of launches: exact for every input, torchvision the judge."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import nms as torchvision_nms

from casc.ops import fixed_nms as module
from casc.ops.fixed_nms import block_size, fixed_nms, greedy
from casc.ops.nms import batched_nms


def survivors(boxes: Tensor, scores: Tensor, group: Tensor, valid: Tensor, iou: float) -> list[int]:
    """torchvision's, group by group; best first, equal scores in the boxes' order."""
    kept: list[int] = []
    for one in group.unique():
        rows = ((group == one) & valid).nonzero()[:, 0]
        kept += rows[torchvision_nms(boxes[rows], scores[rows], iou)].tolist()
    return sorted(kept, key=lambda i: (-scores[i].item(), i))


def check(boxes, scores, group, valid, iou, count, groups, largest) -> None:
    index, number = fixed_nms(
        boxes[None], scores[None], group[None], valid[None], iou, count, groups, largest
    )
    right = survivors(boxes, scores, group, valid, iou)[:count]
    assert index.shape == (1, count)
    assert number.tolist() == [len(right)]
    assert index[0, : len(right)].tolist() == right
    assert (index[0, len(right) :] == 0).all()


side = st.sampled_from([0, 3, 4, 8, 12])
box = st.tuples(st.integers(0, 5), st.integers(0, 5), side, side)


@given(
    st.lists(
        st.tuples(box, st.integers(0, 2), st.booleans(), st.integers(0, 6)), min_size=1, max_size=40
    ),
    # 0.1 and 1/3 aren't float32 numbers, and overlaps equal to them occur.
    st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 0.7]),
    st.integers(1, 50),
    st.integers(0, 5),
)
@settings(max_examples=100)
def test_any_scene_is_torchvisions(rows, iou, count, spare):
    boxes = torch.tensor([[4 * x, 4 * y, 4 * x + w, 4 * y + h] for (x, y, w, h), *_ in rows])
    group, valid, score = (torch.tensor([row[i] for row in rows]) for i in (1, 2, 3))
    largest = int(group.bincount().max()) + spare
    check(boxes.float(), score / 6, group, valid, iou, count, 3, largest)


@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_any_graph_of_overlaps_follows_the_greedy_rule(size, seed):
    """Beyond what boxes can be: `greedy` on made-up overlaps, one box after the other."""
    rng = np.random.default_rng(seed)
    overlaps = np.triu(rng.random((size, size)) < rng.choice([0.02, 0.1, 0.5]), 1)
    valid = rng.random(size) < 0.8
    right = np.zeros(size, bool)
    for j in range(size):
        right[j] = valid[j] and not (right[:j] & overlaps[:j, j]).any()

    def made_up(boxes: Tensor, iou: float) -> Tensor:
        padded = torch.zeros(1, boxes.shape[1], boxes.shape[1])
        padded[0, :size, :size] = torch.from_numpy(overlaps)
        return padded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_overlaps", made_up)
        patch.setattr(module, "LARGEST_BLOCK", int(rng.integers(1, 8)))
        keep = greedy(torch.zeros(1, size, 4), torch.from_numpy(valid).float()[None], 0.5)
    assert keep[0].bool().tolist() == right.tolist()


@pytest.mark.parametrize("step", [3.0, 2.0, 1.0])
def test_the_longest_chain_of_boxes_that_suppress_each_other(step):
    """Each box overlaps the next ones: who survives is known only once all before are."""
    x = torch.arange(400) * step
    boxes = torch.stack([x, x * 0, x + 10, x * 0 + 10], dim=1)
    scores = torch.linspace(1, 0.1, 400)
    every = torch.ones(400, dtype=torch.bool)
    check(boxes, scores, torch.zeros(400, dtype=torch.long), every, 0.5, 400, 1, 400)
    kept = survivors(boxes, scores, torch.zeros(400), every, 0.5)
    assert 400 // 8 < len(kept) <= 200


def crowd(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(2, count, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 8 + torch.rand(2, count, 2, generator=generator) * 30], -1)
    scores = (torch.rand(2, count, generator=generator) * 50).round() / 50
    valid = torch.rand(2, count, generator=generator) < 0.9
    return boxes, scores, torch.arange(count) % 5, valid


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_kernels_give_the_same(compiler):
    """Compiled too; the operator is opaque, so any compiler's graph has it as it is."""
    boxes, scores, group, valid = crowd(300, 0)

    def run(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        return batched_nms(*arguments, iou=0.5, count=200, groups=5, largest=60, kernel="fixed")

    torch.compiler.reset()
    step = torch.compile(run, backend=compiler, fullgraph=True) if compiler else run
    made = step(boxes, scores, group, valid)
    right = batched_nms(boxes, scores, group, valid, iou=0.5, count=200, kernel="greedy")
    alone = batched_nms(boxes, scores, group, valid, iou=0.5, count=200, kernel="fixed")
    for a, b, c in zip(made, right, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, b)


@pytest.mark.parametrize("lengths", [[60] * 5, [60, 60, 60, 17, 3], [1, 0, 60, 2, 60]])
def test_boxes_in_order_need_no_sorting(lengths):
    boxes, scores, _, valid = crowd(300, 3)
    boxes, valid = (
        torch.cat([part[:, :n] for part, n in zip(x.split(60, 1), lengths, strict=True)], dim=1)
        for x in (boxes, valid)
    )
    parts = [torch.rand(2, n).sort(dim=1, descending=True).values for n in lengths]
    scores = (torch.cat(parts, dim=1) * 50).round() / 50
    group = torch.arange(5).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    sizes = (0.5, 200, 5, 60)
    right = fixed_nms(boxes, scores, group, valid, *sizes)
    made = fixed_nms(boxes, scores, group, valid, *sizes, lengths=lengths)
    for a, b in zip(made, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 16])
def test_blocks_of_any_size_give_the_same(monkeypatch, width):
    """Also the largest, which hypothesis doesn't reach."""
    boxes, scores, group, valid = crowd(200, 4)
    every = (boxes, scores, group, valid)
    right = batched_nms(*every, iou=0.3, count=200, kernel="greedy")
    monkeypatch.setattr(module, "LARGEST_BLOCK", width)
    made = batched_nms(*every, iou=0.3, count=200, groups=5, largest=40, kernel="fixed")
    for a, b in zip(made, right, strict=True):
        assert torch.equal(a, b)


def test_overlaps_computed_in_parts_are_the_same(monkeypatch):
    boxes, _, _, valid = crowd(40, 5)
    right = greedy(boxes, valid.float(), 0.4)
    assert not torch.equal(right[0], right[1])
    for pairs in (1, 40 * 40):
        monkeypatch.setattr(module, "MOST_PAIRS", pairs)
        assert torch.equal(greedy(boxes, valid.float(), 0.4), right)


@pytest.mark.parametrize(("width", "iou", "kept"), [(1.0, 0.1, [0]), (7.0, 0.7, [0, 1])])
def test_overlaps_at_the_threshold_as_float32_rounds_it(width, iou, kept):
    """0.1 to a little more, so such a box goes; 0.7 to a little less."""
    boxes, scores = torch.tensor([[0.0, 0, 10, 1], [0, 0, width, 1]]), torch.tensor([0.9, 0.8])
    every, group = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    assert survivors(boxes, scores, group, every, iou) == kept
    check(boxes, scores, group, every, iou, 2, 1, 2)


class Launches(TorchDispatchMode):
    """Counts operators, and finds those whose result depends on the data or goes to the host."""

    def __init__(self):
        super().__init__()
        self.count, self.reads = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        dynamic = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
        if dynamic & set(func.tags) and "index" not in func.__name__:
            self.reads.append(str(func))
        return func(*args, **(kwargs or {}))


def test_launches_are_few_fixed_and_none_reads():
    counts = []
    chain = torch.arange(400) * 3.0
    chain = torch.stack([chain, chain * 0, chain + 10, chain * 0 + 10], dim=1)[None]
    for boxes in (chain, chain * 0, crowd(400, 1)[0][:1]):
        with Launches() as launches:
            greedy(boxes, torch.ones(1, 400), 0.5)
        assert launches.reads == []
        counts.append(launches.count)
    assert len(set(counts)) == 1
    blocks = -(-400 // block_size(1, 400))
    assert counts[0] <= 8 * blocks + 50
    assert counts[0] < 400  # no launch per box


@pytest.mark.parametrize(("sets", "size"), [(10, 2000), (80, 1000), (160, 1000), (1, 1), (2, 7)])
def test_blocks_keep_the_outcomes_within_their_memory(sets, size):
    width = block_size(sets, size)
    assert 1 <= width <= size
    assert sets * -(-size // width) * 2**width <= module.MOST_OUTCOMES


def test_the_operator_is_registered_correctly():
    boxes, scores, group, valid = crowd(30, 2)
    torch.library.opcheck(
        torch.ops.casc.fixed_nms.default,
        (boxes, scores, group.expand(2, -1), valid, 0.5, 12, 5, 6),
    )
