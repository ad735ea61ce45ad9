"""Colour jitter and random erasing: what changes pixels and leaves the ground truth alone.

Legend: B images, H x W canvas.
"""

import math

import torch
from torch import Tensor

from casc.model import noise as noises

GREY = (0.2989, 0.587, 0.114)
"""Shares of red, green and blue in an image's brightness, as torchvision has them."""
TRIES = 10
"""Rectangles that are drawn for erasing; the first that fits is taken."""
ERASED_AREA = (0.02, 0.33)
"""Least and most share of the image that is erased..."""
ERASED_RATIO = (0.3, 3.3)
"""...and of height over width; both are torchvision's, after Zhong et al. (2020)."""


def colour_factors(seed: Tensor, strength: tuple[float, float, float, float]) -> Tensor:
    """What brightness, contrast and saturation are multiplied by, and what is added to the hue.

    Args:
        seed: [B] int64.
        strength: of the four; factors are uniform in 1 - strength (at least 0) to 1 + strength, and
            hues move by up to that part of a turn.

    Returns:
        [B, 4] float32.
    """
    drawn = noises.uniform(seed, noises.COLOUR, 4)
    low = [max(0.0, 1 - value) for value in strength[:3]] + [-strength[3]]
    high = [1 + value for value in strength[:3]] + [strength[3]]
    return torch.stack(
        [a + (b - a) * drawn[:, i] for i, (a, b) in enumerate(zip(low, high, strict=True))], dim=1
    )


def jitter_colours(image: Tensor, inside: Tensor, factors: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue, in this order.

    As torchvision's `adjust_*` of float images; its ColorJitter also draws the order.

    Args:
        image: [B, H, W, 3] float32 RGB, 0 to 255.
        inside: [B, H, W] bool, the pixels that contrast takes the mean of.
        factors: [B, 4] from `colour_factors`.

    Returns:
        [B, H, W, 3] float32, 0 to 255. What isn't inside is of no use.
    """
    brightness, contrast, saturation, hue = (f[:, None, None] for f in factors.unbind(1))
    image = (image / 255 * brightness[..., None]).clamp(0, 1)
    count = inside.sum(dim=(1, 2), dtype=torch.float32).clamp(min=1)
    mean = torch.where(inside, _grey(image), 0.0).sum(dim=(1, 2)) / count
    image = _blend(image, mean[:, None, None, None], contrast[..., None])
    image = _blend(image, _grey(image)[..., None], saturation[..., None])
    return _turn_hue(image, hue) * 255


def erased_boxes(seed: Tensor, size: Tensor, probability: float) -> Tensor:
    """The rectangle that is erased of each image.

    Args:
        seed: [B] int64.
        size: [B, 2] int64, height and width of the image on its canvas.
        probability: of erasing any.

    Returns:
        [B, 4] int64 xyxy; of no area where nothing is erased.
    """
    draws = noises.uniform(seed, noises.ERASE, 1 + 4 * TRIES)
    share, ratio, y, x = draws[:, 1:].unflatten(1, (4, TRIES)).unbind(1)
    sides = size.to(torch.float32)
    area = sides.prod(dim=1, keepdim=True) * (
        ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * share
    )
    least, most = (math.log(value) for value in ERASED_RATIO)
    ratio = (least + (most - least) * ratio).exp()
    height, width = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (height < sides[:, 0:1]) & (width < sides[:, 1:2])
    # Of equal ones argmax may take any: the first is made the largest.
    falling = torch.arange(TRIES, 0, -1, device=seed.device)
    first = torch.where(fits, falling, 0).argmax(dim=1, keepdim=True)
    height, width, y, x = (t.gather(1, first)[:, 0] for t in (height, width, y, x))
    top = (y * (sides[:, 0] - height + 1)).floor()
    left = (x * (sides[:, 1] - width + 1)).floor()
    box = torch.stack([left, top, left + width, top + height], dim=1)
    erased = fits.any(dim=1) & (draws[:, 0] < probability)
    return torch.where(erased[:, None], box, 0.0).long()


def within(boxes: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Which pixels lie in each image's box [B, 4] int64 xyxy: [B, H, W] bool."""
    rows = torch.arange(canvas[0], device=boxes.device)
    columns = torch.arange(canvas[1], device=boxes.device)
    x0, y0, x1, y1 = (v[:, None] for v in boxes.unbind(1))
    return ((rows >= y0) & (rows < y1))[:, :, None] & ((columns >= x0) & (columns < x1))[:, None]


def _grey(image: Tensor) -> Tensor:
    red, green, blue = image.unbind(-1)
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue


def _blend(image: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return (share * image + (1 - share) * other).clamp(0, 1)


def _turn_hue(image: Tensor, turn: Tensor) -> Tensor:
    """Add to the hue of [B, H, W, 3] in [0, 1] so much of a turn, [B, 1, 1]."""
    red, green, blue = image.unbind(-1)
    most, least = image.amax(dim=-1), image.amin(dim=-1)
    chroma = most - least
    grey = chroma == 0
    safe = torch.where(grey, 1.0, chroma)
    sixth = torch.where(
        most == red,
        (green - blue) / safe,
        torch.where(most == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth = (sixth / 6 + 1 + turn).remainder(1.0) * 6
    # Of a hue, each colour falls from the most to the least as a trapezoid does.
    shares = [((sixth + n).remainder(6.0) - 3).abs() for n in (0, 4, 2)]
    turned = [most - chroma * (2 - share).clamp(0, 1) for share in shares]
    return torch.where(grey[..., None], image, torch.stack(turned, dim=-1))
