"""RoIAlign and the fully connected layer behind it, in one operator.

The aligned features are by far the largest thing that a box head would keep for its backward
pass (49 MiB a stage for 1024 RoIs in float32), and quick to make. So they are made again there,
and the order of that pass is such that the fewest large tensors exist at once.

Legend: P pixels of a flattened pyramid, C channels, R RoIs, N = O * O output cells of a RoI,
T taps of a cell, K outputs of the layer.
"""

import torch
from torch import Tensor

from casc.ops.heap import trim_heap
from casc.ops.linear import linear, product
from casc.ops.probe import Probe, unwatched
from casc.ops.pyramid import Pyramid
from casc.ops.roi_align import RoiKernel, Sampling, fixed_taps, is_native, roi_align
from casc.ops.row_sums import bag_backward_onto, weighted_row_sums

# RoIs that are aligned at a time on a CPU: a block that its caches hold is quicker to turn
# around than all features, and fresh large blocks of memory are slow.
BLOCK = 64


def roi_linear(
    pyramid: Pyramid,
    boxes: Tensor,
    image: Tensor,
    cells: int,
    sampling: Sampling,
    kernel: RoiKernel,
    matrix: Tensor,
    bias: Tensor,
    probe: Probe = unwatched,
) -> tuple[Tensor, Pyramid]:
    """`linear(roi_align(...).flatten(1), matrix, bias)`, and the pyramid for the next reader.

    Args:
        pyramid: from `flatten_pyramid`.
        boxes: [R, 4] float32 xyxy in pixels of the canvas; no gradient flows to them.
        image: [R] int64, each RoI's image in the batch.
        cells: O.
        sampling: as for `roi_align`.
        kernel: as for `roi_align`; native and triton keep their features.
        matrix: [K, C * N] of the features' dtype.
        bias: [K] of that dtype.
        probe: sees a native kernel's features; others aren't all there at once.

    Returns:
        [R, K], and the pyramid as `chained_bags` hands it on.
    """
    if is_native(sampling, kernel):
        features = roi_align(pyramid, boxes, image, cells, sampling, kernel)
        features = probe("box.features", features)
        return linear(features.flatten(1), matrix, bias), pyramid
    if kernel == "triton":
        from casc.ops.roi_align_triton import chained_align  # not for every device

        rows, pyramid = chained_align(pyramid, boxes, image, cells)
        # The kernels give [R, N, C]. Turning the matrix takes no pass of its own where a
        # compiler casts it anyway; turning the features would.
        turned = matrix.unflatten(1, (-1, cells * cells)).transpose(1, 2).flatten(1)
        return linear(rows.flatten(1), turned, bias), pyramid
    index, weight = fixed_taps(pyramid, boxes.detach(), image, cells)
    made, pixels = _Chained.apply(pyramid.pixels, index, weight, matrix, bias)
    return made, pyramid.with_pixels(pixels)


class _Chained(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pixels, index, weight, matrix, bias):
        ctx.save_for_backward(pixels, index, weight, matrix)
        return _forward(pixels, index, weight, matrix, bias), pixels.view_as(pixels)

    @staticmethod
    def backward(ctx, *grads):
        grad, later = grads
        pixels, index, weight, matrix = ctx.saved_tensors
        grad = grad.contiguous()
        pixels_grad = _pixels_grad(later, grad, index, weight, matrix)
        cells = matrix.shape[1] // pixels.shape[1]
        matrix_grad = _matrix_grad(grad, pixels, index, weight, cells)
        return pixels_grad, None, None, matrix_grad, grad.sum(dim=0)


@torch.library.custom_op("casc::roi_linear", mutates_args=())
def _forward(pixels: Tensor, index: Tensor, weight: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    cells = matrix.shape[1] // pixels.shape[1]
    return product(_features(pixels, index, weight, cells), matrix, bias)


@_forward.register_fake
def _(pixels, index, weight, matrix, bias):
    rois = index.shape[0] * pixels.shape[1] // matrix.shape[1]
    return pixels.new_empty((rois, matrix.shape[0]))


# Two operators, so that what only the first one needs, the matrix for one, is gone when the
# second one runs.
@torch.library.custom_op("casc::roi_linear_pixels", mutates_args=())
def _pixels_grad(
    later: Tensor, grad: Tensor, index: Tensor, weight: Tensor, matrix: Tensor
) -> Tensor:
    """The gradient of the pixels, `later` from their next readers included."""
    channels = later.shape[1]
    trim_heap(grad.shape[0] * matrix.shape[1] * grad.itemsize, grad)
    features_grad = product(grad, matrix.t()).view(grad.shape[0], channels, -1)
    cells_grad = _channels_last_(features_grad).view(-1, channels)
    return bag_backward_onto(later, cells_grad, index, weight)


@_pixels_grad.register_fake
def _(later, grad, index, weight, matrix):
    return later.new_empty(later.shape)


def _channels_last_(features: Tensor) -> Tensor:
    """[R, C, N] as [R, N, C] in the same memory: a second block as large costs more than copies."""
    rois, channels, cells = features.shape
    for block in features.split(_block(features)):
        # Not `contiguous`, which copies nothing where there is one channel or one cell.
        rows = block.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        block.view(rows.shape).copy_(rows)
    return features.view(rois, cells, channels)


@torch.library.custom_op("casc::roi_linear_matrix", mutates_args=())
def _matrix_grad(grad: Tensor, pixels: Tensor, index: Tensor, weight: Tensor, cells: int) -> Tensor:
    """The gradient of the matrix."""
    trim_heap(grad.shape[0] * pixels.shape[1] * cells * grad.itemsize, grad)
    return product(grad.t(), _features(pixels, index, weight, cells).t())


@_matrix_grad.register_fake
def _(grad, pixels, index, weight, cells):
    return grad.new_empty((grad.shape[1], pixels.shape[1] * cells))


def _features(pixels: Tensor, index: Tensor, weight: Tensor, cells: int) -> Tensor:
    """[R, C * N], in the order of `roi_align(...).flatten(1)`."""
    channels = pixels.shape[1]
    rois = index.shape[0] // cells
    features = pixels.new_empty((rois, channels, cells))
    block = _block(features)
    for first in range(0, rois, block):
        taken = slice(first * cells, (first + block) * cells)
        rows = weighted_row_sums(pixels, index[taken], weight[taken])
        features[first : first + block] = rows.view(-1, cells, channels).transpose(1, 2)
    return features.view(rois, -1)


def _block(rois: Tensor) -> int:
    return BLOCK if rois.is_cpu else rois.shape[0]
