"""The batch: what a loader worker hands to the device, all of fixed shape.

Legend: B images, G ground-truth capacity, E edge capacity of an image, R capacity for
regions to ignore, Hi x Wi input canvas.
Boxes and edges are in pixels of the stored image, x to the right and y down.
"""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Decoded images and their padded ground truth, before resize and flip.

    A bucket's batches all have the same shapes, whatever the images hold:
    the capacities come from the shard index.
    """

    image: Tensor
    """[B, Hi, Wi, C] uint8 at stored size in the top left corner, 0 elsewhere. C is 3 for RGB, 1
    for grey, or a number of planes."""
    size: Tensor
    """[B, 2] float32, stored height and width in pixels."""
    boxes: Tensor
    """[B, G, 4] float32 xyxy, 0 where padded."""
    labels: Tensor
    """[B, G] int64 in [0, classes), 0 where padded."""
    valid: Tensor
    """[B, G] bool, false where padded."""
    edges: Tensor
    """[B, E, 4] float32 polygon edges (x0, y0, x1, y1) of all of an image's objects, one object
    after another; padding has zero length. For E see `casc.data.sample.edge_room`."""
    edge_gt: Tensor
    """[B, E] int64 in [0, G), the object whose edge it is; 0 where padded."""
    image_id: Tensor
    """[B] int64, COCO's image id; -1 where a row only fills up the batch."""
    seed: Tensor
    """[B] int64 in [0, 2**31), from (run seed, epoch, image id): all of an image's noise."""
    bitmaps: Tensor | None = None
    """[B, G, Hi, Wi] uint8 masks at stored size, only for `mask_target="bitmap"`."""
    regions: Tensor | None = None
    """[B, R, 4] float32 xyxy, 0 where padded, only for `model.ignore="crowds"`."""
