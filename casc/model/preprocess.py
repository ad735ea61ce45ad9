"""Resize, crop, flip, normalise and pad on the device, inside the compiled step.

The loader hands over decoded images at their stored size; the numbers here are those of
the reference's pipeline (Resize, RandomCrop, RandomFlip, Normalize, Pad), as gathers of static
shape: how large an image becomes and what of it is seen are inputs, the canvas is fixed.

Legend: B images, Hi x Wi input canvas (stored pixels), H x W canvas that the network sees,
G ground-truth capacity, E edge capacity.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from casc.data.batch import Batch
from casc.data.index import Bucket
from casc.data.index import canvas as bucket_canvas
from casc.model import noise as noises
from casc.model.copy_paste import paste
from casc.model.crop_boxes import visible_boxes
from casc.model.detector import Inputs
from casc.model.photometric import colour_factors, erased_boxes, jitter_colours, within
from casc.model.targets import Targets

LEAST_SIDE = 1e-5
"""Pixels. A cropped object whose sides aren't longer is no ground truth, as in Detectron2."""
PAD = 128.0
"""Grey level around images that large-scale jitter makes smaller than the canvas."""
_PARTS = 2**16
"""Of a pixel, to which the drawn sizes of large-scale jitter are exact."""
_DRAWS = 2**24
"""How many different numbers `casc.model.noise` draws."""


@dataclass(frozen=True)
class ImageConfig:
    """From stored pixels to what the network sees."""

    short: int = 800
    """The shorter side is resized to this many pixels..."""
    long: int = 1333
    """...unless the longer one would then exceed this many."""
    train_short: tuple[int, int] | None = None
    """Multi-scale training: each image's shorter side becomes one of these two or between,
    every whole number as likely, and the longer one `long` at most. None: `short` for all."""
    jitter: tuple[float, float] | None = None
    """Large-scale jitter (Ghiasi et al., 2021) in place of `short` and `long` when training, as
    Detectron2 has it: an image is resized to fit `jitter_size` times a factor drawn from these two
    or between, and cropped or padded with grey to that size. None: no jitter."""
    jitter_size: int = 1024
    """Both sides of the canvas of large-scale jitter, in pixels."""
    antialias: bool = False
    """Reduce images by Pillow's bilinear filter, which averages all pixels that become one, as
    Detectron2 does; else by OpenCV's, which reads two of them in each direction, as MMDetection
    does. Enlarging is the same."""
    flip: float = 0.5
    """Probability of a horizontal flip when training."""
    copy_paste: float = 0.0
    """Probability that an image gets objects of its batch's next one pasted on when training
    (Ghiasi et al., 2021). Goes with `jitter`."""
    colour: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strength of random changes of brightness, contrast and saturation (factors of 1 less or more
    so much) and of hue (in turns), as torchvision's ColorJitter has them, such as 0.4 0.4 0.4 0.1.
    """
    erase: float = 0.0
    """Probability that a rectangle of an image becomes the mean colour when training (Zhong et al.,
    2020); the ground truth stays."""
    channels: int = 3
    """Of the images, as their shards were made with `data_tools shard --channels`: 3 is RGB, 1 grey
    or thermal, others are planes. The first convolution of pretrained weights is made to fit."""
    mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    """Subtracted from red, green and blue (0 to 255); or as many numbers as there are channels.
    Of three, channels beyond RGB, and those of images with fewer, get the mean."""
    std: tuple[float, ...] = (58.395, 57.12, 57.375)
    """Divides red, green and blue; likewise."""


def per_channel(config: ImageConfig) -> ImageConfig:
    """The same with a mean and a deviation for each channel, as `ImageConfig` says."""

    def spread(numbers: tuple[float, ...]) -> tuple[float, ...]:
        if len(numbers) == config.channels:
            return numbers
        first = numbers if config.channels > len(numbers) else ()
        return first + (sum(numbers) / len(numbers),) * (config.channels - len(first))

    return replace(config, mean=spread(config.mean), std=spread(config.std))


class View(NamedTuple):
    """How each image of a batch is seen."""

    size: Tensor
    """[B, 2] int64, height and width that the whole image is resized to."""
    corner: Tensor | None
    """[B, 2] int64, row and column of the resized image in the window's top left corner; the
    window is the canvas, padding included. None: the whole image fits, and is seen."""
    flip: Tensor
    """[B] bool, whether the window is mirrored."""
    seed: Tensor | None = None
    """[B] int64, of colours, pasting and erasing; None: nothing of these."""


def plain_view(size: Tensor, config: ImageConfig) -> View:
    """Whole images as they are at inference.

    Args:
        size: [B, 2] stored height and width.
        config: `short` and `long`.
    """
    new = resized(size, config.short, config.long)
    return View(new, None, torch.zeros_like(new[:, 0], dtype=torch.bool))


def random_view(
    size: Tensor,
    seed: Tensor,
    config: ImageConfig,
    canvas: tuple[int, int],
    flip: Tensor | None = None,
) -> View:
    """How images are seen in training, from one seed per image.

    Args:
        size: [B, 2] stored height and width.
        seed: [B] int64.
        config: what is random, and how.
        canvas: (H, W) from `training_canvas`.
        flip: [B, 1], the seed's noise of that purpose; drawn here if None.
    """
    if flip is None:
        flip = noises.uniform(seed, noises.FLIP, 1)
    flipped = flip[:, 0] < config.flip
    if config.jitter is not None:
        return _jittered(size, seed, config, canvas)._replace(flip=flipped)
    short: Tensor | int = config.short
    if config.train_short is not None:
        short = _drawn(noises.uniform(seed, noises.SCALE, 1), *config.train_short)
    return View(resized(size, short, config.long), None, flipped, seed)


def without_randomness(config: ImageConfig) -> ImageConfig:
    """The config with which `random_view` sees images as they are evaluated."""
    nothing = ImageConfig(flip=0.0)
    random = ("flip", "train_short", "jitter", "copy_paste", "colour", "erase")
    return replace(config, **{name: getattr(nothing, name) for name in random})


def training_canvas(bucket: Bucket, config: ImageConfig) -> tuple[int, int]:
    """The canvas (H, W) on which a bucket's images are trained on, at every scale."""
    if config.jitter is not None:
        return config.jitter_size, config.jitter_size
    short = config.short if config.train_short is None else config.train_short[1]
    return bucket_canvas(bucket, short, config.long)


