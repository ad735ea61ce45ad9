"""`casc doctor`: what this machine has, what works on it, and how to mend what doesn't.

torch imports the packages of other devices by itself, and fails if one of them does. So
nothing here imports torch before it is known that it can be imported.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Literal, NamedTuple

from casc.printing import say

State = Literal["ok", "note", "missing"]
PACKAGES = ("casc", "torch", "torchvision", "torch-npu", "triton", "triton-ascend", "pycocotools")
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
# Where Ascend's software lies unless the environment says otherwise.
CANN = (Path("/usr/local/Ascend/cann"), Path("/usr/local/Ascend/ascend-toolkit/latest"))
DRIVER = Path("/usr/local/Ascend/driver")


class Finding(NamedTuple):
    """One line of the report."""

    part: str
    name: str
    value: str
    state: State = "ok"
    fix: str = ""


@dataclass(frozen=True)
class DoctorCommand:
    """Say what this machine has, what works on it, and how to mend what doesn't.

    Exits with 0 if casc can train on some device here, else with 1.

    Examples: `casc doctor`; `casc doctor --json`.
    """

    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> int:
        """Examine; 1 if casc can't train on any device."""
        findings, usable = examine()
        if self.json:
            report = {"usable": usable, "findings": [f._asdict() for f in findings]}
            say(json.dumps(report, indent=1))
        else:
            say("\n".join(lines(findings, usable)))
        return 0 if usable else 1


def examine() -> tuple[list[Finding], list[str]]:
    """Everything found, and the devices on which casc can train."""
    findings = [*machine(), *packages(), *ascend(), *nvidia()]
    trouble = import_trouble()
    if trouble is not None:
        findings.append(explain_import(trouble))
        # Without the devices' packages torch may do for the CPU.
        os.environ[AUTOLOAD] = "0"
    try:
        import torch  # noqa: F401
    except Exception as error:
        if trouble is None:
            findings.append(explain_import(f"{type(error).__name__}: {error}"))
        return findings, []
    more, usable = devices()
    return findings + more, usable


def lines(findings: list[Finding], usable: list[str]) -> Iterator[str]:
    """The report as text."""
    part = ""
    for finding in findings:
        if finding.part != part:
            part = finding.part
            yield f"\n{part}" if part else ""
        mark = {"ok": " ", "note": "!", "missing": "x"}[finding.state]
        yield f"  {mark} {finding.name:<24} {finding.value}"
        if finding.fix:
            yield f"    {'':<24} -> {finding.fix}"
    yield ""
    if usable:
        yield f"casc can train on: {', '.join(usable)}"
    else:
        first = next((f for f in findings if f.state == "missing"), None)
        why = f": {first.name}: {first.value}" if first else ""
        yield f"casc can't train here{why}"


