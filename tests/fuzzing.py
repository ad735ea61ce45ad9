"""What is hostile, by structure: JSON, tar members, images, safetensors, pickles, HTTP replies.

Each strategy begins with what is sound and changes parts that mean something to its reader, so
that most of it is read further than the first check.
"""

import copy
import functools
import io
import json
import pickle
import struct
import tarfile
import zipfile
from typing import Any

import hypothesis.strategies as st
import numpy as np
from PIL import Image

NUMBERS = [0, -1, 1, 2, 0.5, -0.0, 1e-300, 1e6, 1e300, -1e300, 2**31, 2**63, 2**64, 10**400]
OTHERS: list[Any] = [None, True, False, "", "1", "\x00", "\ud800", "Ærø", [], {}, [[]], [None]]
OTHERS += [{"a": 1}]
SPECIAL = [float("nan"), float("inf"), float("-inf")]
STRANGE = [*NUMBERS, *OTHERS, *SPECIAL]

strange = st.sampled_from([*STRANGE, 2**20, 10**9, "x" * 300, "../a", "a\x1b[2J", [0] * 99])


def places(data: Any) -> list[tuple[Any, Any]]:
    """All (container, key) of a JSON value."""
    found: list[tuple[Any, Any]] = []
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        found.append((data, key))
        if isinstance(value, (dict, list)):
            found += places(value)
    return found


CHANGES = ["replace"] * 3 + ["delete", "swap", "nudge", "repeat"]


@st.composite
def damaged(draw: st.DrawFn, sound: Any, most: int = 4) -> Any:
    """A JSON value with some of its parts changed; seldom none."""
    data = copy.deepcopy(sound)
    for _ in range(draw(st.integers(0, most))):
        there = places(data) if isinstance(data, (dict, list)) else []
        if not there:
            return data
        container, key = there[draw(st.integers(0, len(there) - 1))]
        kind = draw(st.sampled_from(CHANGES))
        value = container[key]
        if kind == "delete":
            del container[key]
        elif kind == "swap":
            other, name = there[draw(st.integers(0, len(there) - 1))]
            container[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(value)
        elif kind == "nudge" and type(value) in (int, float):
            container[key] = value * draw(st.sampled_from([-1, 0, 3, 1000])) + draw(
                st.integers(-1, 1)
            )
        elif kind == "repeat" and isinstance(container, list):
            container.append(copy.deepcopy(value))
        else:
            container[key] = copy.deepcopy(draw(strange))
    return data


DEEP = "[" * 30_000 + "]" * 30_000


@st.composite
def json_text(draw: st.DrawFn, sound: Any) -> bytes:
    """The text of a damaged value, seldom damaged below the level of JSON."""
    text = json.dumps(draw(damaged(sound))).encode("utf-8", "surrogatepass")
    kind = draw(st.sampled_from(["plain"] * 12 + ["bytes", "deep", "digits", "encoding", "other"]))
    if kind == "bytes":
        return draw(damaged_bytes(text))
    if kind == "deep":
        return text.replace(b"1", DEEP.encode(), 1)
    if kind == "digits":
        return text.replace(b"1", b"1" * 9000, 1)
    if kind == "encoding":
        return text.decode().encode(draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32"])))
    if kind == "other":
        return draw(st.sampled_from([b"", b"null", b"[]", b"{}", b"\xff", b"1e999", b'"a"']))
    return text


@st.composite
def damaged_bytes(draw: st.DrawFn, sound: bytes) -> bytes:
    """Bytes that are cut short, changed, or have something in between."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["cut", "flip", "flip", "insert", "remove"]))
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=9))
        else:
            del data[at : at + draw(st.integers(1, 600))]
    return bytes(data)


def picture(kind: str, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> bytes:
    """A small image."""
    out = io.BytesIO()
    Image.new(mode, size, 1).save(out, kind)
    return out.getvalue()


PICTURES = [picture(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
PICTURES += [picture("PNG", mode) for mode in ("1", "L", "P", "RGBA", "LA", "I;16")]
PICTURES += [picture("TIFF", "F"), picture("PNG", size=(9, 8)), b"", b"\xff\xd8"]


def record(**changes: Any) -> dict[str, Any]:
    """A shard's sample of one polygon and one RLE."""
    one = {
        "id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0, "label": 0,
        "train": True, "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]], "box": [1, 1, 5, 5],
    }  # fmt: skip
    two = {
        **one, "id": 2, "segmentation": {"size": [8, 8], "counts": [9, 4, 51]},
        "rings": [[1, 1, 2, 1, 2, 5, 1, 5]], "mask_iou": 1.0, "box_only": False, "region": False,
    }  # fmt: skip
    return {
        "image_id": 1, "file_name": "a.png", "width": 8, "height": 8, "orientation": 1,
        "train": True, "annotations": [one, two], **changes,
    }  # fmt: skip


COCO: dict[str, Any] = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 9} for i in (1, 2)],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0,
         "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]]},
        {"id": 2, "image_id": 2, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 4, "iscrowd": 1,
         "segmentation": {"size": [9, 8], "counts": [9, 4, 59]}},
        {"id": 3, "image_id": 1, "category_id": 2, "bbox": [0, 0, 2, 2], "area": 4, "iscrowd": 0,
         "segmentation": {"size": [9, 8], "counts": "94k1"}},
    ],
    "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
}  # fmt: skip
RESULTS = [
    {"image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "score": 0.5,
     "segmentation": {"size": [9, 8], "counts": "94k1"}},
    {"image_id": 2, "category_id": 2, "bbox": [1.0, 0.0, 4.5, 4], "score": 1,
     "segmentation": {"size": [9, 8], "counts": [9, 4, 59]}},
]  # fmt: skip


