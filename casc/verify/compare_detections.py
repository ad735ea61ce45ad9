"""Set our record of one image's inference beside the reference's.

Legend: D detections, P proposals.
"""

import torch
from torch import Tensor

from casc.model.detector_config import DetectorConfig
from casc.ops.nms import batched_nms
from casc.verify.compare import BOX_PIXELS, MASK, MASK_PIXELS, SCORE, Comparison
from casc.verify.goldens import GoldenSet
from casc.verify.record import Record


def compare_detections(
    golden: GoldenSet,
    config: DetectorConfig,
    image: int,
    record: Record,
    masks: Tensor,
    table: Comparison,
) -> None:
    """Rows for one image.

    Args:
        golden: the set.
        config: what was run.
        image: which test image.
        record: of `detection_record`, batch 1.
        masks: [D, height, width] bool, pasted at original size.
        table: takes the rows.
    """
    part, name = f"detections {image}", f"test{image}"
    record = {k: v.cpu()[0] for k, v in record.items()}
    proposals = record["proposals"][record["proposals_valid"]]
    key = f"{name}.proposals"
    table.box_set(part, key, table.golden(key), proposals)
    _stages(table, part, name, record)
    scores = table.golden(f"{name}.prenms.scores")
    if scores is not None and len(scores):
        # How many there are is for rounding to decide, with scores so near to the threshold.
        lowest = (record["lowest_score"] - scores.min()).abs()
        table.add(part, f"{name}.prenms.scores (lowest)", lowest, SCORE, "score")
    _suppression(table, config, part, name)
    _detections(table, golden, part, name, record, masks)


def _stages(table: Comparison, part: str, name: str, record: Record) -> None:
    stage = 0
    while f"s{stage}.rois" in record:
        key = f"{name}.s{stage}"
        rois = table.golden(f"{key}.rois")
        # The reference has as many proposals as there are; ours are padded.
        count = None if rois is None else len(rois)
        ours = torch.cat(
            [torch.zeros(len(record[f"s{stage}.rois"]), 1), record[f"s{stage}.rois"]], 1
        )
        table.absolute(part, f"{key}.rois", ours[:count], BOX_PIXELS, "pixels")
        for part_name in ("cls_score", "bbox_pred"):
            values = record[f"s{stage}.{part_name}"][:count]
            table.relative(part, f"{key}.{part_name}", values)
        stage += 1
    average = table.golden(f"{name}.cls_score_avg")
    if average is not None:
        ours = record["cls_score_avg"][: len(average)]
        table.relative(part, f"{name}.cls_score_avg", ours)


def _suppression(table: Comparison, config: DetectorConfig, part: str, name: str) -> None:
    """Class-wise suppression alone, on the golden candidates."""
    boxes, scores, labels, keep = (
        table.golden(f"{name}.prenms.{k}") for k in ("boxes", "scores", "labels", "keep")
    )
    if boxes is None or scores is None or labels is None or keep is None:
        return
    everything = torch.ones(1, len(boxes), dtype=torch.bool)
    index, kept = batched_nms(
        boxes[None],
        scores[None],
        labels[None],
        everything,
        iou=config.inference.nms_iou,
        count=len(boxes),
    )
    table.equal(part, f"{name}.prenms.keep", index[kept])


def _detections(
    table: Comparison, golden: GoldenSet, part: str, name: str, record: Record, masks: Tensor
) -> None:
    boxes, labels = table.golden(f"{name}.det_bboxes"), table.golden(f"{name}.det_labels")
    if boxes is None or labels is None:
        return
    valid = record["det_valid"]
    ours, our_labels = record["det_bboxes"][valid], record["det_labels"][valid]
    table.add(part, f"{name}.det_bboxes (count)", abs(len(boxes) - len(ours)), 0, "mismatches")
    if len(boxes) != len(ours) or not len(boxes):
        return
    # Detections whose scores differ in the last bit may change places: pair them first.
    apart = torch.cdist(boxes[:, :4], ours[:, :4], p=float("inf"))
    pair = (apart + 1e6 * (labels[:, None] != our_labels)).argmin(dim=1)
    ours, our_labels = ours[pair], our_labels[pair]
    table.equal(part, f"{name}.det_labels", our_labels)
    distance, score = (boxes - ours).abs().split([4, 1], dim=1)
    table.add(part, f"{name}.det_bboxes", distance.max(), BOX_PIXELS, "pixels")
    table.add(part, f"{name}.det_bboxes (scores)", score.max(), SCORE, "score")
    rois = torch.cat([torch.zeros(len(pair), 1), record["mask_rois"][valid][pair]], dim=1)
    table.absolute(part, f"{name}.mask_rois", rois, BOX_PIXELS, "pixels")
    stage = 0
    while f"s{stage}.mask_logits" in record:
        logits = record[f"s{stage}.mask_logits"][valid][pair]
        table.relative(part, f"{name}.s{stage}.mask_logits", logits)
        stage += 1
    prob = record["mask_prob"][valid][pair]
    table.absolute(part, f"{name}.mask_prob", prob, MASK, "probability")
    packed = table.golden(f"{name}.mask_packed")
    if packed is not None:
        shape = golden.facts[f"{name}.mask_shape"]
        bits = torch.stack([packed.long() >> i & 1 for i in range(7, -1, -1)], dim=-1)
        pasted = bits.flatten(1)[:, : shape[1] * shape[2]].reshape(shape).bool()
        wrong = (pasted != masks.cpu()[valid][pair]).double().mean()
        table.add(part, f"{name}.masks", wrong, MASK_PIXELS, "share of pixels")
