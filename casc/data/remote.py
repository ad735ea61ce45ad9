"""Files wherever they lie: in folders, on http(s) servers, in whatever fsspec opens.

webdataset reads URLs through a pipe from curl, and fsspec's own http files start anew where
a connection breaks. Runs that last for weeks need more: what is read here goes on at its byte
after a broken or stalled connection, and ends with an error when that doesn't help.
"""

import io
import math
import os
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

from casc.data.connections import (
    PIPE,
    Connection,
    RefusedError,
    open_fsspec,
    open_http,
    run_command,
)
from casc.data.loader_config import RemoteConfig
from casc.data.status import OPENING, READING, RETRYING, Status, warn_on_stderr
from casc.errors import TransientError, UserError
from casc.json_files import MOST_BYTES
from casc.printing import REDACTED

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_LONGEST_WAIT = 60.0
_PROGRESS = 10.0
REPAIR = (
    "it is damaged, or not of this index: copy it again from where it was made, or make the"
    " shards again with `data_tools shard`"
)


class FetchError(TransientError):
    """A file can't be had from where it is said to lie."""


def location(root: str | os.PathLike[str]) -> str:
    """The folder or URL as text, a `file:` URL as its folder.

    Paths hold URLs too; they make one slash of two after the scheme, which is undone here.

    Raises:
        UserError: a command, given as a path, that has lost slashes so; or as `check_address`.
    """
    text = os.fspath(root)
    if text.startswith(PIPE):
        if isinstance(root, os.PathLike) and _SCHEME.search(text, len(PIPE)):
            raise UserError(
                f"{text}: a URL in a command loses a slash here; put the command into a script,"
                " as in pipe:./fetch.sh"
            )
        return text
    if match := _SCHEME.match(text):
        scheme, rest = text[: match.end() - 1], text[match.end() :]
        text = f"{scheme}//{rest.removeprefix('/')}"
        if scheme.lower() == "file:":
            text = url2pathname(urlsplit(text if rest.startswith("/") else f"file:///{rest}").path)
        else:
            check_address(text)
    return text


