import os
import subprocess
import sys

from casc.bench.exchange import Settings, time_steps
from casc.distributed import ALONE


def test_one_process_has_nothing_to_send():
    lines = time_steps(Settings(steps=1, batch=1), ALONE)
    assert lines[0].startswith("1 ranks, 1 images each, ")
    assert len(lines) == 4
    assert all(float(line.split()[-2 if line.endswith(" s") else -1]) > 0 for line in lines[1:])


def test_ranks_started_by_torchrun():
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "casc.bench.exchange", "--steps", "1",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 ranks, ")
    assert done.stdout.count("images per second of all ranks") == 1
