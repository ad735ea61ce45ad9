import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from casc.ops.soft_nms import soft_nms


def by_the_paper(boxes: Tensor, scores: Tensor, group: Tensor, valid: Tensor, decay) -> dict:
    """Scores after suppression of one image, by box: group by group, one box after the other."""
    overlaps = box_iou(boxes.double(), boxes.double())
    found: dict[int, float] = {}
    for one in group.unique().tolist():
        left = {i: float(scores[i]) for i in range(len(scores)) if group[i] == one and valid[i]}
        while left:
            best = max(left, key=lambda i: left[i])
            found[best] = left.pop(best)
            for other in left:
                left[other] *= decay(float(overlaps[best, other]))
    return found


@pytest.mark.parametrize("sigma", [0.0, 0.5])
@pytest.mark.parametrize("count", [5, 40])
def test_scores_fall_as_the_paper_says(mode, sigma: float, count: int):
    rng = np.random.default_rng(count)
    corner = torch.from_numpy(rng.uniform(0, 60, (2, 30, 2))).float()
    boxes = torch.cat(
        [corner, corner + torch.from_numpy(rng.uniform(5, 40, (2, 30, 2)))], 2
    ).float()
    scores = torch.from_numpy(rng.permutation(60).reshape(2, 30) / 60 + 0.01).float()
    group = torch.from_numpy(rng.integers(0, 3, (2, 30)))
    valid = torch.from_numpy(rng.uniform(size=(2, 30)) < 0.8)
    index, kept = mode(lambda *a: soft_nms(*a, 0.3, sigma, count))(boxes, scores, group, valid)
    assert index.shape == kept.shape == (2, count)

    def decay(overlap: float) -> float:
        if sigma:
            return float(np.exp(-(overlap**2) / sigma))
        return 1 - overlap if overlap > 0.3 else 1.0

    for image in range(2):
        wanted = by_the_paper(boxes[image], scores[image], group[image], valid[image], decay)
        best = sorted(wanted.values(), reverse=True)[:count]
        there = kept[image] > 0
        assert there.sum() == min(count, len(wanted))
        np.testing.assert_allclose(kept[image][there].numpy(), best, rtol=1e-4)
        for i, score in zip(index[image][there].tolist(), kept[image][there].tolist(), strict=True):
            assert wanted[i] == pytest.approx(score, rel=1e-4)
        assert (index[image][~there] == 0).all()


def test_nothing_valid_gives_nothing():
    none = torch.zeros(1, 4, dtype=torch.bool)
    index, kept = soft_nms(torch.zeros(1, 4, 4), torch.ones(1, 4), none.long(), none, 0.5, 0.0, 3)
    assert index.tolist() == kept.tolist() == [[0, 0, 0]]
