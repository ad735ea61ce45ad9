"""The reference's recorded numbers on the emulated NPU, with CPU fallbacks denied."""

from pathlib import Path

import pytest

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"


@pytest.mark.slow
def test_verify_passes(emulator, run_module):
    environment = emulator | {"TORCH_NPU_FALLBACK_CPU_DISABLE": "1"}
    output = run_module("casc", "verify", GOLDENS, "--device", "npu:0", environment=environment)
    assert "eager, npu:0" in output
    assert output.splitlines()[-1] == "passed"
