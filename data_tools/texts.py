"""Texts as people have them: some tools on Windows write UTF-16, or a mark before UTF-8."""

import json
import re

from casc.errors import UserError


class BrokenFileError(UserError):
    """A file of one image's annotations is empty or broken off; those of others may be whole."""


def decode(data: bytes, errors: str = "strict") -> str:
    """Decode UTF-8, UTF-16 or UTF-32, with a byte order mark or without.

    Args:
        data: of a text that begins with a character of ASCII's.
        errors: what is done about other bytes, as `bytes.decode` has it.

    Raises:
        UnicodeDecodeError: when it is none of these, by default.
    """
    return data.decode(json.detect_encoding(data), errors)


def searchable(data: bytes) -> str:
    """Make a text, or its beginning, one that ASCII is found in; the rest may be mangled."""
    return data.replace(b"\0", b"").decode("utf-8", "replace")


def is_cut(error: Exception) -> bool:
    """Whether it was the end of a text that couldn't be decoded, as where writing broke off."""
    return isinstance(error, UnicodeDecodeError) and bool(
        re.search("end of data|truncated|incomplete", error.reason)
    )
