"""Resize, flip, normalise and pad on the device, inside the compiled step.

The loader hands over decoded images at their stored size; the numbers here are those of
the reference's pipeline (Resize, RandomFlip, Normalize, Pad), as gathers of static shape.

Legend: B images, Hi x Wi input canvas (stored pixels), H x W canvas that the network sees,
G ground-truth capacity, E edge capacity.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from casc.data.batch import Batch
from casc.detector import Inputs
from casc.targets import Targets


@dataclass(frozen=True)
class ImageConfig:
    """From stored pixels to what the network sees."""

    short: int = 800
    """The shorter side is resized to this many pixels..."""
    long: int = 1333
    """...unless the longer one would then exceed this many."""
    flip: float = 0.5
    """Probability of a horizontal flip when training."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Subtracted from red, green and blue (0 to 255)."""
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Divides red, green and blue."""


def resized(size: Tensor, short: int, long: int) -> Tensor:
    """The size of each image after resizing, aspect kept: int(side * scale + 0.5).

    scale = min(long / longer side, short / shorter side), in exact integer arithmetic.

    Args:
        size: [B, 2] float32 or int64, stored height and width.
        short: target of the shorter side in pixels.
        long: limit of the longer side in pixels.

    Returns:
        [B, 2] int64.
    """
    size = size.to(torch.int64)
    shorter, longer = size.amin(dim=1, keepdim=True), size.amax(dim=1, keepdim=True)
    long_limits = long * shorter < short * longer
    target = torch.where(long_limits, long, short)
    side = torch.where(long_limits, longer, shorter).clamp(min=1)
    return (2 * size * target + side) // (2 * side)


def prepare(
    batch: Batch,
    flip: Tensor | None,
    config: ImageConfig,
    canvas: tuple[int, int],
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Inputs:
    """Put a batch on its canvas.

    Bilinear with half-pixel centres and repeated borders, as cv2 does, but without its
    rounding to whole grey levels. Boxes are scaled per axis and clipped to the image;
    polygon edges are scaled and not clipped.

    Args:
        batch: decoded images and ground truth.
        flip: [B] bool, which images to mirror; None mirrors none.
        config: sizes and normalisation.
        canvas: (H, W), at least as large as every resized image.
        dtype: of the image.
        memory_format: of the image.

    Returns:
        Images and ground truth in canvas pixels.
    """
    new = resized(batch.size, config.short, config.long)
    new_size = new.to(torch.float32)
    ratio = new_size / batch.size.clamp(min=1)
    scale = ratio.flip(-1).repeat(1, 2)
    if flip is None:
        flip = torch.zeros_like(batch.valid[:, 0])
    image = _resample(batch, new, flip, canvas)
    image = _normalise(image, new, config).to(dtype)
    # Back to NCHW: this is channels_last as it stands, and a copy otherwise.
    image = image.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
    return Inputs(image, new_size, scale, _move_targets(batch, new, scale, flip, canvas))


def _resample(batch: Batch, new: Tensor, flip: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Bilinear: [B, Hi, Wi, 3] uint8 to [B, H, W, 3] float32."""
    rows = torch.arange(canvas[0], device=new.device)
    columns = _source_columns(new, flip, canvas[1])
    size = batch.size.to(torch.int64)
    y0, y1, fy = _bilinear_taps(rows.expand(new.shape[0], -1), size[:, 0], new[:, 0])
    x0, x1, fx = _bilinear_taps(columns, size[:, 1], new[:, 1])
    image = torch.arange(new.shape[0], device=new.device)[:, None, None]

    def read(y: Tensor, x: Tensor) -> Tensor:
        return batch.image[image, y[:, :, None], x[:, None, :]].to(torch.float32)

    fx, fy = fx[:, None, :, None], fy[:, :, None, None]
    top = read(y0, x0) * (1 - fx) + read(y0, x1) * fx
    bottom = read(y1, x0) * (1 - fx) + read(y1, x1) * fx
    return top * (1 - fy) + bottom * fy


