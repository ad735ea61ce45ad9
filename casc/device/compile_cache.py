"""Compiled functions that outlast the process: where they are kept, and how they come back.

Whole compiled functions are kept, guards included: they come back without being traced. The
folder also is Inductor's, for what can't be kept this way. A change of casc's own sources
makes other functions of them, and these are compiled anew, without help from that cache.

Both may be shared by any number of processes: files appear under their names only when
they are whole. The folder may be deleted at any time.
"""

import hashlib
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

import casc
from casc.device.versions import compile_apart
from casc.errors import UserError

_INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
_VARIANTS = 8
_log = logging.getLogger(__name__)


def cache_folder(setting: Path | None = None) -> Path:
    """Where compiled code is kept for this torch on this kind of processor.

    Args:
        setting: the folder for all of them; by default `compile` under $CASC_CACHE, or else
            under casc in $XDG_CACHE_HOME or ~/.cache.
    """
    if setting is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "casc"
        setting = Path(os.environ.get("CASC_CACHE") or home) / "compile"
    return setting.absolute() / f"torch-{torch.__version__}-{_machine()}"


def use_cache(setting: Path | None = None) -> Path:
    """Let Inductor keep its caches in `cache_folder`, from the next compilation on.

    A folder that the user chose by TORCHINDUCTOR_CACHE_DIR stays Inductor's.

    Programs in the folder are run, so it has to be this user's alone.

    Returns:
        The folder for `aot_cached`.

    Raises:
        UserError: the folder can't be made, or others may write to it.
    """
    folder = cache_folder(setting)
    flag, mend = "--compile-cache", "choose another folder"
    if setting is None:  # and most commands have no such flag
        flag, mend = "compile cache", "set CASC_CACHE to another folder"
    try:
        for place in (folder.parent, folder, folder / "programs", folder / "inductor"):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if fault := _not_mine(place):
                raise UserError(
                    f"{flag} {place}: {fault}, so it could hold programs of someone"
                    f" else's; delete it, or {mend} that only you may write to"
                )
    except OSError as error:
        raise UserError(f"{flag} {folder}: can't be written ({error}); {mend}") from None
    # Importing Dynamo already fills the variable in, with the default. Inductor reads it
    # whenever it looks for its folder, and so do the processes that it starts.
    if os.environ.get(_INDUCTOR, default := default_cache_dir()) == default:
        os.environ[_INDUCTOR] = str(folder / "inductor")
    extend_cache_key()
    return folder / "programs"


def extend_cache_key() -> None:
    """Make the gradients of casc's own operators part of every key of torch's caches.

    torch keeps the backward graph under a key made of the forward graph, in which such an
    operator is just a name: it would go on using a gradient formula that has changed.
    """
    tag = f"casc-{_operators()}"
    if tag not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag += tag


def aot_cached(
    function: Callable,
    folder: Path,
    *settings: Any,
    rows: Callable[..., Iterable[Tensor]] | None = None,
    recompile_limit: int | None = None,
    options: dict[str, Any] | None = None,
) -> Callable:
    """Compile a function as one graph, once for each kind of arguments, for good.

    What is found in the folder is loaded in a second or so. What isn't is compiled,
    backward included, at the first call that needs it. Where torch can't keep a function
    it is compiled for this process alone, and a warning says why.

    Args:
        function: pure, of tensors in dicts, lists and tuples, and of plain values.
        folder: from `use_cache`.
        settings: all that the function closes over, as values whose `repr` says everything;
            casc's sources, torch's version and its compiler's settings are added here.
        rows: gives those of the arguments whose first dimension may be of any size; all other
            sizes are fixed.
        recompile_limit: as of `torch.compile`, where the function can't be kept.
        options: as of `torch.compile`.

    Returns:
        The function, compiled when it is called.
    """
    with torch._dynamo.config.patch(enable_aot_compile=True):
        compiled = compile_apart(
            function,
            dynamic=None if rows else False,
            recompile_limit=recompile_limit,
            options=options,
        )
    programs: list[Any] = []
    refused = False

    def call(*args: Any) -> Any:
        nonlocal refused
        # A check of the guards takes some 20 microseconds.
        for program in programs:
            if program.guard_check(*args):
                return program(*args)
        free = list(rows(*args)) if rows else []
        if not refused:
            name = f"{function.__name__}-{_key(settings, free, args)}"
            program = _find(compiled, free, folder, name, args)
            if program is not None:
                programs.append(program)
                return program(*args)
            refused = True
        _mark(free)
        return compiled(*args)

    return call


