"""The frame of a page that needs nothing but itself: no network, no script or font from outside."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape as _escape
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image

from casc.printing import plain, plain_json

# Whatever slipped through escaping couldn't reach the network either.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def escape(value: object) -> str:
    """Text for HTML's content and its quoted attributes."""
    return _escape(plain(value, lines=True), quote=True)


def document(
    title: str,
    sections: Sequence[tuple[str, str, str]],
    *,
    head: str = "",
    data: Mapping[str, Any] | None = None,
) -> str:
    """A whole page.

    Args:
        title: plain text.
        sections: of each its id, its title as plain text, and its HTML.
        head: HTML below the title.
        data: what the page's scripts draw: charts by name.
    """
    links = "".join(
        f'<li><a href="#{escape(key)}">{escape(name)}</a></li>' for key, name, _ in sections
    )
    body = "".join(
        f'<section id="{escape(key)}" aria-labelledby="{escape(key)}-title">'
        f'<h2 id="{escape(key)}-title">{escape(name)}</h2>{content}</section>'
        for key, name, content in sections
    )
    part = files("casc.draw")
    style = part.joinpath("page.css").read_text(encoding="utf-8")
    scripts = "".join(
        f"<script>{part.joinpath(name).read_text(encoding='utf-8')}</script>"
        for name in ("charts.js", "page.js")
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header><div class="bar"><h1>{escape(title)}</h1>
<button type="button" id="theme" aria-pressed="false">Dark</button></div>{head}
<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main id="main" tabindex="-1">
<noscript><p class="note">Charts and sorting need JavaScript; all else is here.</p></noscript>
{body}</main>
<script type="application/json" id="data">{_json(data or {})}</script>
{scripts}
</body>
</html>
"""


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[tuple[str, object]]],
    *,
    sortable: bool = False,
    filtered: str = "",
) -> str:
    """A table that scrolls sideways by itself where it is too wide.

    Args:
        title: plain text, its caption.
        columns: plain text.
        rows: cells as shown text, and the value that they are sorted by: a number, a text, or
            None, which comes last either way. Numbers are set right.
        sortable: whether its headers are buttons that sort it.
        filtered: what the field is called that leaves only the rows whose first cell has its
            text; none by default.
    """
    numeric = [
        any(isinstance(row[i][1], (int, float)) for row in rows) for i in range(len(columns))
    ]
    heads = "".join(
        f'<th scope="col"{_number(right)}'
        + (' aria-sort="none">' if sortable else ">")
        + (f'<button type="button">{escape(name)}</button>' if sortable else escape(name))
        + "</th>"
        for name, right in zip(columns, numeric, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            _cell(text, value, right, head=i == 0)
            for i, ((text, value), right) in enumerate(zip(row, numeric, strict=True))
        )
        + "</tr>"
        for row in rows
    )
    kind = ' class="sortable"' if sortable else ""
    field = ""
    if filtered:
        field = (
            f'<label class="filter">{escape(filtered)} <input type="search" autocomplete="off">'
            '<span class="count" role="status"></span></label>'
        )
    return (
        f'<div class="table">{field}<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(title)}"><table{kind}><caption>{escape(title)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div></div>"
    )


def chart(name: str, title: str, note: str = "") -> str:
    """The place of a chart whose data is in the document's under this name."""
    more = f"<p>{escape(note)}</p>" if note else ""
    return (
        f'<figure class="chart" data-chart="{escape(name)}"><figcaption><h3>{escape(title)}</h3>'
        f'{more}</figcaption><ul class="legend"></ul><div class="plot"></div></figure>'
    )


def picture(pixels: np.ndarray, description: str) -> str:
    """An image inside the page.

    Args:
        pixels: `[H, W, 3]` uint8 RGB.
        description: plain text for those who can't see it.
    """
    coded = io.BytesIO()
    Image.fromarray(pixels).save(coded, "WEBP", quality=82, method=6)
    text = base64.b64encode(coded.getvalue()).decode()
    height, width = pixels.shape[:2]
    return (
        f'<img src="data:image/webp;base64,{text}" width="{width}" height="{height}" '
        f'alt="{escape(description)}">'
    )


def _cell(text: str, value: object, right: bool, *, head: bool) -> str:
    name = 'th scope="row"' if head else "td"
    key = "" if value is None else f' data-value="{escape(value)}"'
    return f"<{name}{_number(right)}{key}>{escape(text)}</{name.split()[0]}>"


def _number(right: bool) -> str:
    return ' class="number"' if right else ""


def _json(data: Mapping[str, Any]) -> str:
    """JSON that can't end the script element that it stands in."""
    text = json.dumps(plain_json(data), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
