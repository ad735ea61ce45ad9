"""Lower a small detector's step for a card that isn't there: `lower_steps.py OUT.json STEP`.

It changes torch for the whole process, so each step has its own. Widths are small, so that it takes
seconds rather than minutes; the operators between are the reference's.
"""

import json
import sys
from pathlib import Path

from casc.bench import graph, no_gpu
from casc.bench.cards import CARDS
from casc.model.box_head import BoxHeadConfig
from casc.model.detector_config import STAGES, DetectorConfig
from casc.model.fpn import FPNConfig
from casc.model.mask_head import MaskHeadConfig
from casc.model.resnet import ResNetConfig
from casc.model.rpn import RPNConfig

SMALL = DetectorConfig(
    classes=3,
    backbone=ResNetConfig(depth=18, width=16),
    fpn=FPNConfig(channels=32),
    rpn=RPNConfig(channels=32, train_pre_nms=50, train_proposals=50),
    stages=STAGES[:1],
    box_head=BoxHeadConfig(channels=32, samples=16),
    mask_head=MaskHeadConfig(channels=32, convs=1),
)
JOBS = {
    "training": graph.GraphJob("train", (64, 64), 2, 2, "h100"),
    "counted": graph.GraphJob("train", (64, 64), 2, 2, "h100", capacity="counted"),
    "inference": graph.GraphJob("inference", (64, 64), 1, 2, "h100"),
}


def main(out: Path, name: str) -> None:
    """Write a step's report."""
    card = CARDS["h100"]
    no_gpu.pretend(card)
    out.write_text(json.dumps(graph.summary(graph.lower(JOBS[name], SMALL), card)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
