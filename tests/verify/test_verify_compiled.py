"""The whole detector, compiled, against the reference's recorded numbers: the longest test.

It has a file of its own so that another process can run all others meanwhile.
"""

from pathlib import Path

import pytest
import torch

from casc.model.choose_compute import choose_compute
from casc.model.detector_config import DetectorConfig, reference_settings
from casc.verify import format_rows, verify_set
from casc.verify.goldens import read_sets

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.mark.slow
def test_compiled_reproduces_every_golden_tensor() -> None:
    torch.compiler.reset()
    (golden,) = read_sets(GOLDENS, log=lambda line: None)
    device = torch.device("cpu")
    config = reference_settings(DetectorConfig())
    compute, _ = choose_compute(config, device, dtype="float32")
    rows = verify_set(golden, device, compute)
    assert all(row.passed for row in rows), "\n" + "\n".join(format_rows(rows))
    assert len(rows) >= 710
