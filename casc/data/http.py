"""Files on http(s) servers, from any byte on, by the standard library."""

import http.client
import re
import ssl
import urllib.error
import urllib.request

from casc.data.remote import Connection, RefusedError

_MAY_PASS = {408, 425, 429, 500, 502, 503, 504}
"""Statuses that may go away by themselves."""
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


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
        response: http.client.HTTPResponse = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=timeout
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