def check_address(url: str) -> None:
    """Refuse a URL that has no host or has a password in it, and one whose signature is left out.

    What stands in an address is kept wherever it goes: by the shell, by proxies, in messages.

    Raises:
        UserError: naming another way.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UserError(f"{url}: isn't a URL ({error})") from None
    user, at, _ = parts.netloc.rpartition("@")
    web = parts.scheme.lower() in ("http", "https")
    if web and not parts.hostname:
        raise UserError(f"{url}: names no host")
    if REDACTED in url:
        raise UserError(f"{url}: its signature isn't stored with a run; give the whole URL again")
    if at and (web or ":" in user):
        mend = (
            "leave it out, and name the machine, login and password in ~/.netrc"
            if web
            else "leave it out, and set the storage's own environment variables (such as"
            " AWS_ACCESS_KEY_ID), or fsspec's configuration in ~/.config/fsspec"
        )
        raise UserError(f"{url}: has a user or password in it; {mend}")


def is_local(place: str) -> bool:
    """Whether this is a path of a file system, not a URL or a command."""
    return not place.startswith(PIPE) and "://" not in place


def join(root: str, name: str) -> str:
    """The place of a file in a folder or under a URL; `{}` in a command stands for its name."""
    if root.startswith(PIPE):
        quoted = shlex.quote(name)
        return root.replace("{}", quoted) if "{}" in root else f"{root.rstrip('/')}/{quoted}"
    if is_local(root):
        return str(Path(root) / name)
    head, mark, query = root.partition("?")
    if urlsplit(root).scheme in ("http", "https"):
        name = quote(name)
        return f"{head.rstrip('/')}/{name}{mark}{query}"
    return f"{root.rstrip('/')}/{name}"


def open_remote(
    place: str,
    size: int | None,
    loading: RemoteConfig,
    status: Status | None = None,
    start: int = 0,
) -> io.BufferedReader:
    """Open a URL or command to be read front to back.

    Args:
        place: as `join` gives it.
        size: bytes that it must have; None where that isn't known.
        loading: retries, time-outs, and whether commands may run.
        status: is told what is being done.
        start: first byte to read.

    Raises:
        UserError: it is a command, and those aren't allowed. Reading raises UserError when
            the file isn't there, has another size, or retries don't help.
    """
    _check_allowed(place, loading)
    raw = Resuming(place, size, _connector(place, loading), loading, status or Status(), start)
    return io.BufferedReader(raw, 2**20)


def read_remote(place: str, loading: RemoteConfig) -> bytes:
    """All of a small file, such as the index; on stderr, what goes wrong and how far it is.

    Raises:
        UserError: as `open_remote` and its reading; or it is larger than `MOST_BYTES`, or takes
            longer than `loading.deadline`.
    """
    status, data, said = _Loud(), bytearray(), time.monotonic()
    raw = Resuming(place, None, _connector(place, loading), loading, status)
    raw.until = time.monotonic() + loading.deadline
    with raw:
        _check_allowed(place, loading)
        block = memoryview(bytearray(2**20))
        while count := raw.readinto(block):
            data += block[:count]
            if len(data) > MOST_BYTES or (raw.size or 0) > MOST_BYTES:
                raise UserError(
                    f"{place}: is larger than {MOST_BYTES:,} bytes, which no such file of ours is;"
                    " --data must name the folder that `data_tools shard` made"
                )
            if time.monotonic() - said >= _PROGRESS:
                said = time.monotonic()
                of = f" of {raw.size:,}" if raw.size else ""
                status.note(f"{place}: still being read, {len(data):,} bytes{of} so far")
    return bytes(data)


def _check_allowed(place: str, loading: RemoteConfig) -> None:
    if place.startswith(PIPE) and not loading.allow_commands:
        raise UserError(
            f"{place}: this would run a command in a shell; if you trust it,"
            " add --loading.allow-commands"
        )


class _Loud(Status):
    """Nobody asks for the notes of what is read before there are workers."""

    def note(self, text: str) -> None:
        warn_on_stderr(text)


class Resuming(io.RawIOBase):
    """A file that goes on where it was when its connection breaks or stalls."""

    def __init__(
        self,
        place: str,
        size: int | None,
        connect: Callable[[int], Connection],
        loading: RemoteConfig,
        status: Status,
        start: int = 0,
    ) -> None:
        self.place, self.size, self.loading, self.status = place, size, loading, status
        self.at = start
        self.until = math.inf
        """When, by `time.monotonic`, all of it has to have been read."""
        self._connect = connect
        self._connection: Connection | None = None
        self._failures = 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Read what there is, 0 bytes at the end."""
        while True:
            wanted = len(buffer)
            if self.size is not None:
                wanted = min(wanted, self.size - self.at)
            if not wanted:
                return 0
            self._check_time(0.0)
            try:
                data = self._open().read(wanted)
                if not data and self.size is not None:
                    raise ConnectionError("the connection was closed too early")
            except RefusedError as error:
                raise FetchError(f"{self.place}: {error}") from None
            except Exception as error:  # other libraries' connections raise what they like
                self._fail(error)
                continue
            self._failures = 0
            self.at += len(data)
            buffer[: len(data)] = data
            self.status.set(READING, byte=self.at)
            return len(data)

    def close(self) -> None:
        """Close the connection."""
        self._disconnect()
        super().close()

    def _open(self) -> Connection:
        if self._connection is None:
            self.status.set(OPENING, byte=self.at)
            connection = self._connection = self._connect(self.at)
            if self.size is None:
                self.size = connection.total
            elif connection.total not in (None, self.size):
                raise RefusedError(
                    f"is {connection.total} bytes, the index says {self.size}; {REPAIR}"
                )
            behind = self.at - connection.at
            while behind:  # the other end can't begin in the middle
                skipped = len(connection.read(min(behind, 2**20)))
                if not skipped:
                    raise ConnectionError("the connection was closed too early")
                behind -= skipped
                self.status.set(OPENING, byte=self.at)
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except Exception:  # it is of no use any more
                return

    def _fail(self, error: Exception) -> None:
        """Wait before the next try, or give up."""
        self._disconnect()
        loading = self.loading
        where = f"at byte {self.at:,}" + (f" of {self.size:,}" if self.size is not None else "")
        if self._failures >= loading.retries:
            raise FetchError(
                f"{self.place}: {_reason(error)} {where}; gave up after {self._failures} retries;"
                " mend the server or the network, or raise --loading.retries or --loading.timeout"
            ) from None
        # Workers of many ranks lose a server at the same moment; they shouldn't all come back
        # at the same moment too.
        spread = 1 + os.getpid() % 16 / 16
        wait = min(loading.backoff * 2**self._failures * spread, _LONGEST_WAIT)
        wait = max(wait, min(getattr(error, "retry_after", 0.0), _LONGEST_WAIT))
        self._check_time(wait)
        self._failures += 1
        self.status.set(RETRYING, byte=self.at)
        self.status.note(
            f"{self.place}: {_reason(error)} {where};"
            f" retry {self._failures} of {loading.retries} in {wait:.1f} s"
        )
        time.sleep(wait)

    def _check_time(self, ahead: float) -> None:
        if time.monotonic() + ahead > self.until:
            raise FetchError(
                f"{self.place}: only {self.at:,} bytes came in --loading.deadline"
                f" {self.loading.deadline:g} seconds; mend the server or the network, or raise it"
            )


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no bytes came in time"
    return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__


def _connector(place: str, loading: RemoteConfig) -> Callable[[int], Connection]:
    if place.startswith(PIPE):
        return lambda at: run_command(place, loading.timeout)
    if urlsplit(place).scheme in ("http", "https"):
        return lambda at: open_http(place, at, loading.timeout)
    return lambda at: open_fsspec(place, at, loading.timeout)
