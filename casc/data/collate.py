"""Samples to a batch: everything of an image padded to its bucket's capacities.

A batch is one block of memory, and its columns are views of it: between processes and into
pinned memory it moves in one piece.

Legend: B images, G ground-truth capacity, E edge capacity of an image, R capacity for
regions to ignore, Hi x Wi input canvas.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from casc.data.batch import Batch
from casc.data.index import Bucket
from casc.data.sample import Sample
from casc.errors import UserError

_ALIGNMENT = 64
"""Bytes that columns start at a multiple of: what vectorised code wants at most."""


def collate(
    samples: Sequence[Sample],
    bucket: Bucket,
    *,
    batch: int | None = None,
    seeds: Sequence[int] | None = None,
    bitmaps: bool = False,
    regions: bool = False,
    block: Tensor | None = None,
) -> Batch:
    """Pad samples of one bucket and stack them.

    Args:
        samples: at most B of them.
        bucket: whose canvas Hi x Wi and capacities G and E hold.
        batch: B; rows without a sample are black, empty, 1 x 1 pixels and have image id -1.
            By default there are none.
        seeds: each sample's noise seed; 0 by default, for inference.
        bitmaps: also rasterise the masks at stored size, as the reference does.
        regions: also hand over the samples' regions to ignore, which the bucket has room for.
        block: memory to use, `[n]` uint8 of any content, n at least `block_size`. By default
            it is allocated.

    Raises:
        UserError: a sample exceeds the bucket's capacity, which the index got wrong.
    """
    B = len(samples) if batch is None else batch
    if len(samples) > B:
        raise ValueError(f"{len(samples)} samples don't fit a batch of {B}")
    if block is None:
        size = block_size(bucket, B, bitmaps=bitmaps, regions=regions)
        block = torch.empty(size, dtype=torch.uint8)
    made = unpack(block, bucket, B, bitmaps=bitmaps, regions=regions)
    columns = {k: v.numpy() for k, v in made._asdict().items() if v is not None}
    # The memory is as it comes. The images are most of it, so only their padding is cleared.
    for name, column in columns.items():
        if name != "image":
            column.fill(_FILL.get(name, 0))
    image = columns["image"]
    image[len(samples) :] = 0
    for i, sample in enumerate(samples):
        _check(sample, bucket)
        h, w = sample.image.shape[:2]
        g = len(sample.boxes)
        image[i, :h, :w] = sample.image
        image[i, :h, w:] = 0
        image[i, h:] = 0
        columns["size"][i] = h, w
        columns["boxes"][i, :g] = sample.boxes
        columns["labels"][i, :g] = sample.labels
        columns["valid"][i, :g] = True
        lengths = [len(lines) for lines in sample.edges]
        if lengths:
            columns["edges"][i, : sum(lengths)] = np.concatenate(sample.edges)
            columns["edge_gt"][i, : sum(lengths)] = np.repeat(np.arange(g), lengths)
        columns["image_id"][i] = sample.image_id
        if seeds is not None:
            columns["seed"][i] = seeds[i]
        if regions and sample.regions is not None:
            columns["regions"][i, : len(sample.regions)] = sample.regions
        if bitmaps:
            for k, segmentation in enumerate(sample.segmentations):
                columns["bitmaps"][i, k, :h, :w] = _bitmap(segmentation, h, w, sample.image_id)
    return made


def block_size(bucket: Bucket, batch: int, *, bitmaps: bool = False, regions: bool = False) -> int:
    """Bytes of a batch."""
    columns = _columns(bucket, batch, bitmaps, regions).values()
    return sum(_round_up(dtype.itemsize * math.prod(shape)) for dtype, shape in columns)


def unpack(
    block: Tensor, bucket: Bucket, batch: int, *, bitmaps: bool = False, regions: bool = False
) -> Batch:
    """Give the batch whose memory is `block`.

    Args:
        block: `[n]` uint8, n at least `block_size`.
        bucket: whose capacities make the columns' shapes.
        batch: B.
        bitmaps: whether there are any.
        regions: likewise.
    """
    storage, at, columns = block.untyped_storage(), block.storage_offset(), {}
    for name, (dtype, shape) in _columns(bucket, batch, bitmaps, regions).items():
        column = torch.empty(0, dtype=dtype)
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        columns[name] = column.set_(storage, at // dtype.itemsize, shape, stride)
        at += _round_up(dtype.itemsize * math.prod(shape))
    return Batch(**columns)


_FILL = {"size": 1, "image_id": -1}
"""What rows without a sample hold where it isn't 0."""


def _columns(
    bucket: Bucket, B: int, bitmaps: bool, regions: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    G, E, H, W = bucket.instances, bucket.edges, bucket.height, bucket.width
    columns = {
        "image": (torch.uint8, (B, H, W, bucket.channels)),
        "size": (torch.float32, (B, 2)),
        "boxes": (torch.float32, (B, G, 4)),
        "labels": (torch.int64, (B, G)),
        "valid": (torch.bool, (B, G)),
        "edges": (torch.float32, (B, E, 4)),
        "edge_gt": (torch.int64, (B, E)),
        "image_id": (torch.int64, (B,)),
        "seed": (torch.int64, (B,)),
    }
    if bitmaps:
        columns["bitmaps"] = torch.uint8, (B, G, H, W)
    if regions:
        columns["regions"] = torch.float32, (B, bucket.regions or 1, 4)
    return columns


def _round_up(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


def _check(sample: Sample, bucket: Bucket) -> None:
    if sample.image.shape[2] != bucket.channels:
        raise UserError(
            f"image {sample.image_id}: has {sample.image.shape[2]} channels, the index says"
            f" {bucket.channels}"
        )
    found = {
        "height": sample.image.shape[0],
        "width": sample.image.shape[1],
        "instances": len(sample.boxes),
        "edges": sum(len(lines) for lines in sample.edges),
        "regions": 0 if sample.regions is None else len(sample.regions),
    }
    for name, value in found.items():
        if value > (getattr(bucket, name) or 0):
            raise UserError(
                f"image {sample.image_id}: {name} is {value}, but the index records at most"
                f" {getattr(bucket, name)} for bucket {bucket.name}: index and shards don't belong"
                " together; make them again with `data_tools shard`"
            )


def _bitmap(segmentation: Any, height: int, width: int, image_id: int) -> np.ndarray:
    """COCO's own rasteriser: [height, width] uint8 of a polygon list or an RLE."""
    from pycocotools import mask

    from casc.data.segmentation import pack, usable_segmentation

    # What is wrong with an RLE the rasteriser would find out by writing past the mask.
    usable = usable_segmentation(segmentation, width, height)
    if usable is None:
        raise UserError(
            f"image {image_id}: segmentation: no mask of {width} x {height} pixels can be made of"
            f" {segmentation!r:.60}; run `data_tools check`"
        )
    return mask.decode(pack(usable, width, height))  # type: ignore[arg-type]
