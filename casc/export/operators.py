"""casc's own operators in plain ATen, so that an exported program runs where casc isn't.

Legend: B images, N boxes, K kept, P pixels, T taps, C channels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from torch.export import ExportedProgram

from casc.errors import UserError


def plain(program: ExportedProgram) -> ExportedProgram:
    """The same program without casc's operators.

    Raises:
        UserError: one of them has no plain form.
    """
    own = own_operators(program)
    if not own:
        return program
    if "casc.roi_align_adaptive.default" in own:
        raise UserError(
            "the adaptive RoIAlign has as many samples as the data has it, which only ONNX can"
            " say: use --format onnx, or --roi-align fixed"
        )
    operators = torch.ops.casc
    table: dict[torch._ops.OperatorBase, Callable] = {
        operators.nms.default: _nms,
        operators.bag.default: _bags,
        operators.linear.default: F.linear,
    }
    program = program.run_decompositions(table)
    _copy_where_needed(program)
    left = own_operators(program)
    if left:
        raise UserError(f"{', '.join(left)}: casc's own, and no plain form of it is known")
    return program


def _copy_where_needed(program: ExportedProgram) -> None:
    """Let a program reshape where it views.

    Whether a view needs a copy was found with the strides that were predicted; a convolution's
    result may come with others.
    """
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if node.target is torch.ops.aten.view.default:
                    node.target = torch.ops.aten.reshape.default
            module.recompile()


def own_operators(program: ExportedProgram) -> list[str]:
    """Names of the operators in a program that don't come with torch."""
    targets = {
        str(node.target)
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace in ("casc", "torchvision")
    }
    return sorted(targets)


def _bags(pixels: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return F.embedding_bag(index, pixels, mode="sum", per_sample_weights=weight)


def _nms(
    boxes: Tensor, scores: Tensor, group: Tensor, valid: Tensor, iou: float, count: int
) -> tuple[Tensor, Tensor]:
    """Greedy suppression as a loop over survivors: exact, and at most K turns of O(N).

    Boxes of different groups lie apart, so groups need no attention here. What overlaps the
    best box that is left goes; arithmetic and ties are those of torchvision's kernel.
    """
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    place = torch.arange(scores.shape[1], device=boxes.device)
    slot = torch.arange(count, device=boxes.device)
    gone = torch.full_like(scores, -1.0)
    # As a number, torch 2.11 would make a constant of it that the program then lacks.
    limit = torch.full_like(scores[0, 0], iou)

    def goes_on(turn: Tensor, alive: Tensor, index: Tensor, survivors: Tensor) -> Tensor:
        return (turn < index.shape[1]) & (alive >= 0).any()

    def keep_best(turn: Tensor, alive: Tensor, index: Tensor, survivors: Tensor):
        score, best = alive.max(dim=1, keepdim=True)
        found = score >= 0
        chosen = boxes.gather(1, best[..., None].expand(-1, -1, 4))
        low = torch.maximum(boxes[..., :2], chosen[..., :2])
        high = torch.minimum(boxes[..., 2:], chosen[..., 2:])
        width, height = (high - low).clamp(min=0).unbind(-1)
        shared = width * height
        overlaps = shared / (areas.gather(1, best) + areas - shared) > limit
        left = torch.where(overlaps | (place == best), gone, alive)
        return (
            turn + 1,
            left,
            torch.where((slot == turn) & found, best, index),
            survivors + found[:, 0],
        )

    start = (
        torch.zeros((), dtype=torch.long, device=boxes.device),
        torch.where(valid, scores, gone),
        scores.new_zeros((scores.shape[0], count), dtype=torch.long),
        scores.new_zeros((scores.shape[0],), dtype=torch.long),
    )
    _, _, index, survivors = while_loop(goes_on, keep_best, start)
    return index, survivors
