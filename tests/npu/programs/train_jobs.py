"""Run recipes one after the other: `train_jobs.py JOBS.json`, on whatever devices there are.

JOBS.json is a list of [recipe, file for the final parameters]; {rank} in the name is filled in.

A CPU is given an NPU's row of the table of devices, and its convolutions, too, get contiguous
operands; and it updates one buffer, as accelerators do. Both then sum up in the same order;
otherwise rounding parts the two runs in a few steps.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from casc.config import from_json
from casc.device import devices
from casc.train import optim
from casc.train.loop import train
from casc.train.recipe import Recipe

conv2d = F.conv2d

if __name__ == "__main__":
    torch.set_num_threads(1)
    cpu, npu = devices.TRAITS["cpu"], devices.TRAITS["npu"]
    devices.TRAITS["cpu"] = replace(
        npu, backend=cpu.backend, pin_memory=cpu.pin_memory, ready=cpu.ready
    )
    optim.is_accelerator = lambda device: True
    F.conv2d = lambda x, *args: conv2d(x.contiguous(), *args)
    for number, (settings, path) in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        if "PORTS" in os.environ:
            os.environ["MASTER_PORT"] = os.environ["PORTS"].split(",")[number]
        state = train(from_json(Recipe, settings, f"job {number}")).state
        params = {k: v.detach().cpu().contiguous().clone() for k, v in state.params.items()}
        save_file(params, path.format(rank=os.environ.get("RANK", "0")))
