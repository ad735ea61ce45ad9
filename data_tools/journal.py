"""The journal of a run: what is done already, so that an interrupted run can be taken up.

It lies beside the shards while they are made, one JSON a line, and is removed with the last.
"""

import json
from pathlib import Path
from typing import Any, TextIO

from data_tools.images import Probe
from data_tools.report import Finding
from data_tools.write import ShardResult

FOLDER = ".unfinished"

# Lines of another form are passed over, so its number goes up with every change of form.
_PROBE, _SHARD = "probe 2", "shard 2"


class Journal:
    """Probes and finished shards of one split."""

    def __init__(self, folder: Path, split: str) -> None:
        self._path = folder / FOLDER / f"{split}.jsonl"
        self._stream: TextIO | None = None
        self._probes: dict[str, tuple[list[int], Probe]] = {}
        self._shards: dict[str, tuple[str, ShardResult]] = {}
        for kind, name, stamp, values in _lines(self._path):
            if len(values) != len((Probe if kind == _PROBE else ShardResult)._fields):
                continue  # of another version
            if kind == _PROBE:
                self._probes[name] = stamp, Probe(*values[:-1], traits=tuple(values[-1]))
            elif kind == _SHARD:
                findings = [Finding(*finding) for finding in values[-1]]
                self._shards[name] = stamp, ShardResult(*values[:-1], findings=findings)

    def probe(self, name: str, stamp: list[int]) -> Probe | None:
        """The probe of an image file, if the file has still that stamp (size, time)."""
        known = self._probes.get(name)
        return known[1] if known is not None and known[0] == stamp else None

    def shard(self, name: str, plan: str) -> ShardResult | None:
        """What became of a shard, if it followed the same plan."""
        known = self._shards.get(name)
        return known[1] if known is not None and known[0] == plan else None

    def add_probe(self, name: str, stamp: list[int], probe: Probe) -> None:
        """Record that an image was probed; kept once `flush` was called."""
        self._add([_PROBE, name, stamp, list(probe)])

    def add_shard(self, name: str, plan: str, result: ShardResult) -> None:
        """Record that a shard is finished."""
        self._add([_SHARD, name, plan, list(result)])
        self.flush()

    def flush(self) -> None:
        """Hand what is recorded to the system, where it outlives this process."""
        if self._stream is not None:
            self._stream.flush()

    def close(self) -> None:
        """Close the file; the journal stays."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def remove(self) -> None:
        """Remove the journal, as everything is done."""
        self.close()
        self._path.unlink(missing_ok=True)
        if self._path.parent.is_dir() and not any(self._path.parent.iterdir()):
            self._path.parent.rmdir()

    def _add(self, line: list[Any]) -> None:
        if self._stream is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._path.open("a", encoding="utf-8")
            if self._stream.tell():
                self._stream.write("\n")  # the last line may be torn
        self._stream.write(json.dumps(line) + "\n")


def _lines(path: Path) -> list[list[Any]]:
    if not path.is_file():
        return []
    lines: list[list[Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            if isinstance(line, list) and len(line) == 4:
                lines.append(line)
        except ValueError:
            continue  # torn where the run was interrupted
    return lines
