"""Ways to open a file somewhere else at one of its bytes: http(s), fsspec, a command.

Each raises what it likes when a connection breaks; `casc.data.remote` tries again.
"""

import base64
import http.client
import netrc
import os
import queue
import re
import select
import ssl
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

PIPE = "pipe:"
_MAY_PASS = {408, 425, 429, 500, 502, 503, 504}
"""Statuses that may go away by themselves."""
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class Connection(NamedTuple):
    """An open file at the other end."""

    read: Callable[[int], bytes]
    """At most so many bytes, b"" at the end; raises OSError when none come."""
    close: Callable[[], object]
    at: int
    """Where reading begins; mostly what was asked for."""
    total: int | None
    """The file's bytes, where the other end says so."""


class RefusedError(Exception):
    """What trying again won't change. The message is for users."""


class HttpError(OSError):
    """A status that may be another one next time."""

    def __init__(self, text: str, retry_after: float) -> None:
        super().__init__(text)
        self.retry_after = retry_after
        """Seconds that the server asks to be left alone for, or 0."""


def open_http(url: str, at: int, timeout: float) -> Connection:
    """Open a URL at a byte.

    Raises:
        RefusedError: the server answers that there is nothing to be had.
        OSError, http.client.HTTPException: it doesn't answer, or not now.
    """
    headers = {"User-Agent": "casc", "Accept-Encoding": "identity"}
    if at:
        headers["Range"] = f"bytes={at}-"
    try:
        request = urllib.request.Request(url, headers=headers)
        if login := _login(request.host):
            # Whoever the server points to doesn't get it.
            request.add_unredirected_header("Authorization", login)
        response: http.client.HTTPResponse = urllib.request.build_opener(_Redirects).open(
            request, timeout=timeout
        )
    except urllib.error.HTTPError as error:
        error.close()
        text = f"the server says {error.code} {error.reason}".rstrip()
        if error.code in _MAY_PASS:
            after = error.headers.get("Retry-After", "")
            raise HttpError(text, float(after) if after.isdigit() else 0.0) from None
        if error.code == 404:
            text += "; the shard is missing there, or --data names the wrong folder"
        raise RefusedError(text) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise RefusedError(f"the server's certificate isn't trusted ({error.reason})") from None
        if isinstance(error.reason, OSError):
            raise error.reason from None
        raise
    begins, total = 0, response.length
    if response.status == 206:
        match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != at:
            response.close()
            raise OSError("the server sent another part than was asked for")
        begins, total = at, None if match[2] == "*" else int(match[2])
    return Connection(response.read1, response.close, begins, total)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) only, and from https to https only."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str):
        before, after = (urllib.parse.urlsplit(u).scheme.lower() for u in (req.full_url, newurl))
        if after not in ("http", "https") or (before, after) == ("https", "http"):
            raise RefusedError(f"the server redirects from {before} to {after}: {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    # urllib itself refuses some schemes, and with another error.
    def http_error_302(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any) -> Any:
        said = headers.get("location", headers.get("uri", ""))
        fp.close()  # urllib reads all that comes with it, and leaves it open where it gives up
        try:
            target = urllib.parse.urljoin(req.full_url, said)
            if urllib.parse.urlsplit(target).scheme.lower() not in ("http", "https"):
                return self.redirect_request(req, fp, code, msg, headers, target)
            return super().http_error_302(req, fp, code, msg, headers)
        except ValueError:
            raise RefusedError(f"the server redirects to {said}, which is no address") from None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _login(host: str) -> str | None:
    """What ~/.netrc (or $NETRC) says for a host, as a header of HTTP."""
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return None
    found = hosts.get(host) or hosts.get(host.rpartition(":")[0] or host)
    if found is None:  # "default" is for no host in particular: it isn't sent to any
        return None
    return "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()


def open_fsspec(place: str, at: int, timeout: float) -> Connection:
    """Open a URL of fsspec's at a byte.

    Raises:
        RefusedError: there is nothing to be had, or a package is missing.
        Exception: whatever the file system raises when it doesn't answer.
    """
    import fsspec.core

    try:
        system, path = fsspec.core.url_to_fs(place)
    except ImportError as error:
        raise RefusedError(
            f"reading it needs a package that isn't installed ({error}); casc[remote] brings"
            " those for s3:// and gs://"
        ) from None
    except ValueError as error:
        raise RefusedError(f"fsspec doesn't know how to open it ({error})") from None
    try:
        stream: Any = within(timeout, lambda: system.open(path, "rb"))
        if at:
            stream.seek(at)
    except FileNotFoundError:
        raise RefusedError("not found") from None
    except PermissionError as error:
        raise RefusedError(f"not permitted ({error})") from None
    total = getattr(stream, "size", None)
    return Connection(
        read=lambda count: within(timeout, lambda: stream.read(count)),
        close=stream.close,
        at=at,
        total=total if isinstance(total, int) else None,
    )


def within(seconds: float, call: Callable[[], T]) -> T:
    """Call something that has no time-out of its own, and leave it behind when it is late."""
    box: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            box.put((call(), None))
        except BaseException as error:
            box.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = box.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return value  # pyright: ignore[reportReturnType]


def run_command(place: str, timeout: float) -> Connection:
    """Run a shell command and read what it prints.

    Reading raises OSError when it ends with another status than 0.
    """
    process = subprocess.Popen(
        place.removeprefix(PIPE), shell=True, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    pipe = process.stdout.fileno()

    def read(count: int) -> bytes:
        if not select.select([pipe], [], [], timeout)[0]:
            raise TimeoutError
        data = os.read(pipe, count)
        if not data and process.wait(timeout):
            raise OSError(f"the command ended with status {process.returncode}")
        return data

    def close() -> None:
        # Its whole session: a pipeline's parts would go on otherwise.
        if process.poll() is None:
            os.killpg(process.pid, 9)
        process.stdout.close()  # pyright: ignore[reportOptionalMemberAccess]
        process.wait()

    return Connection(read, close, at=0, total=None)
