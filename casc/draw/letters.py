"""Letters for names in any script: Pillow's own font, the same everywhere, has few."""

import functools
import unicodedata
from typing import Any

from PIL import ImageFont

# Common fonts of Linux, Windows and macOS, those of many scripts first; Pillow finds them by name.
_SYSTEM = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
    "NotoSansArabic-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "NotoSansThai-Regular.ttf",
    "NotoEmoji-Regular.ttf",
    "Symbola.ttf",
    "msyh.ttc",
    "YuGothR.ttc",
    "malgun.ttf",
    "seguisym.ttf",
    "seguiemj.ttf",
    "arial.ttf",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
)


@functools.cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own scalable font, so that pictures are alike on all machines."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


@functools.lru_cache(4096)
def set_in_type(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """Give a text on one line as it can be written, and the font for it.

    That is Pillow's own font; or the first of the system's common ones that has all the letters;
    or else the text is transliterated to ASCII, with the extra `letters`: 猫 is written Mao, and
    without it U+732B as Python has it.
    """
    text = " ".join(text.split())
    own = font_of(size)
    if _covers(own, text):
        return text, own
    for name in _SYSTEM:
        font = _system_font(name, size)
        if font is not None and _covers(font, text):
            return text, font
    plain = "".join(c for c in unicodedata.normalize("NFC", text) if not _silent(c))
    try:
        from anyascii import anyascii as ascii_of
    except ImportError:
        ascii_of = str
    # What isn't transliterated is written as its number.
    plain = "".join(ascii_of(c) or c for c in plain)
    return plain.encode("ascii", "backslashreplace").decode("ascii"), own


@functools.cache
def _system_font(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


def _covers(font: ImageFont.FreeTypeFont, text: str) -> bool:
    # Fonts draw one and the same sign for what they lack, such as this, which is no character.
    lacking = _shape(font, "\uffff")
    return all(_silent(c) or c.isspace() or _shape(font, c) != lacking for c in text)


def _silent(character: str) -> bool:
    """Whether it only changes its neighbours: joiners and variants, as in emoji."""
    return unicodedata.category(character) in ("Cf", "Mn", "Me")


def _shape(font: ImageFont.FreeTypeFont, character: str) -> tuple[tuple[int, int], bytes]:
    drawn: Any = font.getmask(character)
    return drawn.size, bytes(drawn)
