"""Printing what isn't ours: names, addresses and answers that come from files and servers.

A terminal obeys what it is sent, and what is printed is kept and published. So control and
direction characters are shown as escapes, and what an address has of secrets is left out.
"""

import re
import sys
from typing import Any, TextIO

REDACTED = "[redacted]"

# C0, C1; invisible and direction characters; line separators; halves of characters; tags.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_ADDRESS = r"\b[A-Za-z][A-Za-z0-9+.-]*:/{1,2}"
_CREDENTIALS = re.compile(rf"({_ADDRESS})[^\s/?#'\"<>]*@")
# What ends a sentence after an address isn't part of it.
_QUERY = re.compile(rf"({_ADDRESS}[^\s?'\"<>]*\?)[^\s'\"<>]*?(?=[:;,.)]*(?:[\s'\"<>]|$))")


def redacted(text: str) -> str:
    """A text in which addresses have neither user, password nor query.

    A query may be a signature, which opens a private file to whoever reads it.
    """
    if ":/" not in text:
        return text
    return _QUERY.sub(rf"\1{REDACTED}", _CREDENTIALS.sub(rf"\1{REDACTED}@", text))


def plain(value: object, *, lines: bool = False) -> str:
    """A text that a terminal or a page shows as it is, `redacted`, on one line.

    Args:
        value: anything, as `str` has it.
        lines: leave ends of lines, and tabs, as they are.
    """
    text = str(value)
    # Most texts are as they have to be.
    if text.isascii() and text.isprintable():
        return redacted(text)
    return redacted(_UNSAFE.sub(lambda found: _escape(found[0], lines), text))


def plain_json(value: Any) -> Any:
    """A JSON value with `plain` texts and keys."""
    if isinstance(value, dict):
        return {plain(key): plain_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(entry) for entry in value]
    return plain(value, lines=True) if isinstance(value, str) else value


def say(value: object, file: TextIO | None = None) -> None:
    """Print a text of one or more lines, `plain`, whatever the output's encoding.

    Args:
        value: the text.
        file: by default stdout.
    """
    file = sys.stdout if file is None else file
    text, encoding = plain(value, lines=True), getattr(file, "encoding", None) or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    print(text, file=file, flush=True)


def _escape(character: str, lines: bool) -> str:
    if lines and character in "\n\t":
        return character
    number = ord(character)
    if number < 256:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 2**16 else f"\\U{number:08x}"
