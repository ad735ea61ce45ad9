import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from casc.cli import device_checks as smoke
from casc.cli import doctor
from casc.cli.device_checks import check_device
from casc.cli.doctor import DoctorCommand, Finding, examine, explain_import, lines
from casc.device import compilers


@pytest.fixture(autouse=True)
def working_compilers(monkeypatch):
    """They are tried for seconds, and have tests of their own."""
    monkeypatch.setattr(compilers, "find_fault", lambda compiler, device: "")


WITHOUT_CANN = """Traceback (most recent call last):
ImportError: libhccl.so: cannot open shared object file: No such file or directory
The above exception was the direct cause of the following exception:
RuntimeError: Failed to load the backend extension: torch_npu. You can disable it
"""


def broken_backend(folder: Path) -> None:
    """A package as torch-npu is without CANN: torch imports it by itself, and it fails."""
    (folder / "torch_npu.py").write_text(
        "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')"
    )
    facts = folder / "torch_npu-2.14.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.14.0\n")
    (facts / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")


def test_a_backend_that_breaks_torch_is_explained(tmp_path):
    """In a process of its own: `import torch` itself fails there."""
    broken_backend(tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != doctor.AUTOLOAD}
    environment |= {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "casc", "doctor", "--json"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    report = json.loads(done.stdout)
    (trouble,) = (f for f in report["findings"] if f["state"] == "missing")
    assert "torch_npu doesn't find" in trouble["value"]
    assert "libhccl.so" in trouble["value"]
    assert "set_env.sh" in trouble["fix"]
    assert "export TORCH_DEVICE_BACKEND_AUTOLOAD=0" in trouble["fix"]
    # The CPU does all the same.
    assert report["usable"] == ["cpu"]
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("text", "why", "fix"),
    [
        (WITHOUT_CANN, "libhccl.so", "install CANN"),
        (
            "RuntimeError: Failed to load the backend extension: torch_npu.\nRuntimeError: Two"
            " accelerators cannot be used at the same time in PyTorch: npu and cuda.",
            "built for another device",
            "CPU build",
        ),
        (
            "terminate called after throwing an instance of 'c10::ValueError'\n  what():"
            " Duplicated key 'pinned_reserve_segment_size_mb' found in device config parser hook"
            "\nframe #0: c10::Error::Error() + 0x9d",
            "built for another device",
            "CPU build",
        ),
        (
            "Failed to load the backend extension: torch_npu. x\nImportError: libtorch_npu.so:"
            " undefined symbol: _ZN2at",
            "another torch",
            r"casc[npu]",
        ),
        ("ModuleNotFoundError: No module named 'torch'", "No module named", "reinstall torch"),
    ],
)
def test_what_a_failed_import_means(monkeypatch, text, why, fix):
    monkeypatch.setattr(doctor, "cann_home", lambda: None)
    finding = explain_import(text)
    assert finding.state == "missing"
    assert why in finding.value
    assert fix in finding.fix


def test_cann_that_is_there_only_needs_sourcing(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "CANN", (tmp_path,))
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    (tmp_path / "version.cfg").write_text("# version: 1.0\nversion=9.1.0\n")
    assert explain_import(WITHOUT_CANN).fix.startswith(f"source {tmp_path / 'set_env.sh'}")
    (cann,) = (f for f in doctor.ascend() if f.name == "CANN")
    assert cann.value == f"9.1.0 in {tmp_path}"
    assert cann.fix == f"source {tmp_path / 'set_env.sh'}"


def test_this_machine_can_train_on_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "import_trouble", lambda: None)
    assert DoctorCommand().run() == 0
    text = capsys.readouterr().out
    assert "casc can train on: cpu" in text
    for part in ("machine", "packages", "device cpu"):
        assert f"\n{part}\n" in text


def test_nothing_can_train_where_a_needed_check_fails(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "import_trouble", lambda: None)

    def wrong(*_, **__):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(smoke, "weighted_row_sums", wrong)
    assert DoctorCommand(json=True).run() == 1
    report = json.loads(capsys.readouterr().out)
    assert report["usable"] == []
    (failed,) = (f for f in report["findings"] if f["state"] == "missing")
    assert failed["name"] == "weighted bags"
    assert "no kernel image" in failed["value"]


def test_torch_that_never_imports(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert DoctorCommand().run() == 1
    assert "casc can't train here: import: ModuleNotFoundError" in capsys.readouterr().out


def test_checks_find_wrong_results(monkeypatch):
    right = smoke.weighted_row_sums
    monkeypatch.setattr(smoke, "weighted_row_sums", lambda *a: right(*a) * 1.01)
    failed = [check.name for check in check_device(torch.device("cpu")) if not check.passed]
    assert failed == ["weighted bags"]


def test_a_compiler_that_does_not_work_is_a_note(monkeypatch, tmp_path):
    monkeypatch.setenv("CASC_CACHE", str(tmp_path))
    faults = {"inductor": "InvalidCxxCompiler: none", "aot_eager": ""}
    monkeypatch.setattr(compilers, "find_fault", lambda compiler, device: faults[compiler.name])
    (check,) = (c for c in check_device(torch.device("cpu")) if c.name == "compiler")
    assert not check.passed
    assert not check.needed
    assert check.found == "aot_eager; inductor doesn't work: InvalidCxxCompiler: none"
    assert "g++" in check.fix
    faults["inductor"] = ""
    (check,) = (c for c in check_device(torch.device("cpu")) if c.name == "compiler")
    assert check.passed


def test_the_report_marks_and_mends():
    findings = [Finding("a", "x", "1"), Finding("a", "y", "2", "missing", "do this")]
    text = "\n".join(lines(findings, []))
    assert "    x " in text
    assert "  x y " in text
    assert "-> do this" in text
    assert text.endswith("casc can't train here: y: 2")


def test_examining_needs_no_torch():
    """Else it couldn't explain why torch can't be imported."""
    code = "import casc.cli.doctor, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert examine.__module__ == "casc.cli.doctor"