def resized(size: Tensor, short: Tensor | int, long: Tensor | int, parts: int = 1) -> Tensor:
    """The size of each image after resizing, aspect kept: int(side * scale + 0.5).

    scale = min(long / longer side, short / shorter side), in exact integer arithmetic.

    Args:
        size: [B, 2] float32 or int64, stored height and width.
        short: target of the shorter side in pixels; of each image if [B, 1] int64.
        long: limit of the longer side in pixels; likewise.
        parts: of a pixel, in which these two are given.

    Returns:
        [B, 2] int64.
    """
    size = size.to(torch.int64)
    shorter, longer = size.amin(dim=1, keepdim=True), size.amax(dim=1, keepdim=True)
    long_limits = long * shorter < short * longer
    target = torch.where(long_limits, long, short)
    side = torch.where(long_limits, longer, shorter).clamp(min=1) * parts
    return (2 * size * target + side) // (2 * side)


def prepare(
    batch: Batch,
    view: View | None,
    config: ImageConfig,
    canvas: tuple[int, int],
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Inputs:
    """Put a batch on its canvas.

    Bilinear with half-pixel centres and repeated borders, as cv2 does, but without its
    rounding to whole grey levels. Boxes are scaled per axis and clipped to the image; where
    windows are cut out they become the bounds of what shows of their object's polygons, and objects
    of which nothing shows are no longer valid. Polygon edges are moved and not clipped.

    In this order: resize, crop, flip, colours, padding, pasting, erasing, normalisation.

    Args:
        batch: decoded images and ground truth.
        view: how each image is seen; None as `plain_view` says.
        config: sizes and normalisation.
        canvas: (H, W), at least as large as every resized image without a window.
        dtype: of the image.
        memory_format: of the image.

    Returns:
        Images and ground truth in canvas pixels.
    """
    if view is None:
        view = plain_view(batch.size, config)
    ratio = view.size.to(torch.float32) / batch.size.clamp(min=1)
    scale = ratio.flip(-1).repeat(1, 2)
    shown = _shown(view, canvas)
    source = _source(view, canvas)
    inside = _inside(view, source)
    image = (_filter if config.antialias else _resample)(batch, view, source)
    if view.seed is not None and any(config.colour):
        image = jitter_colours(image, inside, colour_factors(view.seed, config.colour))
    if view.corner is not None:
        image = torch.where(inside[..., None], image, PAD)
    targets = _move_targets(batch, view, scale, canvas)
    if view.seed is not None and config.copy_paste:
        image, targets = paste(image, targets, view.seed, config.copy_paste)
    kept = None if view.corner is not None else inside
    if view.seed is not None and config.erase:
        erased = within(erased_boxes(view.seed, shown, config.erase), canvas)
        kept = ~erased if kept is None else kept & ~erased
    image = _normalise(image, kept, config).to(dtype)
    # Back to NCHW: this is channels_last as it stands, and a copy otherwise.
    image = image.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
    return Inputs(image, shown.to(torch.float32), scale, targets)


def _jittered(size: Tensor, seed: Tensor, config: ImageConfig, canvas: tuple[int, int]) -> View:
    """Detectron2's ResizeScale and FixedSizeCrop, in whole numbers: the same on every device."""
    assert config.jitter is not None
    least, most = (round(config.jitter_size * factor * _PARTS) for factor in config.jitter)
    scale, where = ((u * _DRAWS).long() for u in noises.uniforms(
        seed, {noises.SCALE: 1, noises.CROP: 1}
    ))  # fmt: skip
    target = least + scale * (most - least) // _DRAWS
    new = resized(size, target, target, _PARTS).clamp(min=1)
    beyond = torch.stack([(new[:, i] - side).clamp(min=0) for i, side in enumerate(canvas)], dim=1)
    # One number for both axes, rounded to the nearest pixel.
    corner = (2 * beyond * where + _DRAWS) // (2 * _DRAWS)
    return View(new, corner, torch.zeros_like(new[:, 0], dtype=torch.bool), seed)


def _drawn(uniform: Tensor, least: int, most: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1) to whole ones from `least` to `most`, both included."""
    # One rounded product, the same on every device.
    return least + (uniform * (most - least + 1)).floor().long()


def _shown(view: View, canvas: tuple[int, int]) -> Tensor:
    """Height and width of what is seen, a window's padding included: [B, 2] int64."""
    if view.corner is None:
        return view.size
    return torch.stack([torch.full_like(view.flip, side, dtype=torch.int64) for side in canvas], 1)


def _inside(view: View, source: tuple[Tensor, Tensor]) -> Tensor:
    """Which of the canvas's pixels show the image: [B, H, W] bool."""
    rows, columns = source
    # Mirrored padding lies left of the image.
    across = (columns >= 0) & (columns < view.size[:, 1:2])
    return (rows < view.size[:, 0:1])[:, :, None] & across[:, None]


def _resample(batch: Batch, view: View, source: tuple[Tensor, Tensor]) -> Tensor:
    """Bilinear: [B, Hi, Wi, C] uint8 to [B, H, W, C] float32."""
    sides = [at.shape[1] for at in source]
    # Both axes at once: an eager device launches each operator once.
    taps = _bilinear_taps(torch.cat(source, dim=1), sides, batch.size.to(torch.int64), view.size)
    (y0, x0), (y1, x1), (fy, fx) = (each.split(sides, dim=1) for each in taps)
    image = torch.arange(len(fy), device=fy.device)[:, None, None]

    def read(y: Tensor, x: Tensor) -> Tensor:
        return batch.image[image, y[:, :, None], x[:, None, :]].to(torch.float32)

    fx, fy = fx[:, None, :, None], fy[:, :, None, None]
    top = read(y0, x0) * (1 - fx) + read(y0, x1) * fx
    bottom = read(y1, x0) * (1 - fx) + read(y1, x1) * fx
    return top * (1 - fy) + bottom * fy


def _filter(batch: Batch, view: View, source: tuple[Tensor, Tensor]) -> Tensor:
    """Pillow's bilinear without its rounding: [B, Hi, Wi, C] uint8 to [B, H, W, C] float32."""
    rows, columns = source
    stored = batch.image.shape[1:3]
    down = _triangles(rows, batch.size[:, 0], view.size[:, 0], stored[0])
    across = _triangles(columns, batch.size[:, 1], view.size[:, 1], stored[1])
    image = batch.image.to(torch.float32)
    image = torch.einsum("bhi,bijc->bhjc", down, image)
    return torch.einsum("bwj,bhjc->bhwc", across, image)


def _triangles(at: Tensor, size: Tensor, new: Tensor, stored: int) -> Tensor:
    """The weights of all stored pixels along one axis.

    Args:
        at: [B, N] int64, position in the resized image.
        size: [B] float32, the image's stored length.
        new: [B] int64, resized length.
        stored: M, at least every length.

    Returns:
        [B, N, M] float32 that add up to 1.
    """
    step = (size / new.to(torch.float32))[:, None]
    # Beyond the image any position would do, it is masked.
    centre = torch.minimum(((at.to(torch.float32) + 0.5) * step).clamp(min=0), size[:, None])
    pixel = torch.arange(stored, device=at.device) + 0.5
    reach = step.clamp(min=1)[..., None]
    weight = (1 - (pixel - centre[..., None]).abs() / reach).clamp(min=0)
    weight = torch.where(pixel < size[:, None, None], weight, 0.0)
    return weight / weight.sum(dim=-1, keepdim=True)


def _source(view: View, canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The resized image's row [B, H] and column [B, W] that each of the canvas shows."""
    count, device = view.size.shape[0], view.size.device
    rows = torch.arange(canvas[0], device=device).expand(count, -1)
    columns = torch.arange(canvas[1], device=device).expand(count, -1)
    width = _shown(view, canvas)[:, 1:2]
    columns = torch.where(view.flip[:, None], width - 1 - columns, columns)
    if view.corner is None:
        return rows, columns
    return rows + view.corner[:, 0:1], columns + view.corner[:, 1:2]


def _bilinear_taps(
    at: Tensor, sides: list[int], size: Tensor, new: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Two neighbours and the second one's weight along both axes, H + W = N positions.

    Args:
        at: [B, N] int64, position in the resized image.
        sides: H and W.
        size: [B, 2] int64, stored lengths.
        new: [B, 2] int64, resized lengths.

    Returns:
        [B, N] int64, [B, N] int64 and [B, N] float32.
    """

    def along(values: Tensor) -> Tensor:
        columns = values.to(torch.float32).split(1, dim=1)
        return torch.cat(
            [column.expand(-1, side) for column, side in zip(columns, sides, strict=True)], dim=1
        )

    step, last = along(size.to(torch.float32) / new.to(torch.float32)), along(size - 1)
    source = ((at.to(torch.float32) + 0.5) * step - 0.5).clamp(min=0)
    source = torch.minimum(source, last)
    floor = source.floor()
    return floor.long(), torch.minimum(floor + 1, last).long(), source - floor


def _normalise(image: Tensor, kept: Tensor | None, config: ImageConfig) -> Tensor:
    """Subtract, divide, and set what isn't kept [B, H, W] to 0, the mean colour."""
    config = per_channel(config)
    channels = [
        (image[..., i] - mean) / std
        for i, (mean, std) in enumerate(zip(config.mean, config.std, strict=True))
    ]
    normalised = torch.stack(channels, dim=-1)
    return normalised if kept is None else torch.where(kept[..., None], normalised, 0.0)


def _move_targets(batch: Batch, view: View, scale: Tensor, canvas: tuple[int, int]) -> Targets:
    shown = _shown(view, canvas).to(torch.float32)
    limit = shown.flip(-1).repeat(1, 2)[:, None]
    boxes, valid = batch.boxes * scale[:, None], batch.valid
    edges = batch.edges * scale[:, None]
    if view.corner is not None:
        corner = view.corner.to(torch.float32).flip(-1).repeat(1, 2)[:, None]
        boxes, edges = boxes - corner, edges - corner
        boxes = visible_boxes(boxes, edges, batch.edge_gt, shown)
        valid = valid & ((boxes[..., 2:] - boxes[..., :2]) > LEAST_SIDE).all(dim=-1)
    boxes = torch.minimum(boxes.clamp(min=0), limit)
    width, flip = shown[:, 1], view.flip
    x1, y1, x2, y2 = boxes.unbind(-1)
    mirrored = torch.stack([width[:, None] - x2, y1, width[:, None] - x1, y2], dim=-1)
    boxes = torch.where(flip[:, None, None], mirrored, boxes) * valid[..., None]
    x0, y0, x1, y1 = edges.unbind(-1)
    far = width[:, None]
    mirrored = torch.stack([far - x0, y0, far - x1, y1], dim=-1)
    edges = torch.where(flip[:, None, None], mirrored, edges)
    bitmaps = None
    if batch.bitmaps is not None:
        bitmaps = _resize_bitmaps(batch.bitmaps, batch.size, view, canvas)
    regions = None if batch.regions is None else _move_regions(batch.regions, view, scale, shown)
    return Targets(boxes, batch.labels, valid, edges, batch.edge_gt, bitmaps, regions)


def _move_regions(regions: Tensor, view: View, scale: Tensor, shown: Tensor) -> Tensor:
    """Boxes [B, R, 4] of stored images to the canvas; of those that are cut, the part inside.

    Args:
        regions: of no area where padded, as they are afterwards.
        view: how each image is seen.
        scale: [B, 4] canvas pixels per stored pixel.
        shown: [B, 2] height and width of what is seen.
    """
    moved = regions * scale[:, None]
    if view.corner is not None:
        moved = moved - view.corner.to(torch.float32).flip(-1).repeat(1, 2)[:, None]
    moved = torch.minimum(moved.clamp(min=0), shown.flip(-1).repeat(1, 2)[:, None])
    x1, y1, x2, y2 = moved.unbind(-1)
    width = shown[:, 1:2]
    mirrored = torch.stack([width - x2, y1, width - x1, y2], dim=-1)
    return torch.where(view.flip[:, None, None], mirrored, moved)


def _resize_bitmaps(bitmaps: Tensor, size: Tensor, view: View, canvas: tuple[int, int]) -> Tensor:
    """Nearest as cv2 rounds it (floor): [B, G, Hi, Wi] to [B, G, H, W] uint8, 0 outside."""
    new, stored = view.size, size.to(torch.int64)
    rows, columns = _source(view, canvas)
    inside = _inside(view, (rows, columns))
    y = torch.minimum(rows * stored[:, 0:1] // new[:, 0:1], stored[:, 0:1] - 1)
    x = columns.clamp(min=0) * stored[:, 1:2] // new[:, 1:2]
    x = torch.minimum(x, stored[:, 1:2] - 1)
    image = torch.arange(new.shape[0], device=new.device)[:, None, None]
    # Advanced indices around a slice: the result is [B, H, W, G].
    moved = bitmaps[image, :, y[:, :, None], x[:, None, :]]
    return (moved * inside[..., None]).permute(0, 3, 1, 2)