NAMES = ["", "/", "../a.png", "a" * 300 + ".png", "1.__key__", "__url__.json", "a\x1b.png",
         "\udc80.json", "a.b.png", ".json", "x", "1.JSON", "1.png\n"]  # fmt: skip
KINDS = [tarfile.REGTYPE] * 20 + [
    tarfile.AREGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
    tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE, b"Z",
]  # fmt: skip
PAX = ["11 size=99\n", "19 path=1.png\n", "30 GNU.sparse.size=99999999\n", "99 comment=x\n",
       "0 a=b\n", "-3 a=b\n", "x", "12 mtime=x\n", "16 size=1e999\n", "13 uid=-1.5\n"]  # fmt: skip


@st.composite
def member(draw: st.DrawFn, name: str, data: bytes) -> bytes:
    """A member of a tar, mostly as it should be."""
    odd = draw(st.integers(0, 5)) == 0
    info = tarfile.TarInfo(name)
    if odd:
        info.name = draw(st.sampled_from([name, *NAMES]))
        info.type = draw(st.sampled_from(KINDS))
    if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE):
        data = draw(st.sampled_from(PAX)).encode() * draw(st.sampled_from([1, 1, 9, 9000]))
    info.size = len(data)
    if odd and draw(st.booleans()):
        sizes = [0, 1, len(data) + 1, 511, 2**20, 2**30, 2**33, 2**62, -1]
        info.size = draw(st.sampled_from(sizes))
    try:
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
    except (ValueError, OverflowError):
        header = bytearray(tarfile.TarInfo("1.png").tobuf(tarfile.GNU_FORMAT))
    if odd and draw(st.integers(0, 3)) == 0:  # within the header, with a checksum that fits
        at = draw(st.integers(0, 511))
        header[at : at + 1] = bytes([draw(st.integers(0, 255))])
        header[-512:][148:156] = b" " * 8
        header[len(header) - 364 : len(header) - 356] = b" " * 8
        header[len(header) - 364 : len(header) - 356] = b"%06o\0 " % sum(header[-512:])
    return bytes(header) + data + bytes(-len(data) % 512)


@st.composite
def shards(draw: st.DrawFn, most: int = 3) -> bytes:
    """A tar of samples."""
    parts: list[bytes] = []
    for i in range(draw(st.integers(0, most))):
        image = PICTURES[0]
        if draw(st.integers(0, 3)) == 0:
            image = draw(st.sampled_from(PICTURES))
            image = draw(damaged_bytes(image)) if draw(st.booleans()) else image
        pair = [
            draw(member(f"{i:012d}.png", image)),
            draw(member(f"{i:012d}.json", draw(json_text(record(image_id=i))))),
        ]
        odd = draw(st.sampled_from(["none"] * 9 + ["swap", "lack", "twice"]))
        parts += {"none": pair, "swap": pair[::-1], "lack": pair[:1], "twice": pair * 2}[odd]
    whole = b"".join(parts) + bytes(1024)
    return draw(damaged_bytes(whole)) if draw(st.integers(0, 5)) == 0 else whole


def safetensors(header: Any, data: bytes, size: int | None = None) -> bytes:
    """A file of safetensors with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def parts_of(file: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a file of safetensors."""
    (size,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + size]), file[8 + size :]