def _source_columns(new: Tensor, flip: Tensor, width: int) -> Tensor:
    """The resized image's column that each canvas column shows: [B, W] int64."""
    columns = torch.arange(width, device=new.device).expand(new.shape[0], -1)
    return torch.where(flip[:, None], new[:, 1:2] - 1 - columns, columns)


def _bilinear_taps(at: Tensor, size: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two neighbours and the second one's weight along one axis.

    Args:
        at: [B, N] int64, position in the resized image.
        size: [B] int64, stored length.
        new: [B] int64, resized length.

    Returns:
        [B, N] int64, [B, N] int64 and [B, N] float32.
    """
    step = (size.to(torch.float32) / new.to(torch.float32))[:, None]
    last = (size - 1)[:, None].to(torch.float32)
    source = ((at.to(torch.float32) + 0.5) * step - 0.5).clamp(min=0)
    source = torch.minimum(source, last)
    floor = source.floor()
    return floor.long(), torch.minimum(floor + 1, last).long(), source - floor


def _normalise(image: Tensor, new: Tensor, config: ImageConfig) -> Tensor:
    """Subtract, divide, and set everything outside the image to 0 (padding comes last)."""
    channels = [
        (image[..., i] - mean) / std
        for i, (mean, std) in enumerate(zip(config.mean, config.std, strict=True))
    ]
    rows = torch.arange(image.shape[1], device=image.device) < new[:, 0:1]
    columns = torch.arange(image.shape[2], device=image.device) < new[:, 1:2]
    inside = rows[:, :, None] & columns[:, None, :]
    return torch.where(inside[..., None], torch.stack(channels, dim=-1), 0.0)


def _move_targets(
    batch: Batch, new: Tensor, scale: Tensor, flip: Tensor, canvas: tuple[int, int]
) -> Targets:
    width = new[:, 1].to(torch.float32)
    limit = new.to(torch.float32).flip(-1).repeat(1, 2)[:, None]
    boxes = torch.minimum((batch.boxes * scale[:, None]).clamp(min=0), limit)
    x1, y1, x2, y2 = boxes.unbind(-1)
    mirrored = torch.stack([width[:, None] - x2, y1, width[:, None] - x1, y2], dim=-1)
    boxes = torch.where(flip[:, None, None], mirrored, boxes) * batch.valid[..., None]
    edges = batch.edges * scale[:, None, None]
    x0, y0, x1, y1 = edges.unbind(-1)
    far = width[:, None, None]
    mirrored = torch.stack([far - x0, y0, far - x1, y1], dim=-1)
    edges = torch.where(flip[:, None, None, None], mirrored, edges)
    bitmaps = None
    if batch.bitmaps is not None:
        bitmaps = _resize_bitmaps(batch.bitmaps, batch.size, new, flip, canvas)
    return Targets(boxes, batch.labels, batch.valid, edges, bitmaps)


def _resize_bitmaps(
    bitmaps: Tensor, size: Tensor, new: Tensor, flip: Tensor, canvas: tuple[int, int]
) -> Tensor:
    """Nearest as cv2 rounds it (floor): [B, G, Hi, Wi] to [B, G, H, W] uint8, 0 outside."""
    rows = torch.arange(canvas[0], device=new.device).expand(new.shape[0], -1)
    columns = _source_columns(new, flip, canvas[1])
    stored = size.to(torch.int64)
    inside = (rows < new[:, 0:1])[:, :, None] & ((columns >= 0) & (columns < new[:, 1:2]))[:, None]
    # Flipped padding lies left of the image: any column would do, it is masked.
    y = torch.minimum(rows * stored[:, 0:1] // new[:, 0:1], stored[:, 0:1] - 1)
    x = columns.clamp(min=0) * stored[:, 1:2] // new[:, 1:2]
    x = torch.minimum(x, stored[:, 1:2] - 1)
    image = torch.arange(new.shape[0], device=new.device)[:, None, None]
    # Advanced indices around a slice: the result is [B, H, W, G].
    moved = bitmaps[image, :, y[:, :, None], x[:, None, :]]
    return (moved * inside[..., None]).permute(0, 3, 1, 2)
