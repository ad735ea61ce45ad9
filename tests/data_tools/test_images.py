import hashlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from casc.data.decode import decode_image
from casc.data.sample import iter_tar
from casc.errors import UserError
from data_tools import images
from data_tools.images import (
    MISSING,
    UNREADABLE,
    file_digest,
    probe_image,
    reduced_size,
    store_image,
)

COLOUR = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, bytes], Path]:
    def write(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


DEEP = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30))
ODD = {
    "rgb.jpg": (encode(COLOUR, "JPEG"), "jpg", ()),
    "RGB.JPEG": (encode(COLOUR, "JPEG"), "jpg", ()),
    "rgb.png": (encode(COLOUR, "PNG"), "png", ()),
    "rgb.webp": (encode(COLOUR, "WEBP"), "webp", ()),
    "gray.jpg": (encode(COLOUR.convert("L"), "JPEG"), "jpg", ("grayscale",)),
    "cmyk.jpg": (encode(COLOUR.convert("CMYK"), "JPEG"), "jpg", ("cmyk",)),
    "palette.png": (encode(COLOUR.convert("P"), "PNG"), "png", ("palette",)),
    "alpha.png": (encode(COLOUR.convert("RGBA"), "PNG"), "png", ("alpha",)),
    "gray_alpha.png": (encode(COLOUR.convert("LA"), "PNG"), "png", ("grayscale", "alpha")),
    "deep.png": (encode(DEEP, "PNG"), "png", ("grayscale", "sixteen_bit")),
    "bits.png": (encode(COLOUR.convert("1"), "PNG"), "png", ("grayscale",)),
    "png.jpg": (encode(COLOUR, "PNG"), "png", ("wrong_extension",)),
    "noextension": (encode(COLOUR, "JPEG"), "jpg", ("wrong_extension",)),
    "a.bmp": (encode(COLOUR, "BMP"), "png", ("other_format",)),
    "a.tif": (encode(COLOUR, "TIFF"), "png", ("other_format",)),
    "a.gif": (encode(COLOUR, "GIF"), "png", ("other_format", "palette")),
    "moving.webp": (
        encode(COLOUR, "WEBP", save_all=True, append_images=[COLOUR.rotate(90)]),
        "webp",
        ("animated",),
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_an_image_is_is_told(put: Callable[[str, bytes], Path], name: str):
    data, extension, traits = ODD[name]
    path = put(name, data)
    probe = probe_image(path)
    assert probe.fault == ""
    assert (probe.width, probe.height, probe.orientation) == (30, 20, 1)
    assert probe.extension == extension
    assert set(probe.traits) == set(traits)
    assert probe.size == len(data)
    assert probe.sha256 == file_digest(path) == hashlib.sha256(data).hexdigest()

    stored = store_image(path, probe, 1, None)
    assert (stored.width, stored.height, stored.orientation) == (30, 20, 1)
    if "other_format" in traits:
        assert stored.data[:4] == b"\x89PNG"
    else:
        assert stored.data == data
    np.testing.assert_array_equal(decode_image(stored.data), decode_image(data))


def test_exif_is_read_and_damage_to_it_ignored(put: Callable[[str, bytes], Path]):
    for orientation, found in ((6, 6), (1, 1), (9, 1), (0, 1)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(COLOUR, "JPEG", exif=exif)
        assert probe_image(put("a.jpg", data)).orientation == found
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(COLOUR, "JPEG", exif=exif)
    place = data.index(b"Exif\0\0") + 6
    broken = data[:place] + b"\xff" * 8 + data[place + 8 :]
    assert probe_image(put("b.jpg", broken)).orientation == 1


def test_what_can_not_be_used_is_explained(
    put: Callable[[str, bytes], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert probe_image(tmp_path / "absent.jpg").sha256 == MISSING
    assert file_digest(tmp_path / "absent.jpg") == MISSING
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    monkeypatch.setattr(images, "LARGEST_FILE", 100_000)
    put("huge.jpg", bytes(100_001))
    for name, reason in (
        ("folder.jpg", "not a plain file"),
        ("pipe.jpg", "not a plain file"),
        ("huge.jpg", "too large"),
        ("x" * 300, "name too long"),
    ):
        probe = probe_image(tmp_path / name)
        assert reason in probe.fault.lower()
        assert probe.sha256 == file_digest(tmp_path / name) == UNREADABLE
    for data in (b"", b"text", encode(COLOUR, "JPEG")[:300]):
        probe = probe_image(put("bad.jpg", data))
        assert probe.fault
        assert probe.sha256 == hashlib.sha256(data).hexdigest()


def test_reduced_images_are_turned_first(put: Callable[[str, bytes], Path]):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, kind in (("a.jpg", "JPEG"), ("a.png", "PNG"), ("a.webp", "WEBP")):
        path = put(name, encode(COLOUR, kind, exif=exif))
        probe = probe_image(path)
        stored = store_image(path, probe, 6, 15)
        assert (stored.width, stored.height, stored.orientation) == (10, 15, 1)
        assert decode_image(stored.data).shape == (15, 10, 3)
        assert probe_image(put("b." + name, stored.data)).extension == name[2:]
        # Small enough, it stays as it is, to be turned when decoded.
        kept = store_image(path, probe, 6, 30)
        assert kept.data == path.read_bytes()
        assert (kept.width, kept.height, kept.orientation) == (20, 30, 6)


def test_reduced_sizes():
    assert reduced_size(640, 480, None) == (640, 480)
    assert reduced_size(640, 480, 640) == (640, 480)
    assert reduced_size(640, 480, 320) == (320, 240)
    assert reduced_size(5000, 3, 100) == (100, 1)


def test_a_file_that_changes_meanwhile_is_noticed(put: Callable[[str, bytes], Path]):
    path = put("a.jpg", encode(COLOUR, "JPEG"))
    probe = probe_image(path)
    put("a.jpg", encode(COLOUR.rotate(180), "JPEG"))
    with pytest.raises(UserError, match=r"a\.jpg: changed while"):
        store_image(path, probe, 1, None)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jpg: changed while"):
        store_image(path, probe, 1, None)


def test_stretch_is_only_named_where_it_helps(coco):
    """Not with it, nor of colours, nor of planes, where it would be refused."""
    grey = io.BytesIO()
    Image.fromarray(np.arange(3000, dtype=np.uint16).reshape(50, 60)).save(grey, "PNG")
    first = coco.image(data=grey.getvalue(), name="a.png")

    def told(**settings) -> str:
        found = coco.shard(**settings)[0].splits["train"].report["findings"]
        return " ".join(found["sixteen_bit"]["examples"])

    assert "12 levels are left; --stretch spreads" in told()
    assert "12 levels are left; --stretch spreads" in told(channels=1)
    assert told(stretch=True) == f"{first}: its own range is spread over 8 bits"
    coco.images.clear()
    header, rows = struct.pack(">IIBBBBB", 60, 50, 16, 2, 0, 0, 0), zlib.compress(bytes(361 * 50))
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    coco.image(data=b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ), name="b.png")  # fmt: skip
    assert "1 levels are left" in told()
    assert "--stretch" not in told(stretch=True)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_arrays_of_sixteen_bits_are_told_and_spread(coco, channels: int):
    deep = np.arange(3000 * channels, dtype=np.uint16).reshape(50, 60, channels) % 4096
    data = io.BytesIO()
    np.save(data, deep)
    number = coco.image(data=data.getvalue(), name="a.npy")
    index, out = coco.shard(channels=channels)
    found = index.splits["train"].report["findings"]["sixteen_bit"]["examples"]
    levels = len(np.unique(deep >> 8))
    assert found[0].startswith(f"{number}: {levels} levels are left")
    assert ("--stretch" in found[0]) == (channels == 1)
    if channels == 1:
        index, out = coco.shard(channels=channels, stretch=True)
        ((_, image, _),) = iter_tar(out / index.splits["train"].shards[0].name)
        spread = decode_image(image, 1, 1)[..., 0]
        assert (spread == np.rint(deep[..., 0] * (255 / 2999))).all()


def test_sixteen_bits_are_spread_by_flag(tmp_path: Path):
    values = np.arange(1000, 1000 + 60 * 50, dtype=np.uint16).reshape(50, 60)
    path = tmp_path / "deep.png"
    path.write_bytes(encode(Image.fromarray(values), "PNG"))
    probe = probe_image(path)
    assert probe.levels == len(np.unique(values >> 8)) == 13
    upper = store_image(path, probe, 1, None)
    assert upper.data == path.read_bytes()
    spread = decode_image(store_image(path, probe, 1, None, stretch=True).data)[..., 0]
    expected = np.rint((values - 1000.0) * 255 / (60 * 50 - 1))
    assert np.array_equal(spread, expected)
