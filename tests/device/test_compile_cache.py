"""What is compiled outlasts the process: each case here is a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from casc.device import compile_cache as compiling
from casc.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

# RoIAlign and NMS are operators of ours: one with a gradient, one without.
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from torch._dynamo.utils import counters
from casc.device import compile_cache as compiling
from casc.ops.nms import batched_nms
from casc.ops.pyramid import flatten_pyramid
from casc.ops.roi_align import roi_align

def loss(weight, image, boxes, scores):
    levels = [torch.nn.functional.avg_pool2d(image * weight["w"], 2**i) for i in range(2)]
    pyramid = flatten_pyramid(levels, (4, 8))
    index, kept = batched_nms(
        boxes[None], scores[None], torch.zeros_like(scores[None], dtype=torch.long),
        scores[None] > 0, iou=0.5, count=4,
    )
    rois = roi_align(pyramid, boxes[index[0]], index[0] * 0, 3, "fixed")
    return (rois * kept[0][:, None, None, None]).square().sum()

torch.set_num_threads(1)
folder = compiling.use_cache(Path(sys.argv[1]))
generator = torch.Generator().manual_seed(0)
image = torch.rand(1, 4, 16, 16, generator=generator)
corner = torch.rand(6, 2, generator=generator) * 30
boxes = torch.cat([corner, corner + 25], dim=1)
weight = {"w": torch.rand(1, 4, 1, 1, generator=generator).requires_grad_()}
args = weight, image, boxes, torch.rand(6, generator=generator)
step = compiling.aot_cached(loss, folder, "settings")
total = step(*args)
total.backward()
exact = loss(*args)
(gradient,) = torch.autograd.grad(exact, weight["w"])
torch.testing.assert_close(total, exact)
torch.testing.assert_close(weight["w"].grad, gradient)
print(json.dumps({
    "total": total.item().hex(),
    "aot": dict(counters["aot_autograd"]),
    "inductor": {k: v for k, v in counters["inductor"].items() if k.startswith("fxgraph")},
    "frames": counters["stats"].get("unique_graphs", 0),
}))
"""


def start(
    folder: Path, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR")}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=env or environment,
    )


def result(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    assert "can't be" not in err
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_what_one_process_compiles_the_next_one_loads(tmp_path):
    # Two at once, both cold: neither may find half of what the other writes.
    pair = [start(tmp_path), start(tmp_path)]
    first, second = [result(process) for process in pair]
    assert first["total"] == second["total"]
    machine = compiling.cache_folder(tmp_path)
    (program,) = (machine / "programs").iterdir()
    assert any((machine / "inductor").rglob("*.so"))

    # Where and as whom a program is started is no part of what it computes.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR")}
    paths = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    environment |= {"HOSTNAME": "other", "USER": "other", "PYTHONPATH": paths}
    third = result(start(tmp_path, cwd=elsewhere, env=environment))
    assert third["total"] == first["total"]
    assert third["aot"] == third["inductor"] == {}
    assert third["frames"] == 0

    # A damaged program is compiled again and replaced.
    whole = program.stat().st_size
    program.write_bytes(program.read_bytes()[:-100])
    process = start(tmp_path)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    assert f"{program}: can't be loaded" in err
    assert json.loads(out.splitlines()[-1])["total"] == first["total"]
    assert program.stat().st_size > whole - 100


def test_where_compiled_code_is_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("CASC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiling.cache_folder().parent == tmp_path / "casc" / "compile"
    monkeypatch.setenv("CASC_CACHE", str(tmp_path / "mine"))
    assert compiling.cache_folder().parent == tmp_path / "mine" / "compile"
    made = compiling.cache_folder(tmp_path / "flag")
    assert made.parent == tmp_path / "flag"
    assert torch.__version__ in made.name


def test_the_user_s_own_folder_stays_inductor_s(monkeypatch, tmp_path):
    with torch.compiler.config.patch(cache_key_tag=""):  # type: ignore[attr-defined]
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
        programs = compiling.use_cache(tmp_path / "flag")
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")
        assert programs.is_dir()
        assert tmp_path / "flag" in programs.parents
        # What torch fills in by itself when it is imported is nobody's choice.
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", compiling.default_cache_dir())
        compiling.use_cache(tmp_path / "flag")
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(programs.parent / "inductor")
        tag = torch.compiler.config.cache_key_tag
        compiling.use_cache(tmp_path / "flag")
        assert torch.compiler.config.cache_key_tag == tag != ""


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--compile-cache"):
        compiling.use_cache(tmp_path / "file")


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_folder_that_others_may_write_to_is_refused(tmp_path):
    old = os.umask(0)
    try:
        programs = compiling.use_cache(tmp_path / "made")
    finally:
        os.umask(old)
    for folder in (programs, programs.parent, programs.parent / "inductor"):
        assert folder.stat().st_mode & 0o777 == 0o700
        folder.chmod(0o720)
        with pytest.raises(
            UserError, match=re.escape(f"--compile-cache {folder}: others may write to it")
        ):
            compiling.use_cache(tmp_path / "made")
        folder.chmod(0o700)
    compiling.use_cache(tmp_path / "made")


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root gives files away")
def test_somebody_else_s_folder_is_refused(tmp_path):
    programs = compiling.use_cache(tmp_path / "made")
    os.chown(programs, 12345, -1)
    with pytest.raises(UserError, match="belongs to user 12345, not to 0"):
        compiling.use_cache(tmp_path / "made")


def test_a_program_that_others_may_write_to_is_not_run(tmp_path, caplog):
    if os.name != "posix":
        pytest.skip("permissions are POSIX's")
    program = tmp_path / "loss-0.program"
    program.write_bytes(b"")
    program.chmod(0o666)
    assert compiling._load(program) is None
    assert "others may write to it" in caplog.text