@st.composite
def weights(draw: st.DrawFn, sound: bytes, texts: tuple[str, ...]) -> bytes:
    """A damaged file of safetensors; `texts` are the JSON values of its metadata."""
    header, data = parts_of(sound)
    kind = draw(st.sampled_from(["header", *["texts"] * 3, "metadata", "data", "size", "bytes"]))
    if kind == "header":
        few = {name: header[name] for name in list(header)[:4]}
        return safetensors({**header, **draw(damaged(few))}, data)
    if kind == "texts":
        said = dict(header["__metadata__"])
        for name in texts:
            if draw(st.booleans()):
                text = draw(json_text(json.loads(said[name])))
                said[name] = text.decode("utf-8", "replace")
        return safetensors({**header, "__metadata__": said}, data)
    if kind == "metadata":
        said = draw(damaged(header["__metadata__"]))
        return safetensors({**header, "__metadata__": said}, data)
    if kind == "data":
        change = draw(st.sampled_from([b"", data[:-1], data + b"x", b"\xff" * len(data)]))
        return safetensors(header, change)
    if kind == "size":
        size = draw(st.sampled_from([0, 1, 2**24, 2**31, 2**63, 2**64 - 1]))
        return safetensors(header, data, size)
    return draw(damaged_bytes(sound))


ARGUMENTS = [
    b"K\x01", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"I01\n", b"I9\n", b"L5L\n", b"F1.5\n", b"N",
    b"\x88", b"]", b"}", b")", b"X\x01\x00\x00\x00a", b"\x8c\x05model", b"C\x04abcd",
    b"T\x04\x00\x00\x00abcd", b"G?\xf0\x00\x00\x00\x00\x00\x00", b"\x8f", b"\x8a\x09" + b"\x7f" * 9,
    b"\x8d" + struct.pack("<Q", 2**40), b"\x8e" + struct.pack("<Q", 2**62) + b"a",
    b"B\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f", b"\x96" + struct.pack("<Q", 2**33),
    b"X\xff\xff\xff\xff", b"V\\ud800\n", b"S'a'\n",
]  # fmt: skip
GLOBALS = [
    b"ccollections\nOrderedDict\n", b"cnumpy.core.multiarray\n_reconstruct\n",
    b"cnumpy.core.multiarray\nscalar\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n",
    b"c_codecs\nencode\n", b"c__builtin__\nbytes\n", b"cos\nsystem\n", b"cbuiltins\neval\n",
    b"cnumpy.core.numeric\n_frombuffer\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n", b"c\n\n", b"cposix\nsystem\n",
]  # fmt: skip
ACTIONS = [
    b"0", b"2", b"(", b"1", b"a", b"e", b"s", b"u", b"t", b"l", b"d", b"\x85", b"\x86", b"\x87",
    b"R", b"R", b"b", b"\x81", b"\x93", b"i", b"o", b"Q", b"\x90", b"\x91", b"\x94", b"q\x00",
    b"h\x00", b"h\x05", b"r\xff\xff\xff\x7f", b"r\x00\x00\x00\x04", b"j\xff\xff\xff\xff",
    b"p9999999999\n", b"p7\n", b"g7\n", b"P1\n", b"\x82\x01", b"\x92",
    b"\x95" + struct.pack("<Q", 2**60), b"\x95\x03\0\0\0\0\0\0\0", b"\x97", b"\x98", b"\x80\x09",
]  # fmt: skip
WORDS = [*ARGUMENTS, *GLOBALS, *ACTIONS]
SOUND = [
    pickle.dumps({"model": {"a": np.zeros((2, 3), kind), "b": np.float64(1)}}, protocol)
    for kind in ("f4", ">f8", "i8", "?")
    for protocol in (0, 2, 4)
]
CALLS = [b"(", b"K\x01K\x02\x86", b"X\x02\x00\x00\x00f4", b"C\x04abcd", b"X\x03\x00\x00\x00>f8",
         b")", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"]  # fmt: skip


@st.composite
def pickles(draw: st.DrawFn) -> bytes:
    """A program of pickle's machine, or one that is sound with something in between."""
    if draw(st.integers(0, 3)) == 0:
        sound = draw(st.sampled_from(SOUND))
        return draw(damaged_bytes(sound)) if draw(st.integers(0, 9)) else sound
    parts = [b"\x80\x04"] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 12))):
        if draw(st.integers(0, 3)) == 0:  # a call of something, with arguments of some kind
            given_ = b"".join(draw(st.lists(st.sampled_from(CALLS + ARGUMENTS), max_size=5)))
            parts.append(draw(st.sampled_from(GLOBALS)) + b"(" + given_ + b"tR")
        elif draw(st.integers(0, 5)) == 0:  # lists in lists in lists
            parts.append(b"](h\x00h\x00h\x00eq\x00" * draw(st.sampled_from([1, 5, 40])))
        else:
            parts.append(draw(st.sampled_from(WORDS)))
    return b"".join(parts) + b"."


