import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import chaos
import pytest

from casc.config import to_json

SCRIPT = """
import json, os, sys
import torch
from casc.config import from_json
from casc.train.recipe import Recipe
from casc.train.launch import errors_in_one_line
from casc.train.loop import train

torch.set_num_threads(1)
with errors_in_one_line():
    train(from_json(Recipe, json.load(open(sys.argv[1]))))
"""


@pytest.mark.slow
def test_torchrun_starts_again_what_was_killed(tiny_recipe, tmp_path):
    recipe = replace(chaos.hurried(tiny_recipe, steps=40), save_steps=2)
    (tmp_path / "recipe.json").write_text(json.dumps(to_json(recipe)))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", "2", str(tmp_path / "script.py"), str(tmp_path / "recipe.json"),
    ]  # fmt: skip
    with (tmp_path / "output.txt").open("w") as output:
        agent = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        until = time.monotonic() + 300  # a busy machine takes long to import torch three times
        while chaos.last_step(recipe) < 5:
            assert agent.poll() is None, (tmp_path / "output.txt").read_text()
            assert time.monotonic() < until, (tmp_path / "output.txt").read_text()
            time.sleep(0.02)
        started = (recipe.folder / "logs/rank-1.jsonl").read_text().splitlines()
        os.kill(json.loads(started[0])["pid"], signal.SIGKILL)
        assert agent.wait(300) == 0, (tmp_path / "output.txt").read_text()
    finally:
        agent.terminate()  # so that it ends its workers
        try:
            agent.wait(60)
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.wait()
    output_text = (tmp_path / "output.txt").read_text()
    assert "continuing from" in output_text
    straight = replace(recipe, out=tmp_path / "straight")
    ranks = chaos.start(straight, tmp_path / "straight.txt")
    assert chaos.finish(ranks, 300) == [0, 0]
    assert not chaos.compare(recipe, straight)
    starts = [
        record["step"]
        for record in map(
            json.loads, (recipe.folder / "logs/rank-1.jsonl").read_text().splitlines()
        )
        if record["kind"] == "start"
    ]
    assert len(starts) == 2
    assert starts[1] >= 4
