"""What is compiled outlasts the process: each case here is a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config as inductor

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


def first_word(args: tuple) -> str:
    return args[-1].partition(" ")[0] if isinstance(args[-1], str) else "none"


class Program:
    """What a compiler makes, without one; its guards refuse what begins with another word."""

    def __init__(self, word: str):
        self.word = word

    def guard_check(self, *args):
        return self.word == first_word(args)

    def __call__(self, *args):
        return self.word

    def save_compiled_function(self, path):
        Path(path).write_text(self.word)


@pytest.fixture
def compilations(monkeypatch, tmp_path):
    """`compilations(*args)`: how many a new process makes that calls a function on these."""
    made = []

    def load(file):
        return Program(file.read().decode())

    class Compiled:
        def aot_compile(self, call):
            made.append(call)
            return Program(first_word(call[0]))

    monkeypatch.setattr(compiling, "compile_apart", lambda *args, **settings: Compiled())
    monkeypatch.setattr(torch.compiler, "load_compiled_function", load)

    def count(*args, settings="", rows=None):
        made.clear()
        step = compiling.aot_cached(lambda *args: None, tmp_path, settings, rows=rows)
        for _ in range(2):
            assert step(*args) == first_word(args)
        return len(made)

    return count


def test_what_a_kept_program_depends_on(compilations, monkeypatch):
    """Guards may see to some of it; the file's name has to see to all."""
    x = torch.zeros(4, 6)
    assert compilations(x) == 1
    assert compilations(x) == compilations(x.clone()) == compilations(x + 1) == 0
    others = [x[:3], x.double(), x.clone().requires_grad_(), torch.zeros(6, 4).t(), x.to("meta")]
    for other in (*others, {"x": x}, {"y": x}, [x], (x,), 3, 4):
        assert compilations(other) == 1
        assert compilations(other) == 0
    assert compilations(x, settings="other") == 1
    # Of any size in the first dimension, and in no other.
    assert compilations(x, rows=lambda x: [x]) == 1
    assert compilations(torch.zeros(5, 6), rows=lambda x: [x]) == 0
    assert compilations(torch.zeros(4, 7), rows=lambda x: [x]) == 1
    with torch.no_grad():
        assert compilations(x) == 1
    with inductor.patch(max_autotune=True):
        assert compilations(x) == 1
    try:
        torch.use_deterministic_algorithms(True)
        assert compilations(x) == 1
    finally:
        torch.use_deterministic_algorithms(False)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        assert compilations(x) == 1
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "timm", SimpleNamespace(__version__="of another day"))
        assert compilations(x) == 1
    with monkeypatch.context() as patch:
        patch.setattr(compiling, "_sources", lambda: "other")
        assert compilations(x) == 1
    assert compilations(x) == 0


def test_guards_that_say_more_than_the_name(compilations, tmp_path):
    """The name is the same here, whatever the words are: each program is kept beside the others."""

    class Words(str):
        def __repr__(self):
            return "words"

    old = os.umask(0)
    try:
        assert compilations(Words("one word")) == compilations(Words("two words")) == 1
    finally:
        os.umask(old)
    assert compilations(Words("one more")) == compilations(Words("two more")) == 0
    kept = sorted(tmp_path.iterdir())
    assert [file.read_text() for file in kept] == ["one", "two"]
    assert [file.stat().st_mode & 0o777 for file in kept] == [0o600, 0o600]
    # In one process, too.
    step = compiling.aot_cached(lambda *args: None, tmp_path, "")
    for words in ("one a", "two b", "one c"):
        assert step(Words(words)) == first_word((words,))


def test_which_sources_a_kept_program_depends_on(monkeypatch, tmp_path):
    """All that a step may import; a gradient's formula also for torch's own cache."""
    for name in ("ops/one.py", "cli/two.py", "model/three.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x = 1")
    monkeypatch.setattr(compiling.casc, "__file__", str(tmp_path / "__init__.py"))

    def digests() -> tuple[str, str]:
        for made in (compiling._sources, compiling._operators):
            made.cache_clear()
        return compiling._sources(), compiling._operators()

    try:
        sources, operators = digests()
        (tmp_path / "cli/two.py").write_text("x = 2")
        assert digests() == (sources, operators)
        (tmp_path / "model/three.py").write_text("x = 2")
        changed, same = digests()
        assert changed != sources
        assert same == operators
        (tmp_path / "ops/one.py").write_text("one.register_autograd(half)")
        _, first = digests()
        (tmp_path / "ops/one.py").write_text("one.register_autograd(twice)")
        assert len({operators, first, digests()[1]}) == 3
    finally:
        monkeypatch.undo()
        digests()


def test_each_kind_of_machine_has_a_folder_of_its_own(monkeypatch, tmp_path):
    """In a home that they share."""
    name = "NVIDIA A100"

    def folder() -> str:
        compiling._machine.cache_clear()
        return compiling.cache_folder(tmp_path).name

    try:
        found = [folder()]
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        module = SimpleNamespace(get_device_name=lambda: name)
        monkeypatch.setattr(torch, "get_device_module", lambda: module)
        found.append(folder())
        name = "NVIDIA H100"
        found.append(folder())
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
        found.append(folder())
        monkeypatch.setattr(compiling.sys, "version_info", (3, 99, 0))
        found.append(folder())
        monkeypatch.setattr(torch, "__version__", "2.99.0+cu199")
        found.append(folder())
        assert len(set(found)) == 6
    finally:
        monkeypatch.undo()
        compiling._machine.cache_clear()


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


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--compile-cache .* choose another folder$"):
        compiling.use_cache(tmp_path / "file")
    # Who gave no flag may not have one: `casc doctor`, `casc eval`.
    monkeypatch.setenv("CASC_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"^compile cache .* set CASC_CACHE to another folder$"):
        compiling.use_cache()


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
