"""What sharding found in a data set: which kinds of findings there are, their count and ids."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

EXAMPLES = 5
_CONSOLE_IDS = 6


class Kind(NamedTuple):
    """A kind of finding."""

    subject: str
    """What its ids are of: image, annotation or category."""
    outcome: str
    """What is done about it."""
    text: str


KINDS: dict[str, Kind] = {
    # Left out of the shards altogether.
    "missing_file": Kind("image", "left out", "the image file is missing"),
    "unreadable": Kind("image", "left out", "the image can't be decoded"),
    "broken_file": Kind("image", "left out", "its XML or JSON file is empty or broken off"),
    "size_mismatch": Kind("image", "left out", "of another shape than the annotation file says"),
    "duplicate_image": Kind("image", "left out", "listed twice; the copy is"),
    "image_left_out": Kind("annotation", "left out", "its image is left out"),
    "unknown_image": Kind("annotation", "left out", "its image isn't listed"),
    "other_shape": Kind("annotation", "left out", "a point or line, no area"),
    "invalid": Kind("annotation", "left out", "can't be understood (--skip-invalid)"),
    "duplicate_annotation": Kind("annotation", "left out", "listed twice; the copy is"),
    "duplicate_category": Kind("category", "left out", "listed twice; the copy is"),
    # In the shards, but not trained on.
    "too_small": Kind("image", "evaluation only", "a side is shorter than 32 pixels"),
    "no_annotations": Kind(
        "image", "evaluation only", "no object of a listed category on it; --negatives keep"
    ),
    "only_maskless": Kind("image", "evaluation only", "objects without masks, as below"),
    "crowd": Kind("annotation", "evaluation only", "crowd"),
    "ignore": Kind("annotation", "evaluation only", "marked as ignore"),
    "unknown_category": Kind("annotation", "evaluation only", "its category isn't listed"),
    "degenerate_box": Kind("annotation", "evaluation only", "box under 1 pixel or area 0"),
    "outside_image": Kind("annotation", "evaluation only", "box outside the image"),
    "no_mask": Kind("annotation", "evaluation only", "no usable mask, unless --model.masks none"),
    "bad_rle": Kind("annotation", "mask emptied", "its RLE can't be decoded"),
    # Repaired.
    "rescaled": Kind("image", "annotations scaled", "of another size than annotated, same shape"),
    "corners": Kind("annotation", "converted", "box [x, y, x, y], as the masks of the file say"),
    "other_spelling": Kind("image", "found", "its file has a name of another spelling"),
    "embedded": Kind(
        "image", "found", "its file isn't there, but in imageData of LabelMe's JSON file"
    ),
    "exif_applied": Kind("image", "turned", "EXIF orientation"),
    "exif_assumed": Kind("image", "turned", "EXIF orientation; sizes can't confirm it"),
    "exif_ignored": Kind("image", "not turned", "EXIF orientation, annotated unturned"),
    "colour": Kind("image", "converted", "colours, decoded to grey"),
    "cmyk": Kind("image", "converted", "CMYK, decoded to RGB"),
    "grayscale": Kind("image", "converted", "grayscale, decoded to RGB"),
    "palette": Kind("image", "converted", "palette, decoded to RGB"),
    "alpha": Kind("image", "converted", "transparency, dropped in decoding"),
    "sixteen_bit": Kind("image", "converted", "16-bit, decoded to 8 bits"),
    "animated": Kind("image", "first frame", "animation"),
    "other_format": Kind("image", "stored as PNG", "neither JPEG, PNG nor WebP"),
    "wrong_extension": Kind("image", "renamed", "the extension isn't the content's"),
    "reduced": Kind("image", "reduced", "larger than --max-size, encoded anew"),
    "text_image_id": Kind("image", "numbered", "its id is a text: 52 bits of its SHA-256"),
    "text_id": Kind("annotation", "numbered", "its id is a text: 52 bits of its SHA-256"),
    "missing_id": Kind("annotation", "numbered", "no id given"),
    "text_number": Kind("annotation", "converted", "numbers written as texts"),
    "text_size": Kind("image", "converted", "width or height written as a text"),
    "missing_box": Kind("annotation", "computed", "no box given; its mask's"),
    "renumbered": Kind("annotation", "new id", "id taken by another annotation"),
    "bad_polygon_part": Kind("annotation", "part left out", "under 3 points, odd, NaN or far off"),
    "missing_area": Kind("annotation", "computed", "no area given that is a number"),
    "flat_outline": Kind("annotation", "one outline", "coordinates without the list of outlines"),
    "missing_iscrowd": Kind("annotation", "taken as 0", "no iscrowd given"),
    "simplified": Kind("annotation", "fewer edges", "ragged outline; within IoU 0.99 of its mask"),
    "rle_mask": Kind("annotation", "traced", "RLE mask"),
    "self_overlap": Kind("annotation", "traced", "outline overlaps itself; pycocotools' mask"),
    # Worth knowing.
    "negative": Kind("image", "trained on", "without annotations, as background"),
    "out_of_bounds": Kind("annotation", "kept", "reaches out of the image by over 0.5 px"),
    "many_objects": Kind(
        "image", "kept", "far more objects than others: all batches have the room"
    ),
    "many_edges": Kind("image", "kept", "far more edges than others: all batches have the room"),
    "large_image": Kind("image", "kept", "far larger than others; --max-size makes batches small"),
    "box_not_mask": Kind("annotation", "kept", "box and mask overlap by less than IoU 0.5"),
    "multi_part": Kind("annotation", "kept", "mask of several parts"),
    "in_other_split": Kind("image", "kept", "the same file is in another split too"),
    "duplicate_file_name": Kind("image", "kept", "a file listed as several images"),
    "unused_category": Kind("category", "kept", "no annotation is of it"),
    "duplicate_category_name": Kind("category", "kept", "a name shared by categories"),
}


class Finding(NamedTuple):
    """One thing found."""

    kind: str
    """A key of `KINDS`."""
    id: int
    detail: str = ""


def summarise(findings: Iterable[Finding]) -> dict[str, Any]:
    """Gather findings by kind: count, all ids, and a few details in full.

    Ids are written as text like "4-6 9": a finding may concern a million annotations.
    """
    by_kind: dict[str, list[Finding]] = {}
    for finding in findings:
        by_kind.setdefault(finding.kind, []).append(finding)
    return {
        kind: {
            "subject": KINDS[kind].subject,
            "outcome": KINDS[kind].outcome,
            "count": len(found),
            "ids": format_ids(finding.id for finding in found),
            "examples": [
                f"{finding.id}: {printable(finding.detail)}"
                for finding in sorted(found)
                if finding.detail
            ][:EXAMPLES],
        }
        for kind, found in by_kind.items()
    }


def printable(text: str) -> str:
    """Escape what a terminal can't show, such as line breaks in a file's name."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def format_ids(ids: Iterable[int]) -> str:
    """Write ids as ascending ranges: [9, 4, 5, 6] gives "4-6 9"."""
    runs: list[list[int]] = []
    for i in sorted(set(ids)):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    # A pair reads better as two numbers than as a range, negative ids can't be in one.
    return " ".join(
        f"{a}-{b}" if b > a + 1 and a >= 0 else " ".join(map(str, range(a, b + 1))) for a, b in runs
    )


def parse_ids(text: str) -> list[int]:
    """Give the ids that `format_ids` wrote."""
    ids: list[int] = []
    for word in text.split():
        first, dash, last = word.partition("-")
        ids += range(int(first), int(last) + 1) if first and dash else [int(word)]
    return ids


def format_table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Lay out rows, the first of which is the head; `right` lists right-aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def format_findings(summary: dict[str, Any]) -> str:
    """Lay out what `summarise` gave for a person, with the first ids of each kind."""
    rows = [["finding", "count", "outcome", "ids (all in index.json)"]]
    details: list[str] = []
    for kind, about in KINDS.items():
        if kind not in summary:
            continue
        entry = summary[kind]
        words = entry["ids"].split()
        shown = " ".join(words[:_CONSOLE_IDS]) + (" ..." if len(words) > _CONSOLE_IDS else "")
        label = f"{about.subject}: {about.text}"
        rows.append([label, f"{entry['count']:,}", entry["outcome"], shown])
        details += [f"  {about.subject} {text}" for text in entry["examples"]]
    if len(rows) == 1:
        return "nothing to report"
    table = format_table(rows, right=[1])
    return "\n".join([table, "details:", *details]) if details else table
