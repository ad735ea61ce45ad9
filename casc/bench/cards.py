"""Cards whose limits are published: what bounds a step before any kernel is written."""

from importlib.util import find_spec
from typing import NamedTuple

from casc.errors import UserError


class Card(NamedTuple):
    """What a data sheet says, dense, at the boost clock."""

    name: str
    architecture: int
    """Compute capability, times ten."""
    bytes_per_s: float
    """Of its memory."""
    flops: float
    """Of bfloat16 products with float32 sums, without sparsity."""
    processors: int
    """Streaming multiprocessors."""
    shared_memory: int
    """The most bytes that a block may ask for."""
    source: str


CARDS = {
    "a100": Card(
        "NVIDIA A100-SXM4-80GB", 80, 2.039e12, 312e12, 108, 166912,
        "NVIDIA A100 Tensor Core GPU data sheet (A100 80GB SXM)",
    ),
    "h100": Card(
        "NVIDIA H100 80GB HBM3", 90, 3.35e12, 989e12, 132, 232448,
        "NVIDIA H100 Tensor Core GPU data sheet (H100 SXM)",
    ),
    "b200": Card(
        "NVIDIA B200", 100, 8.0e12, 2250e12, 148, 232448,
        "NVIDIA DGX B200 data sheet: 64 TB/s and 36 PFLOPS of FP8, dense, by eight cards; half for"
        " bfloat16",
    ),
}  # fmt: skip


def check_build() -> None:
    """Check that this torch can lower for such a card; it needs none to be there.

    Raises:
        UserError: torch was built without CUDA or is too old, or Triton isn't installed.
    """
    import torch

    from casc.device.versions import LOWERS_WITHOUT_A_CARD

    if torch.version.cuda is None or find_spec("triton") is None:
        raise UserError(
            f"torch {torch.__version__} has no CUDA or no Triton, which write what is counted;"
            " install a torch that is built for CUDA (no card is needed)"
        )
    if not LOWERS_WITHOUT_A_CARD:
        raise UserError(
            f"torch {torch.__version__} asks for a card's driver to lower; install torch 2.14"
        )
