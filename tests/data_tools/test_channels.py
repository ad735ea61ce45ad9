"""Images of one channel, or of more than three, from files to batches."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from casc.data.decode import ImageError, decode_image
from casc.data.index import Bucket, read_index
from casc.data.sample import iter_tar, read_sample
from casc.data.stream import evaluation_batches, training_batches
from casc.errors import UserError
from data_tools.check import check_shards, fault_lines
from data_tools.show import show_shards

RNG = np.random.default_rng(0)


def noise(channels: int, height: int = 50, width: int = 60, dtype: Any = np.uint8) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype=dtype)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def pages(array: np.ndarray, **options: Any) -> bytes:
    first, *rest = (Image.fromarray(plane) for plane in np.moveaxis(array, -1, 0))
    return saved(first, "TIFF", save_all=True, append_images=rest, **options)


def test_planes_are_what_was_written():
    four = noise(4)
    assert np.array_equal(decode_image(saved(Image.fromarray(four), "PNG"), 1, 4), four)
    assert np.array_equal(decode_image(saved(Image.fromarray(four), "TIFF"), 1, 4), four)
    two = noise(2)
    assert np.array_equal(decode_image(saved(Image.fromarray(two, "LA"), "PNG"), 1, 2), two)
    for count in (2, 4, 5, 7):
        planes = noise(count)
        assert np.array_equal(decode_image(pages(planes), 1, count), planes)
        assert np.array_equal(decode_image(npy(planes), 1, count), planes)
    deep = noise(6, dtype=np.uint16)
    assert np.array_equal(decode_image(pages(deep), 1, 6), deep >> 8)
    assert np.array_equal(decode_image(npy(deep), 1, 6), deep >> 8)
    assert np.array_equal(decode_image(npy(np.asfortranarray(deep)), 1, 6), deep >> 8)
    # Turned as any image is: a quarter to the right.
    assert np.array_equal(decode_image(npy(deep), 6, 6), np.rot90(deep >> 8, -1))


def test_grey_is_grey():
    grey, colour = noise(1), noise(3)
    assert np.array_equal(decode_image(saved(Image.fromarray(grey[..., 0]), "PNG"), 1, 1), grey)
    assert np.array_equal(decode_image(npy(grey[..., 0]), 1, 1), grey)
    found = decode_image(saved(Image.fromarray(colour), "PNG"), 1, 1)
    # Weights of ITU-R 601-2, as Pillow's documentation has them.
    expected = colour @ np.array([299, 587, 114]) / 1000
    assert found.shape == (50, 60, 1)
    assert np.abs(found[..., 0] - expected).max() <= 1
    deep = noise(1, dtype=np.uint16)[..., 0]
    assert np.array_equal(
        decode_image(saved(Image.fromarray(deep), "PNG"), 1, 1)[..., 0], deep >> 8
    )


@pytest.mark.parametrize(
    ("data", "channels", "said"),
    [
        (saved(Image.fromarray(noise(3)), "PNG"), 4, "has 3 channels, expected 4"),
        (saved(Image.fromarray(noise(4)), "PNG"), 5, "has 4 channels, expected 5"),
        (pages(noise(5)), 4, "has 5 channels, expected 4"),
        (npy(noise(5)), 3, "has 5 channels, expected 3"),
        (npy(noise(5).astype(np.float32)), 5, "holds float32"),
        (npy(noise(5).astype(np.int64)), 5, "holds int64"),
        (npy(noise(5))[:-1], 5, "not a whole npy file"),
        (npy(noise(5))[:40], 5, "not a whole npy file"),
        (npy(noise(5)[0, 0]), 5, r"is an array \[5\]"),
        (npy(np.array([{}], dtype=object)), 5, "holds object"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (9999999, "
         b"9999999, 5), }" + b" " * 43 + b"\n", 5, "too large"),
    ],
)  # fmt: skip
def test_what_has_other_channels_is_refused(data: bytes, channels: int, said: str):
    with pytest.raises(ImageError, match=said):
        decode_image(data, 1, channels)


def make(coco: Any, channels: int, **settings: Any) -> tuple[Any, Path, dict[int, np.ndarray]]:
    """Shards of three files of planes, each in another format."""
    arrays = {}
    for kind in ("png", "tif", "npy"):
        array = noise(channels)
        single = array[..., 0] if channels == 1 else array
        if kind == "npy":
            data = npy(array)
        elif kind == "tif" and channels > 1:
            data = pages(array)
        elif channels in (1, 4):
            data = saved(Image.fromarray(single), "PNG" if kind == "png" else "TIFF")
        else:
            continue
        number = coco.image(data=data, name=f"{kind}.{kind}")
        coco.object(number)
        arrays[number] = array
    index, out = coco.shard(channels=channels, **settings)
    return index, out, arrays


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_shards_keep_every_plane(coco, tmp_path, channels: int):
    index, out, arrays = make(coco, channels)
    assert read_index(out) == index
    split = index.splits["train"]
    assert split.channels == channels
    assert split.train_samples == len(arrays)
    streams = (
        training_batches(out, split, seed=0, steps=range(len(arrays)), batch=1),
        evaluation_batches(out, split, batch=1),
    )
    for stream in streams:
        found = {}
        for _, batch in stream:
            assert batch.image.shape[-1] == channels
            height, width = batch.size[0].int().tolist()
            found[int(batch.image_id[0])] = batch.image[0, :height, :width].numpy()
        assert found.keys() == arrays.keys()
        for number, array in arrays.items():
            assert np.array_equal(found[number], array)
    assert not fault_lines(check_shards(out))
    assert len(show_shards(out, tmp_path / "sheet.png")) == len(arrays)


@pytest.mark.parametrize("channels", [1, 5])
def test_planes_are_reduced_each_by_itself(coco, channels: int):
    index, out, arrays = make(coco, channels, max_size=48)
    split = index.splits["train"]
    for _, batch in evaluation_batches(out, split, batch=1):
        height, width = batch.size[0].int().tolist()
        assert (height, width) == (40, 48)
        whole = arrays[int(batch.image_id[0])]
        for i in range(channels):
            plane = Image.fromarray(whole[..., i]).resize((48, 40), Image.Resampling.LANCZOS)
            assert np.array_equal(batch.image[0, :height, :width, i].numpy(), np.asarray(plane))


def test_files_of_other_channels_are_left_out_and_reported(coco):
    coco.object(coco.image(data=saved(Image.fromarray(noise(4)), "PNG")))
    wrong = coco.image()
    coco.object(wrong)
    index, _ = coco.shard(channels=4)
    found = index.splits["train"].report["findings"]["unreadable"]
    assert found["ids"] == str(wrong)
    assert "has 3 channels, expected 4" in found["examples"][0]


def test_grey_of_colours_is_reported_and_bad_settings_refused(coco):
    coco.object(coco.image())
    index, out = coco.shard(channels=1)
    assert index.splits["train"].report["findings"]["colour"]["count"] == 1
    for settings, flag in (({"channels": 0}, "channels"), ({"channels": 4, "stretch": True}, "st")):
        with pytest.raises(UserError, match=f"--{flag}"):
            coco.shard(out, **settings)


def test_buckets_that_are_positional_stay_rgb():
    assert Bucket("", 0, None, 1, 1, 1, 1, 1).channels == 3


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_a_tiffs_orientation_turns_pixels_and_boxes(coco, channels):
    """All eight, from the file to the decoded sample, as Pillow's `exif_transpose` turns them."""
    true, boxes = {}, {}
    stored = RNG.integers(0, 200, (50, 60, channels), dtype=np.uint8)
    stored[5:17, 8:40] = 255  # the object, which no turn leaves in its place
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        if channels == 5:
            data = pages(stored, exif=exif)
        else:
            data = saved(Image.fromarray(stored.squeeze()), "TIFF", exif=exif)
        with Image.open(io.BytesIO(data)) as opened:
            planes = []
            for page in range(5 if channels == 5 else 1):
                opened.seek(page)
                planes.append(np.asarray(ImageOps.exif_transpose(opened)))
        upright = np.dstack(planes)
        rows, columns = ((upright == 255).all(axis=-1).any(axis=axis) for axis in (1, 0))
        (y0, y1), (x0, x1) = (np.flatnonzero(seen)[[0, -1]] + [0, 1] for seen in (rows, columns))
        image = coco.image(*upright.shape[1::-1], data=data, name=f"{orientation}.tif")
        box = [int(v) for v in (x0, y0, x1 - x0, y1 - y0)]
        ring = [[int(v) for v in (x0, y0, x1, y0, x1, y1, x0, y1)]]
        coco.object(image, bbox=box, segmentation=ring, area=box[2] * box[3])
        true[image], boxes[image] = upright, [x0, y0, x1, y1]
    assert len({tuple(box) for box in boxes.values()}) == 8
    index, out = coco.shard(channels=channels)
    found = {}
    for shard in index.splits["train"].shards:
        for _, data, text in iter_tar(out / shard.name):
            sample = read_sample(data, text, channels=channels)
            found[sample.image_id] = sample
    assert len(found) == 8
    for image, sample in found.items():
        assert np.array_equal(sample.image, true[image]), index.splits["train"].report
        assert sample.boxes.tolist() == [boxes[image]]
        assert sample.edges[0].min(axis=0).tolist()[:2] == boxes[image][:2]
