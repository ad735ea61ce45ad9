"""Compilers are tried, not looked for; what comes out of one is the CPU's or it isn't used."""

import importlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from casc.device import compilers, devices
from casc.device.compilers import choose_compiler, find_fault, first_line, tried, wrong_results
from casc.device.devices import TRAITS, Compiler, Setting
from casc.errors import UserError

CPU = torch.device("cpu")
INDUCTOR, AOT_EAGER = TRAITS["cpu"].compilers


def test_a_compiler_that_computes_right():
    assert wrong_results("aot_eager", CPU) == ""


@pytest.mark.parametrize(("factor", "fault"), [(1.0, ""), (1.1, "off"), (float("nan"), "off")])
def test_a_compiler_that_computes_wrong(factor, fault):
    def backend(graph, inputs):
        return lambda *args: [value * factor for value in graph(*args)]

    torch.compiler.reset()
    found = wrong_results(backend, CPU)
    assert (fault in found) if fault else not found


def test_the_first_line_of_what_a_compiler_wraps():
    error = BackendCompilerFailed("inductor", ValueError("\nno way\nstack"), None)
    assert first_line(error) == "ValueError: no way"
    assert first_line(BackendCompilerFailed("mine", error, None)) == "ValueError: no way"


def test_without_a_cpp_compiler(monkeypatch, tmp_path):
    """The real thing: another process, Inductor's own complaint, and the next in the table."""
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], compilers=(INDUCTOR,)))
    chosen, (trial,) = choose_compiler("auto", CPU, tmp_path)
    assert chosen is None
    assert "No working C++ compiler found" in trial.fault
    assert "\n" not in trial.fault


