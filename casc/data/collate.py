"""Samples to a batch: everything of an image padded to its bucket's capacities.

Legend: B images, G ground-truth capacity, E edge capacity, Hi x Wi input canvas.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from casc.data.batch import Batch
from casc.data.index import Bucket
from casc.data.sample import Sample
from casc.errors import UserError


def collate(
    samples: Sequence[Sample],
    bucket: Bucket,
    *,
    batch: int | None = None,
    seeds: Sequence[int] | None = None,
    bitmaps: bool = False,
) -> Batch:
    """Pad samples of one bucket and stack them.

    Args:
        samples: at most B of them.
        bucket: whose canvas Hi x Wi and capacities G and E hold.
        batch: B; rows without a sample are black, empty, 1 x 1 pixels and have image id -1.
            By default there are none.
        seeds: each sample's noise seed; 0 by default, for inference.
        bitmaps: also rasterise the masks at stored size, as the reference does.

    Raises:
        UserError: a sample exceeds the bucket's capacity, which the index got wrong.
    """
    B = len(samples) if batch is None else batch
    G, E, H, W = bucket.instances, bucket.edges, bucket.height, bucket.width
    if len(samples) > B:
        raise ValueError(f"{len(samples)} samples don't fit a batch of {B}")
    image = np.zeros((B, H, W, 3), np.uint8)
    size = np.ones((B, 2), np.float32)
    boxes = np.zeros((B, G, 4), np.float32)
    labels = np.zeros((B, G), np.int64)
    valid = np.zeros((B, G), np.bool_)
    edges = np.zeros((B, G, E, 4), np.float32)
    image_id = np.full(B, -1, np.int64)
    seed = np.zeros(B, np.int64)
    masks = np.zeros((B, G, H, W), np.uint8) if bitmaps else None
    for i, sample in enumerate(samples):
        _check(sample, bucket)
        h, w = sample.image.shape[:2]
        g = len(sample.boxes)
        image[i, :h, :w] = sample.image
        size[i] = h, w
        boxes[i, :g] = sample.boxes
        labels[i, :g] = sample.labels
        valid[i, :g] = True
        for k, lines in enumerate(sample.edges):
            edges[i, k, : len(lines)] = lines
        image_id[i] = sample.image_id
        if seeds is not None:
            seed[i] = seeds[i]
        if masks is not None:
            for k, segmentation in enumerate(sample.segmentations):
                masks[i, k, :h, :w] = _bitmap(segmentation, h, w)
    columns = (image, size, boxes, labels, valid, edges, image_id, seed)
    return Batch(
        *(torch.from_numpy(column) for column in columns),
        bitmaps=None if masks is None else torch.from_numpy(masks),
    )


def _check(sample: Sample, bucket: Bucket) -> None:
    found = {
        "height": sample.image.shape[0],
        "width": sample.image.shape[1],
        "instances": len(sample.boxes),
        "edges": max((len(lines) for lines in sample.edges), default=0),
    }
    for name, value in found.items():
        if value > getattr(bucket, name):
            raise UserError(
                f"image {sample.image_id}: {name} is {value}, but the index records at most"
                f" {getattr(bucket, name)} for bucket {bucket.name}: index and shards don't belong"
                " together; make them again with `data_tools shard`"
            )


def _bitmap(segmentation: Any, height: int, width: int) -> np.ndarray:
    """COCO's own rasteriser: [height, width] uint8 of a polygon list or an RLE."""
    from pycocotools import mask

    rle = segmentation
    if isinstance(rle, list) or isinstance(rle["counts"], list):
        rle = mask.frPyObjects(rle, height, width)
    return mask.decode(mask.merge(rle) if isinstance(rle, list) else rle)
