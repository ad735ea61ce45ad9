"""The lists of a large JSON object, element by element: no more of it is held than one element."""

import codecs
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from casc.errors import UserError
from casc.json_files import open_plain

_CHUNK = 2**22
"""Bytes read at a time."""
_SPACE = " \t\n\r"


class JsonLists:
    """The lists under some keys of the JSON object in a file.

    Iterating gives `(key, element, its place)`, which is its first byte in the file and how many it
    has; the rest of the object is read and passed over.
    It's the standard library's decoder that reads each element, so what is JSON is what it says.
    """

    def __init__(self, path: Path, keys: Collection[str]) -> None:
        self._path, self._keys = path, keys
        self._decoder = json.JSONDecoder()
        self.others: dict[str, object] = {}
        """What lies under those keys where it isn't a list."""
        self.found: set[str] = set()
        """Those of the keys that are there."""
        self.stamp = 0, 0
        """Size in bytes and time of the last change in ns of what was read."""

    def __iter__(self) -> Iterator[tuple[str, Any, tuple[int, int]]]:
        """Give the elements in the file's order.

        Raises:
            ValueError: when it isn't JSON, or not in UTF-8.
            UserError: when one of the keys is there twice, of which JSON readers take the last.
            TypeError: when it isn't an object.
            OSError: when it can't be read.
        """
        with open_plain(self._path) as self._stream:
            about = os.fstat(self._stream.fileno())
            self.stamp = about.st_size, about.st_mtime_ns
            first = self._stream.read(len(codecs.BOM_UTF8))
            self._byte = len(first) if first == codecs.BOM_UTF8 else 0
            self._stream.seek(self._byte)
            self._utf8 = codecs.getincrementaldecoder("utf-8")()
            self._text, self._start, self._at, self._before, self._end = "", 0, 0, 0, False
            self._counted = 0
            if self._peek() != "{":
                self._value()
                raise TypeError("not an object")
            for _ in self._items("}"):
                key = self._value()
                if not isinstance(key, str):
                    raise self._error("expected a key")
                self._take(":")
                if key not in self._keys:
                    self._value()
                    continue
                if key in self.found:
                    raise UserError(
                        f"{self._path}: {key}: is there twice; keep the one that is meant"
                    )
                self.found.add(key)
                if self._peek() != "[":
                    self.others[key] = self._value()
                    continue
                for _ in self._items("]"):
                    value = self._value()
                    first = self._count_to(self._start)
                    yield key, value, (first, self._count_to(self._at) - first)
            if self._peek():
                raise self._error(
                    "more data behind the object; one object a line isn't COCO's format,"
                )

    def _items(self, end: str) -> Iterator[None]:
        """Stand before each item of an object or list, past which the caller reads."""
        self._at += 1
        if self._peek() == end:
            self._at += 1
            return
        while True:
            yield
            if self._peek() == end:
                self._at += 1
                return
            self._take(",")

    def _take(self, character: str) -> None:
        if self._peek() != character:
            raise self._error(f"expected {character!r}")
        self._at += 1

    def _peek(self) -> str:
        """The next character that isn't space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._more():
                    place = self._before + error.pos
                    raise ValueError(f"{error.msg} at character {place:,}") from None
                continue
            # What ends with the text, a number, may go on behind it.
            if end < len(self._text) or not self._more():
                self._start, self._at = self._at, end
                return value

    def _more(self) -> bool:
        """Read on; what was taken is dropped."""
        if self._end:
            return False
        self._count_to(self._at)
        kept = self._text[self._at :]
        self._before += self._at
        # An element that doesn't fit is read anew: twice as much then, so that it is so seldom.
        data = self._stream.read(max(_CHUNK, len(kept)))
        self._end = not data
        self._text, self._at = kept + self._utf8.decode(data, final=self._end), 0
        self._counted = 0
        return True

    def _count_to(self, at: int) -> int:
        """The file's byte at which a character begins; it isn't before the one asked for last."""
        between = self._counted, at
        ascii_ = self._text.isascii()
        self._byte += at - self._counted if ascii_ else len(self._text[slice(*between)].encode())
        self._counted = at
        return self._byte

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{message} at character {self._before + self._at:,}")