def machine() -> Iterator[Finding]:
    """Python, system, processor, memory."""
    part = "machine"
    yield Finding(part, "python", f"{platform.python_version()} ({sys.executable})")
    yield Finding(part, "system", platform.platform())
    facts = _read(Path("/proc/cpuinfo"))
    model = re.search(r"^model name\s*: (.*)$", facts, re.MULTILINE)
    yield Finding(part, "processor", model[1] if model else platform.machine())
    flags = set((re.search(r"^(?:flags|Features)\s*: (.*)$", facts, re.M) or ["", ""])[1].split())
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "sve")
    found = [flag for flag in known if flag in flags]
    yield Finding(part, "instructions", ", ".join(found) or "none of " + ", ".join(known))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(part, "processors", str(cores))
    memory = dict(re.findall(r"^(\w+): +(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE))
    if memory:
        total, free = (int(memory[key]) / 2**20 for key in ("MemTotal", "MemAvailable"))
        yield Finding(part, "memory", f"{total:.1f} GiB, {free:.1f} available")
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total / 2**30
        small = size < 1
        yield Finding(
            part, "/dev/shm", f"{size:.2f} GiB", "note" if small else "ok",
            "batches of loading workers pass through it: start the container with"
            " --shm-size 8g, or train with --loading.workers 0" if small else "",
        )  # fmt: skip


def packages() -> Iterator[Finding]:
    """Versions of what casc stands on."""
    for name in PACKAGES:
        try:
            yield Finding("packages", name, version(name))
        except PackageNotFoundError:
            needed = name in ("torch", "torchvision", "pycocotools")
            if needed:
                yield Finding("packages", name, "not installed", "missing", "pip install casc")
    try:
        if version("torch-npu").split("+")[0] != version("torch").split("+")[0]:
            fix = "torch-npu is built against one exact torch: pip install 'casc[npu]'"
            yield Finding("packages", "torch and torch-npu", "versions differ", "note", fix)
    except PackageNotFoundError:
        pass


def ascend() -> Iterator[Finding]:
    """Ascend's driver, CANN and cards, where there is anything of them."""
    cards = sorted(Path("/dev").glob("davinci[0-9]*"))
    home = cann_home()
    driver = _version_in(DRIVER / "version.info")
    if not (cards or home or driver or _installed("torch-npu")):
        return
    part = "ascend"
    yield Finding(part, "cards", ", ".join(map(str, cards)) or "no /dev/davinci*",
                  "ok" if cards else "note",
                  "" if cards else "install the driver; in a container pass the cards:"
                  " --device /dev/davinci0 --device /dev/davinci_manager ...")  # fmt: skip
    yield Finding(part, "driver", driver or f"not found in {DRIVER}", "ok" if driver else "note")
    if home is None:
        yield Finding(part, "CANN", "not found", "note", "install CANN (docs/npu.md)")
    else:
        found = next((v for f in home.rglob("version.*") if (v := _version_in(f))), "version?")
        sourced = "ASCEND_HOME_PATH" in os.environ or "ASCEND_TOOLKIT_HOME" in os.environ
        yield Finding(part, "CANN", f"{found} in {home}", "ok" if sourced else "note",
                      "" if sourced else f"source {home / 'set_env.sh'}")  # fmt: skip


def cann_home() -> Path | None:
    """Where CANN is, by the environment or in its usual places."""
    toolkit = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    places = (Path(toolkit), *CANN) if toolkit else CANN
    return next((place for place in places if place.is_dir()), None)


def nvidia() -> Iterator[Finding]:
    """NVIDIA's driver, where there is one."""
    text = _read(Path("/proc/driver/nvidia/version"))
    if text:
        yield Finding("nvidia", "driver", text.splitlines()[0].partition("version:")[2].strip())


def import_trouble() -> str | None:
    """What importing torch with the packages of other devices says when it fails.

    In a process of its own, since an import that failed can't be tried again. None if it
    works, or if there are no such packages.
    """
    if not _backends():
        return None
    done = subprocess.run(
        [sys.executable, "-c", "import torch"], capture_output=True, text=True, check=False
    )
    return None if done.returncode == 0 else done.stderr.strip() or f"status {done.returncode}"


def _backends() -> list[str]:
    return [entry.name for entry in entry_points(group="torch.backends")]


def explain_import(trouble: str) -> Finding:
    """What a failed import of torch means, and its mend."""
    loaded = re.search(r"Failed to load the backend extension: (\w+)", trouble)
    culprit = loaded[1] if loaded else ", ".join(_backends()) or "torch"
    library = re.search(r"(lib(?:hccl|ascend\w*|acl\w*|ge_\w*)\S*\.so\S*): cannot open", trouble)
    without = f"; or, to train on the CPU, export {AUTOLOAD}=0"
    home = cann_home()
    if library and home:
        fix = f"source {home / 'set_env.sh'}{without}"
        why = f"{culprit} doesn't find CANN's {library[1]}: CANN's environment isn't set"
    elif library:
        why = f"{culprit} doesn't find {library[1]}, a library of CANN, which isn't installed"
        fix = f"install CANN and source its set_env.sh (docs/npu.md){without}"
    elif "Two accelerators" in trouble or "Duplicated key" in trouble:
        # Refused where that device is there; else the process aborts, as both name settings alike.
        why = f"this torch{_build()} is built for another device than {culprit}"
        fix = f"install torch's CPU build of the same version (docs/npu.md){without}"
    elif "undefined symbol" in trouble:
        why = f"{culprit} was built against another torch: {_last(trouble)}"
        fix = f"pip install 'casc[npu]' in a fresh environment{without}"
    else:
        why = _last(trouble)
        fix = f"mend or uninstall {culprit}{without}" if loaded else "reinstall torch"
    return Finding("torch", "import", why, "missing", fix)


def _build() -> str:
    """The installed torch's version, which ends in what it is built for."""
    try:
        return f" ({version('torch')})"
    except PackageNotFoundError:
        return ""


def devices() -> tuple[list[Finding], list[str]]:
    """What torch finds and what works there; the kinds of devices that can train."""
    import torch

    from casc.cli.device_checks import check_device
    from casc.device.devices import TRAITS, choose_device, traits
    from casc.train.environment import environment

    findings = [
        Finding("torch", "import", f"{torch.__version__}, {torch.get_num_threads()} threads")
    ]
    places = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        count = torch.accelerator.device_count()
        if kind is not None and kind.type in TRAITS:
            places.append(choose_device(kind.type))
            findings.append(Finding("torch", "accelerator", f"{count} x {kind.type}"))
        else:
            findings.append(
                Finding("torch", "accelerator", f"{kind}: casc doesn't know it", "note")
            )
    else:
        findings.append(Finding("torch", "accelerator", "none found", "note"))
    usable = []
    for place in places:
        part = f"device {place.type}"
        findings.append(Finding(part, "name", str(environment(place)["device"])))
        checks = check_device(place)
        for check in checks:
            state: State = "ok" if check.passed else "missing" if check.needed else "note"
            findings.append(
                Finding(part, check.name, check.found, state, "" if check.passed else check.fix)
            )
        if all(check.passed or not check.needed for check in checks):
            usable.append(place.type)
        row = traits(place)
        for setting in row.environment:
            now = os.environ.get(setting.name)
            text = (
                f"{now if now is not None else 'not set'} (suits: {setting.value}; {setting.why})"
            )
            findings.append(Finding(part, setting.name, text))
        findings += [Finding(part, "not supported", text) for text in row.unsupported]
    return findings, usable


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _version_in(file: Path) -> str | None:
    found = re.search(r"^\s*[Vv]ersion\s*[=:]\s*(\S+)", _read(file), re.MULTILINE)
    return found[1] if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _last(text: str) -> str:
    return text.strip().splitlines()[-1]