@st.composite
def replies(draw: st.DrawFn, body: bytes) -> bytes:
    """What a server sends before it closes the connection."""
    status = draw(st.sampled_from(
        ["200 OK"] * 9 + ["206 Partial Content", "206 x", "404 \x1b[31m", "500 x", "301 Moved",
         "302 Found", "204 None", "100 Continue", "999 ?", "-1 x", "abc", "", "401 x", "416 x"]
    ))  # fmt: skip
    if draw(st.integers(0, 3)) == 0:
        body = draw(damaged_bytes(body))
    lengths = [len(body)] * 6 + [0, len(body) + 9, len(body) - 1, -1, 2**70, "x", "1, 2", ""]
    headers = [f"Content-Length: {draw(st.sampled_from(lengths))}"]
    extra = [
        f"Content-Range: bytes 0-{len(body) - 1}/{len(body)}", "Content-Range: bytes 5-9/*",
        f"Content-Range: bytes 0-1/{2**70}", "Content-Range: x", "Transfer-Encoding: chunked",
        "Transfer-Encoding: gzip, chunked", "Content-Encoding: gzip", "Retry-After: 0",
        "Retry-After: -5", "Retry-After: \u00b2", "Retry-After: x",
        "Location: file:///etc/passwd",
        "Location: ftp://127.0.0.1/x", "Location: /index.json", "Location: //[::1", "Location: ",
        "Location: gopher://\x1b", "Connection: keep-alive", "X: " + "y" * 70_000, "no colon",
        ": x",
    ]  # fmt: skip
    headers += draw(st.lists(st.sampled_from(extra), max_size=3))
    if draw(st.integers(0, 30)) == 0:
        headers += ["A: b"] * 200
    if "Transfer-Encoding: chunked" in headers:
        headers.pop(0)
        size = draw(st.sampled_from([f"{len(body):x}", "-1", "zz", "ffffffffffffffff", "1"]))
        body = f"{size}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    version = draw(st.sampled_from(["HTTP/1.1"] * 9 + ["HTTP/1.0", "HTTP/9.9", "ICY", ""]))
    text = "\r\n".join([f"{version} {status}", *headers]) + "\r\n\r\n"
    whole = text.encode("latin1", "replace") + body
    return draw(damaged_bytes(whole)) if draw(st.integers(0, 15)) == 0 else whole


@functools.cache
def torch_parts(kind: str) -> dict[str, bytes]:
    """The members of a file that `torch.save` wrote."""
    import torch

    out = io.BytesIO()
    shared = torch.zeros(6)
    value = {"state_dict": {"a": shared[:4].view(2, 2), "b": shared}, "meta": {"epoch": 1}}
    torch.save(value if kind == "dict" else [value], out)
    with zipfile.ZipFile(out) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@functools.cache
def reference_weights() -> dict[str, Any]:
    """What MMDetection saves, of a detector that is small."""
    import torch

    from casc.model import detector
    from casc.model.detector_config import DetectorConfig

    model = DetectorConfig(classes=2)
    with torch.device("meta"):
        params, buffers = detector.init(model, None)  # type: ignore[arg-type]
    made = {name: torch.zeros(v.shape) for name, v in (params | buffers).items() if v.numel() < 300}
    few = list(made)[:20]
    return {
        "meta": {"CLASSES": ("a", "b"), "epoch": 12, "iter": 3, "time": "now",
                 "config": "model = dict(type='CascadeRCNN', backbone=dict(depth=50))"},
        "state_dict": {name: made[name] for name in few},
        "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1}]},
    }  # fmt: skip


@st.composite
def torch_files(draw: st.DrawFn) -> bytes:
    """A file as torch.save writes one, with other values, members, numbers or pickles."""
    if draw(st.integers(0, 2)) == 0:
        import torch

        out = io.BytesIO()
        torch.save(draw(damaged(reference_weights())), out)
        return out.getvalue()
    parts = dict(torch_parts(draw(st.sampled_from(["dict", "list"]))))
    (main,) = (name for name in parts if name.endswith("/data.pkl"))
    for _ in range(draw(st.integers(1, 2))):
        kind = draw(st.sampled_from(["pickle", "numbers", "numbers", "bytes", "lack", "part"]))
        if kind == "pickle":
            parts[main] = draw(pickles())
        elif kind == "numbers":  # sizes, strides, offsets: small numbers of one byte
            data = bytearray(parts[main])
            small = [i + 1 for i in range(len(data) - 1) if data[i : i + 1] == b"K"]
            at = draw(st.sampled_from(small)) if small else 0
            other = [b"K\xff", b"K\x00", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"N",
                     b"\x8a\x08" + b"\x7f" * 8]  # fmt: skip
            data[at - 1 : at + 1] = draw(st.sampled_from(other))
            parts[main] = bytes(data)
        elif kind == "bytes":
            parts[main] = draw(damaged_bytes(parts[main]))
        else:
            name = draw(st.sampled_from(sorted(parts)))
            if kind == "lack":
                parts.pop(name)
            else:
                parts[name] = draw(st.binary(max_size=40))
        if main not in parts:
            break
    out = io.BytesIO()
    method = draw(st.sampled_from([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED]))
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return draw(damaged_bytes(out.getvalue())) if draw(st.integers(0, 7)) == 0 else out.getvalue()
