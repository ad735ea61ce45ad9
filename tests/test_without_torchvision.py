"""torchvision is imported where it is needed only: the model runs without it."""

import subprocess
import sys

CODE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torchvision", "torch_npu"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch
import casc.train.loop
from casc.model import detector, forward_detect
from casc.model.detector_config import DetectorConfig
from casc.model.detector import Inputs
from casc.model.targets import Targets
from dataclasses import replace
config = DetectorConfig(classes=3)
small = replace(
    config,
    backbone=replace(config.backbone, depth=18, width=16),
    fpn=replace(config.fpn, channels=16),
    rpn=replace(config.rpn, channels=16, test_pre_nms=20, test_proposals=10, nms_kernel="fixed"),
    box_head=replace(config.box_head, channels=16),
    mask_head=replace(config.mask_head, convs=1, channels=16),
    inference=replace(config.inference, detections=5, nms_kernel="fixed"),
)
params, buffers = detector.init(small, torch.Generator().manual_seed(0))
inputs = Inputs(torch.zeros(1, 3, 64, 64), torch.full((1, 2), 64.0), torch.ones(1, 4), None)
with torch.no_grad():
    found = forward_detect.detect(params, buffers, small, inputs)
assert found.masks.shape == (1, 5, 28, 28)
assert not {"torchvision", "torch_npu"} & set(sys.modules)
"""


def test_the_model_runs_with_torchvision_blocked():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