def _find(compiled: Any, free: list[Tensor], folder: Path, name: str, args: tuple) -> Any:
    """The program of this name that takes these arguments, from disk or else made."""
    # More than one where guards say more than the key, about sizes that differ for instance.
    for number in range(_VARIANTS):
        path = folder / f"{name}-{number}.program"
        program = _load(path)
        if program is None:
            return _make(compiled, free, path, args)
        if program.guard_check(*args):
            return program
    return None


def _load(path: Path) -> Any:
    """The program in a file; None if there is no such file, or it is damaged or not ours."""
    if not path.exists():
        return None
    if fault := _not_mine(path):
        _log.warning("%s: %s, so it isn't run but compiled again; delete it", path, fault)
        return None
    try:
        with path.open("rb") as file:
            return torch.compiler.load_compiled_function(file)
    except Exception as error:
        _log.warning("%s: can't be loaded (%s), so it is compiled again", path, error)
        return None


def _make(compiled: Any, free: list[Tensor], path: Path, args: tuple) -> Any:
    """Compile for these arguments and save; None where torch can't do it this way."""
    # Only here: a program that was loaded refuses arguments that are marked.
    _mark(free)
    try:
        with warnings.catch_warnings():
            # torch looks at the .grad of all arguments when it writes the guards down.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            program = compiled.aot_compile((args, {}))
    except Exception as error:
        # If it's the function that is at fault, compiling as usual will say so.
        _log.warning("%s: can't be kept (%s), so every run compiles it", path, error)
        return None
    try:
        program.save_compiled_function(str(path))
        path.chmod(0o600)  # whatever the umask is
    except Exception as error:
        _log.warning("%s: can't be saved (%s), so the next run compiles it again", path, error)
    return program


def _not_mine(path: Path) -> str:
    """Why somebody else could have written a file or folder; empty if nobody else could."""
    if os.name != "posix":
        return ""
    found = path.stat()
    if found.st_uid != os.getuid():
        return f"belongs to user {found.st_uid}, not to {os.getuid()}"
    return "others may write to it" if found.st_mode & 0o022 else ""


def _mark(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0)


def _key(settings: tuple, free: list[Tensor], args: tuple) -> str:
    import torch._functorch.config
    import torch._inductor.config

    # Dynamo's hash is another one in every process; its settings are guarded where they matter.
    configs = (torch._functorch.config, torch._inductor.config, torch.compiler.config)
    parts = (
        settings,
        [_describe(arg, {id(tensor) for tensor in free}) for arg in args],
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        # Without what names folders of this machine: Inductor has a path made from the current one.
        [sorted(config.save_config_portable().items()) for config in configs],
        _sources(),
        # Its networks are part of what is compiled.
        getattr(sys.modules.get("timm"), "__version__", None),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _describe(value: Any, free: set[int]) -> Any:
    if isinstance(value, Tensor):
        kind = (value.dtype, value.device, value.requires_grad)
        if id(value) in free:
            return ("any", value.shape[1:], *kind)
        return (value.shape, value.stride(), *kind)
    if isinstance(value, dict):
        return [(key, _describe(entry, free)) for key, entry in value.items()]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *(_describe(entry, free) for entry in value)]
    return repr(value)


def _digest(files: list[Path]) -> str:
    made = hashlib.sha256()
    for file in files:
        made.update(file.read_bytes())
    return made.hexdigest()[:12]


@cache
def _sources() -> str:
    here = Path(casc.__file__).parent
    # What no step ever imports may change without anything being compiled again.
    others = {"bench", "checkpoints", "cli", "draw", "evaluate", "export", "report", "verify"}
    files = [f for f in sorted(here.rglob("*.py")) if f.relative_to(here).parts[0] not in others]
    return _digest(files)


@cache
def _operators() -> str:
    here = Path(__file__)
    files = [f for f in sorted(Path(casc.__file__).parent.rglob("*.py")) if f != here]
    return _digest([file for file in files if b".register_autograd(" in file.read_bytes()])


@cache
def _machine() -> str:
    """A home folder may be shared by machines with other processors or accelerators."""
    name = ""
    if torch.accelerator.is_available():
        module = torch.get_device_module()
        name = getattr(module, "get_device_name", lambda: module.__name__)()
    facts = (
        sys.version_info[:2],
        platform.machine(),
        sorted(torch.cpu.get_capabilities().items()),
        name,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:8]
