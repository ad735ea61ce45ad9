import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from casc.data import decode
from casc.data.decode import (
    ImageError,
    decode_image,
    exif_orientation,
    open_image,
    orient,
    rgb,
    stored_size,
    try_decoding,
)
from casc.errors import UserError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (20, 30), dtype=np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_lossless_formats_come_back_exactly():
    image = Image.fromarray(COLOUR)
    for data in (
        encode(image, "PNG"),
        encode(image, "WEBP", lossless=True),
        encode(image, "BMP"),
        encode(image, "TIFF"),
    ):
        decoded = decode_image(data)
        assert decoded.dtype == np.uint8
        assert decoded.flags.c_contiguous
        np.testing.assert_array_equal(decoded, COLOUR)


def test_gray_and_bilevel_are_repeated_over_the_channels():
    np.testing.assert_array_equal(
        decode_image(encode(Image.fromarray(GRAY))), np.repeat(GRAY[..., None], 3, 2)
    )
    bits = Image.fromarray(GRAY > 128)
    assert bits.mode == "1"
    np.testing.assert_array_equal(decode_image(encode(bits))[..., 1], (GRAY > 128) * 255)


def test_alpha_is_dropped():
    alpha = np.dstack([COLOUR, GRAY])
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(alpha))), COLOUR)
    two = Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(GRAY)])
    np.testing.assert_array_equal(decode_image(encode(two))[..., 0], GRAY)


@pytest.mark.parametrize("transparent", [False, True])
def test_palette_is_looked_up(transparent: bool):
    indices = RNG.integers(0, 4, (8, 9), dtype=np.uint8)
    palette = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]], np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    alpha = bytes([0, 128, 255, 255]) if transparent else None
    data = encode(image, transparency=alpha)
    np.testing.assert_array_equal(decode_image(data), palette[indices])


def test_cmyk_becomes_rgb():
    # A flat colour survives JPEG: cyan and some black.
    data = encode(Image.new("CMYK", (32, 32), (255, 0, 0, 51)), "JPEG", quality=100)
    decoded = decode_image(data).astype(int)
    assert decoded.shape == (32, 32, 3)
    assert np.abs(decoded - [0, 204, 204]).max() <= 4


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpegs_pixels_are_opencvs(subsampling: str, progressive: bool):
    """The reference decodes with OpenCV: which library decodes must make no difference."""
    smooth = cv2.GaussianBlur(RNG.integers(0, 256, (75, 101, 3), dtype=np.uint8), (0, 0), 2)
    strong = cv2.normalize(smooth, np.empty_like(smooth), 0, 255, cv2.NORM_MINMAX)
    data = encode(Image.fromarray(strong), "JPEG", subsampling=subsampling, progressive=progressive)
    theirs = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert theirs is not None
    np.testing.assert_array_equal(decode_image(data), theirs[..., ::-1])


