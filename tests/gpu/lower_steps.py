"""Lower a small detector's step for a card that isn't there: `lower_steps.py OUT.json STEP`.

Every Triton kernel that comes of it is compiled to machine code for three generations of cards. It
changes torch for the whole process, so each step has its own. Widths are small, so that it takes
seconds rather than minutes; the operators between are the reference's.
"""

import json
import re
import sys
from pathlib import Path

from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers, triton_heuristics
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

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
    "inference, upright": graph.GraphJob("inference", (96, 64), 1, 2, "h100"),
}
KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL)
ARCHITECTURES = (80, 90, 100)


def compile_kernels(code: list[str]) -> dict[str, int]:
    """Make the machine code of every kernel: how many there are, and are made per architecture.

    Raises whatever Triton or ptxas raise.
    """
    triton_helpers.set_driver_to_gpu = lambda: None  # would load the driver's library
    launcher = triton_heuristics.StaticTritonCompileResult
    launcher.can_statically_launch = staticmethod(lambda *args: None)  # type: ignore[assignment]
    kernels = {}
    for name, source in (found for text in code for found in KERNEL.findall(text)):
        # The same kernel has another number in its name each time.
        kernels.setdefault(source.replace(name, ""), (name, source))
    made = {"in all": len(kernels)}
    for architecture in ARCHITECTURES:
        target = GPUTarget("cuda", architecture, 32)
        driver.active.get_current_target = lambda target=target: target  # type: ignore[assignment]
        now = f"cc={architecture}, major={architecture // 10},"
        count = 0
        for name, source in kernels.values():
            mine, places = re.subn(r"cc=\d+, major=\d+,", now, source)
            assert places, f"{name} doesn't say for which card it is"
            tuner = getattr(PyCodeCache.load(mine), name)
            kernel = tuner._precompile_config(tuner.configs[0]).kernel
            assert kernel.metadata.target.arch == architecture
            count += len(kernel.asm["cubin"]) > 0
        made[f"sm_{architecture}"] = count
    return made


def main(out: Path, name: str) -> None:
    """Write a step's report."""
    card = CARDS["h100"]
    no_gpu.pretend(card)
    lowered = graph.lower(JOBS[name], SMALL)
    report = graph.summary(lowered, card)
    report["kernels"] = compile_kernels([found.code for found in lowered])
    # Each kernel is written where it is made known, so none was missed.
    report["named"] = sum(found.code.count("async_compile.triton(") for found in lowered)
    report["matched"] = sum(len(KERNEL.findall(found.code)) for found in lowered)
    out.write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
