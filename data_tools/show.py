"""`data_tools show`: samples of shards on a contact sheet, or on a page with their annotations."""

import os
from pathlib import Path

from PIL import Image

from casc.data.index import Index, read_index
from casc.data.loader_config import DEFAULT_LOADING, RemoteConfig
from casc.data.record import SampleRecord
from casc.data.remote import location
from casc.draw import contact_sheet, draw_sample
from casc.draw.html import document, escape, picture, table
from casc.errors import UserError
from data_tools.choose import Choice, choose_samples, problems_of

PAGE = (".html", ".htm")
LARGEST_CELL = 8192
_SEEN_AT = 420
"""Pixels of a picture's longest side on the page."""


def show_shards(
    folder: str | os.PathLike[str],
    out: Path,
    choice: Choice | None = None,
    *,
    split: str | None = None,
    cell: int = 480,
    loading: RemoteConfig = DEFAULT_LOADING,
) -> list[str]:
    """Draw samples with their annotations on a contact sheet (PNG) or on an HTML page.

    Args:
        folder: of the shards, or their URL.
        out: what to write; a page if its name ends in .html, else a PNG.
        choice: which samples; by default 16 at random.
        split: of which split; the index's first by default.
        cell: the longest side of a picture, in pixels.
        loading: how shards are fetched that lie elsewhere.

    Returns:
        A caption for each picture.

    Raises:
        UserError: when there is no such split or nothing to show, a shard can't be read, or a
            number is out of range.
    """
    index, folder = read_index(folder, loading), location(folder)
    if not 1 <= cell <= LARGEST_CELL:
        raise UserError(f"--cell: expected 1 to {LARGEST_CELL}, got {cell}")
    if split is None:
        split = next(iter(index.splits), "")
    if split not in index.splits:
        raise UserError(f"{folder}: has no split {split!r}, only {', '.join(index.splits)}")
    samples = choose_samples(folder, index, split, choice or Choice(), loading)
    captions = [_caption(record) for _, record in samples]
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix.lower() in PAGE:
        page = _page(folder, index, split, samples, captions, cell)
        out.write_text(page, encoding="utf-8")
        return captions
    channels = index.splits[split].channels
    pictures = [
        draw_sample(image, record, index.categories, cell, channels=channels)
        for image, record in samples
    ]
    sheet = contact_sheet(pictures, cell=cell, captions=captions)
    Image.fromarray(sheet).save(out, "PNG")
    return captions


def _page(
    folder: str,
    index: Index,
    split: str,
    samples: list[tuple[bytes, SampleRecord]],
    captions: list[str],
    cell: int,
) -> str:
    cards = "".join(
        _card(image, record, index, split, caption, cell)
        for (image, record), caption in zip(samples, captions, strict=True)
    )
    whole = index.splits[split].samples
    head = f"<p>{len(samples):,} of {whole:,} samples of {escape(split)} in {escape(folder)}</p>"
    body = f'<div class="cards">{cards}</div>'
    return document(f"{split}: samples", [("samples", "Samples", body)], head=head)


def _card(
    image: bytes, record: SampleRecord, index: Index, split: str, caption: str, cell: int
) -> str:
    names = {category.id: category.name for category in index.categories}
    drawn = picture(
        draw_sample(image, record, index.categories, cell, _SEEN_AT, index.splits[split].channels),
        f"{record['file_name']} with its {len(record['annotations'])} annotations drawn",
    )
    rows = []
    for entry in record["annotations"]:
        name = names.get(entry["category_id"], f"category {entry['category_id']}")
        use = "crowd" if entry["iscrowd"] else "trained on" if entry["train"] else "evaluation only"
        area = f"{entry['area']:,.0f}" if isinstance(entry.get("area"), (int, float)) else "n/a"
        box = ", ".join(f"{value:g}" for value in entry["box"])
        cells = (name, str(entry["id"]), area, box, use)
        rows.append([(text, text) for text in cells])
    listed = table(
        "Annotations, in pixels", ["class", "id", "area", "box x0, y0, x1, y1", "use"], rows
    )
    problems = "".join(f"<li>{escape(text)}</li>" for text in problems_of(index, split, record))
    found = f'<ul class="messages">{problems}</ul>' if problems else ""
    return (
        f'<figure class="card"><figcaption>{escape(record["file_name"])}<br>{escape(caption)}'
        f"</figcaption>{drawn}{found}<details><summary>{len(rows)} annotations</summary>{listed}"
        "</details></figure>"
    )


def _caption(record: SampleRecord) -> str:
    entries = record["annotations"]
    trained = sum(entry["train"] for entry in entries)
    use = f"{trained} of {len(entries)} to train on" if record["train"] else "evaluation only"
    return f"{record['image_id']}: {record['width']} x {record['height']}, {use}"