def test_a_compiler_that_kills_its_process(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho Duplicated key >&2\nkill -ABRT $$\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    assert find_fault(INDUCTOR, CPU) == "the process died of SIGABRT Duplicated key"


def test_the_process_is_told_which_compiler_to_load(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "{\\"fault\\": \\"$CASC_TEST_BACKEND\\"}"\n')
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    monkeypatch.setenv("CASC_TEST_BACKEND", "other")
    one = Compiler("dvm", "inductor", "mend", (("CASC_TEST_BACKEND", "one"),))
    assert find_fault(one, CPU) == "one"


@pytest.fixture
def faults(monkeypatch) -> dict[str, str]:
    """What the compilers are found to do wrong; `tries` counts."""
    found = {"inductor": "", "aot_eager": "", "tries": ""}

    def find(compiler, device):
        found["tries"] += compiler.name[0]
        return found[compiler.name]

    monkeypatch.setattr(compilers, "find_fault", find)
    return found


def test_answers_are_kept_by_versions(faults, tmp_path, monkeypatch):
    for _ in range(3):
        assert choose_compiler("auto", CPU, tmp_path) == (INDUCTOR, [])
    assert faults["tries"] == "i"
    tried(INDUCTOR, CPU, tmp_path, again=True)
    assert faults["tries"] == "ii"
    monkeypatch.setattr(compilers, "_versions", lambda: {"torch": "9"})
    choose_compiler("auto", CPU, tmp_path)
    assert faults["tries"] == "iii"


@pytest.mark.skipif(os.name != "posix", reason="the lock is POSIX's")
def test_one_of_the_ranks_that_start_together_tries(tmp_path, monkeypatch):
    tries = []

    def find(compiler, device):
        with (tmp_path / "compilers.lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tries.append("alone")
        return ""

    fcntl = importlib.import_module("fcntl")
    monkeypatch.setattr(compilers, "find_fault", find)
    tried(INDUCTOR, CPU, tmp_path)
    assert tries == ["alone"]


def test_an_answer_is_kept_until_anything_changes_that_may_mend_it(faults, tmp_path, monkeypatch):
    home = Setting("CASC_TEST_SETTING", "1", "for a test")
    row = replace(TRAITS["cpu"], environment=(home,), toolkits=("CASC_TEST_TOOLKIT",))
    monkeypatch.setitem(TRAITS, "cpu", row)
    monkeypatch.setitem(TRAITS, "cuda", row)
    for name in ("CASC_TEST_SETTING", "CASC_TEST_TOOLKIT", "CXX"):
        monkeypatch.delenv(name, raising=False)
    program = tmp_path / "g++"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)

    def tries(device=CPU) -> int:
        faults["tries"] = ""
        tried(INDUCTOR, device, tmp_path)
        return len(faults["tries"])

    assert (tries(), tries()) == (1, 0)
    assert tries(torch.device("cuda")) == 1
    for name, value in (
        ("CASC_TEST_SETTING", "1"), ("CASC_TEST_TOOLKIT", "/opt"), ("CXX", str(program)),
        ("PATH", f"{tmp_path}:{os.environ['PATH']}"),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert (tries(), tries()) == (1, 0), name
    with monkeypatch.context() as patch:
        patch.setitem(TRAITS, "cpu", replace(row, compilers=(INDUCTOR,)))
        assert tries() == 1
    with monkeypatch.context() as patch:
        patch.setattr(compilers, "__file__", str(program))  # what is tried has changed
        assert tries() == 1
    assert tries() == 0


def test_a_damaged_answer_is_found_again(faults, tmp_path):
    tried(INDUCTOR, CPU, tmp_path)
    (path,) = tmp_path.glob("compiler-inductor-*.json")
    assert json.loads(path.read_text())["fault"] == ""
    path.write_text("{")
    assert tried(INDUCTOR, CPU, tmp_path).fault == ""
    assert faults["tries"] == "ii"


def test_what_was_asked_for_or_nothing(faults, tmp_path):
    faults["inductor"] = "broken"
    with pytest.raises(UserError, match="--compile-backend inductor: broken; install a C"):
        choose_compiler("inductor", CPU, tmp_path)
    with pytest.raises(UserError, match="--compile-backend dvm: not for cpu; it has auto, induc"):
        choose_compiler("dvm", CPU, tmp_path)
    chosen, failed = choose_compiler("auto", CPU, tmp_path)
    assert chosen == AOT_EAGER
    assert [str(trial) for trial in failed] == ["inductor doesn't work: broken"]
    faults["inductor"] = ""  # mended: who asks for it needn't know of what is kept
    assert choose_compiler("inductor", CPU, tmp_path) == (INDUCTOR, [])


def test_a_compiler_that_the_environment_names(faults, tmp_path, monkeypatch):
    one = Compiler("dvm", "inductor", "mend", (("CASC_TEST_BACKEND", "one"),))
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], compilers=(one, AOT_EAGER)))
    monkeypatch.delenv("CASC_TEST_BACKEND", raising=False)
    faults["dvm"] = "broken"
    with torch.compiler.config.patch(cache_key_tag=""):  # type: ignore[attr-defined]
        choose_compiler("auto", CPU, tmp_path)
        assert "CASC_TEST_BACKEND" not in compilers.os.environ
        faults["dvm"] = ""
        tried(one, CPU, tmp_path, again=True)
        monkeypatch.setenv("CASC_TEST_BACKEND", "other")
        assert choose_compiler("dvm", CPU, tmp_path) == (one, [])
        assert compilers.os.environ["CASC_TEST_BACKEND"] == "one"
        assert "CASC_TEST_BACKEND=one" in torch.compiler.config.cache_key_tag


def test_every_device_ends_in_one_that_makes_no_kernels():
    for row in devices.TRAITS.values():
        assert row.compilers[-1].name == "aot_eager"
        assert len({compiler.name for compiler in row.compilers}) == len(row.compilers)
    assert [compiler.name for compiler in TRAITS["npu"].compilers][:2] == ["dvm", "inductor"]


def test_the_process_that_tries_needs_no_installed_casc(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    fault = find_fault(Compiler("inductor", "no_such_backend", ""), CPU)
    assert "no_such_backend" in fault
    assert Path.cwd() == tmp_path