def test_sixteen_bits_keep_the_upper_eight():
    deep = RNG.integers(0, 2**16, (20, 30), dtype=np.uint16)
    decoded = decode_image(encode(Image.fromarray(deep)))
    np.testing.assert_array_equal(decoded, np.repeat((deep // 256)[..., None], 3, 2))


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand, for forms that Pillow doesn't write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_sixteen_bit_colour_keeps_the_upper_eight():
    deep = RNG.integers(0, 2**16, (3, 5, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    np.testing.assert_array_equal(decode_image(png(5, 3, 16, 2, rows)), deep // 256)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_undone_as_pillow_does(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(COLOUR), exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(decode_image(data, orientation), upright)
    # The file's own tag is left to whoever made the sample.
    np.testing.assert_array_equal(decode_image(data), COLOUR)


@pytest.mark.parametrize("orientation", [0, 9, -1])
def test_other_orientations_are_refused(orientation: int):
    with pytest.raises(ValueError, match="orientation"):
        orient(COLOUR, orientation)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_images_are_refused_or_whole(kind: str):
    data = encode(Image.fromarray(COLOUR), kind)
    for end in range(0, len(data) - 20, 7):
        decoded = attempt(data[:end])
        # Where what is missing doesn't matter, the image is whole.
        assert decoded is None or decoded.shape == COLOUR.shape


def attempt(data: bytes) -> np.ndarray | None:
    """The image, or None if it is refused as it should be; any other exception passes."""
    try:
        return decode_image(data)
    except ImageError:
        return None


@given(data=st.binary(max_size=200), kind=st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "GIF"]))
def test_rubbish_is_refused(data: bytes, kind: str):
    whole = encode(Image.fromarray(COLOUR), kind)
    for rubbish in (data, whole[: len(data) % 16 + 8] + data):
        with pytest.raises(ImageError):
            decode_image(rubbish)


@given(
    place=st.integers(0, 600),
    value=st.integers(0, 255),
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "GIF"]),
)
def test_a_changed_byte_never_raises_anything_else(place: int, value: int, kind: str):
    data = bytearray(encode(Image.fromarray(COLOUR), kind))
    data[place % len(data)] = value
    decoded = attempt(bytes(data))
    assert decoded is None or decoded.ndim == 3


def test_empty_and_unknown_files_are_named_as_such():
    with pytest.raises(ImageError, match="empty"):
        decode_image(b"")
    with pytest.raises(ImageError, match="known format"):
        decode_image(b"<svg/>")


def test_image_bombs_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch):
    rows = b"\0"
    with pytest.raises(ImageError, match=r"too large|bomb"):
        open_image(png(60_000, 60_000, 8, 0, rows))
    with pytest.raises(ImageError, match="too large"):
        open_image(png(12_000, 12_000, 8, 0, rows))
    monkeypatch.setattr(decode, "max_pixels", lambda: 599)
    with pytest.raises(ImageError, match="30 x 20"):
        decode_image(encode(Image.fromarray(COLOUR)))


def test_the_limit_is_a_setting(monkeypatch: pytest.MonkeyPatch):
    large = png(9_000, 8_000, 8, 0, b"\0")
    with pytest.raises(ImageError, match=r"9000 x 8000, more .* CASC_MAX_MEGAPIXELS"):
        open_image(large)
    monkeypatch.setenv("CASC_MAX_MEGAPIXELS", "80")
    assert open_image(large).size == (9_000, 8_000)
    for wrong in ("0", "-1", "x", "1.5", "171", "9" * 5000, ""):
        monkeypatch.setenv("CASC_MAX_MEGAPIXELS", wrong)
        with pytest.raises(UserError, match="expected a whole number from 1 to 170"):
            open_image(large)


def test_numbers_without_a_range_are_refused():
    for mode in ("I", "F"):
        with pytest.raises(ImageError, match="32-bit"):
            decode_image(encode(Image.new(mode, (4, 4)), "TIFF"))


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(decode_image(data)[0, 0], [255, 0, 0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_tiff_is_turned_as_other_formats_are(kind: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(COLOUR), kind, exif=exif)
    with open_image(data) as image:
        assert exif_orientation(image) == orientation
        assert stored_size(image) == COLOUR.shape[1::-1]
        opened = rgb(image)
    plain = decode_image(encode(Image.fromarray(COLOUR), kind))
    np.testing.assert_array_equal(opened, plain)
    np.testing.assert_array_equal(decode_image(data), plain)
    np.testing.assert_array_equal(decode_image(data, orientation), orient(plain, orientation))


def verdict(function, data: bytes) -> str:
    try:
        function(data)
    except ImageError:
        return "refused"
    return "taken"


def tried(data: bytes) -> None:
    with open_image(data) as image:
        try_decoding(image)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_what_decodes_at_an_eighth_decodes_in_full(mode: str, options: dict):
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (61, 83, 3), dtype=np.uint8)).convert(mode)
    whole = encode(noise, "JPEG", quality=60, **options)
    assert verdict(tried, whole) == "taken"
    found = []
    for cut in rng.integers(2, len(whole), 25).tolist():
        spoilt = bytearray(whole)
        spoilt[cut] ^= 0x5A
        for data in (whole[:cut], bytes(spoilt)):
            found.append(verdict(tried, data))
            assert found[-1] == verdict(decode_image, data), cut
    assert set(found) == {"taken", "refused"}
