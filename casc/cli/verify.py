"""`casc verify`: does this device compute what the reference computes?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class VerifyCommand:
    """Check that this device computes what the reference computed.

    Runs the steps that train and predict on recorded inputs and compares every recorded
    tensor; exits with 1 if one is out of tolerance. For a new device, driver or compiler.

    Examples: `casc verify tests/goldens`; `casc verify tests/goldens --device cuda`.
    """

    goldens: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="GOLDENS")]]
    """Folder of golden files, such as the project's tests/goldens."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto: the accelerator if there is one, else the CPU. Or cpu, cuda, npu, ..."""
    compile: bool = False
    """Check the compiled functions."""

    def run(self) -> int:
        """Verify; 1 if anything is out of tolerance."""
        from casc.device.devices import choose_device
        from casc.verify import verify

        return not verify(self.goldens, choose_device(self.device), compile=self.compile, log=print)
