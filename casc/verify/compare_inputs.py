"""Set what the steps make of stored images beside the reference's pipeline."""

import torch

from casc.model.detector import Inputs
from casc.model.preprocess import ImageConfig
from casc.verify.compare import GREY_LEVELS, MEAN_GREY_LEVELS, MOVED_PIXELS, Comparison
from casc.verify.goldens import GoldenSet


def compare_inputs(golden: GoldenSet, name: str, made: Inputs, table: Comparison) -> None:
    """Rows for the preprocessing of one batch.

    Args:
        golden: the set.
        name: "train", or "test0" and so on.
        made: of the step, before it was given the reference's.
        table: takes the rows.
    """
    part = "preprocessing"
    expected = table.golden(f"{name}.img")
    assert expected is not None, "every set has its images"
    grey = (made.image.cpu() - expected).abs() * torch.tensor(ImageConfig().std)[:, None, None]
    table.add(part, f"{name}.img", grey.max(), GREY_LEVELS, "grey levels")
    table.add(part, f"{name}.img (mean)", grey.mean(), MEAN_GREY_LEVELS, "grey levels")
    metas = golden.facts[f"{name}.meta"]
    metas = metas if isinstance(metas, list) else [metas]
    sizes = torch.tensor([meta["img_shape"][:2] for meta in metas])
    scales = torch.tensor([meta["scale_factor"] for meta in metas])
    wrong = (made.size.cpu() != sizes).sum()
    table.add(part, f"{name} (size)", wrong, 0, "mismatches")
    off = (made.scale.cpu() / scales - 1).abs().max()
    table.add(part, f"{name} (scale)", off, 1e-6, "relative")
    if name == "train":
        _targets(made, table, part)


def _targets(made: Inputs, table: Comparison, part: str) -> None:
    targets = made.targets
    assert targets.bitmaps is not None, "the batch carries bitmaps"
    for image, valid in enumerate(targets.valid.cpu()):
        key = f"train.gt_bboxes.{image}"
        table.absolute(part, key, targets.boxes[image].cpu()[valid], MOVED_PIXELS, "pixels")
        table.equal(part, f"train.gt_labels.{image}", targets.labels[image].cpu()[valid])
        masks = table.golden(f"train.gt_masks.{image}")
        if masks is not None:
            # The reference pads no mask.
            ours = targets.bitmaps[image].cpu()[valid][:, : masks.shape[1], : masks.shape[2]]
            table.equal(part, f"train.gt_masks.{image}", ours)
