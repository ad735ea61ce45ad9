"""Videos and animations: every frame, in its time, upright, and a video out."""

import json
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from casc.data.batch import Batch
from casc.data.decode import ImageError
from casc.data.index import Category
from casc.device.compute import Compute
from casc.inference import images
from casc.inference.detector import Detector
from casc.inference.predict import predict
from casc.inference.video import Frame, is_animated, read_animation, read_video, video_writer
from casc.model.detector_config import DetectorConfig
from casc.model.forward_detect import Detections
from casc.model.preprocess import ImageConfig

SIZE = (64, 96)
TIMES = (0.0, 0.1, 0.3, 0.35)


def frame(number: int) -> np.ndarray:
    """A red square that moves to the right, on grey."""
    image = np.full((*SIZE, 3), 90, np.uint8)
    image[16:48, 8 + 16 * number : 40 + 16 * number] = (250, 0, 0)
    return image


def write_mp4(path: Path, turned: bool = False) -> None:
    """Four frames at `TIMES`; perhaps of a camera that was held upright."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, seconds in enumerate(TIMES):
            picture = av.VideoFrame.from_ndarray(frame(number), format="rgb24")
            picture.pts, picture.time_base = round(seconds * 1000), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    if turned:
        data = path.read_bytes()
        at = data.index(b"tkhd") + 44

        def matrix(a: int, b: int, c: int, d: int) -> bytes:
            rows = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
            return b"".join(v.to_bytes(4, "big", signed=True) for v in rows)

        one = 1 << 16
        assert data[at : at + 36] == matrix(one, 0, 0, one)
        path.write_bytes(data[:at] + matrix(0, one, -one, 0) + data[at + 36 :])


def write_animation(path: Path) -> None:
    pictures = [Image.fromarray(frame(number)) for number in range(4)]
    durations = [100, 200, 50, 100]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def assert_shows(frames: list[Frame], times: tuple[float, ...] = TIMES) -> None:
    assert len(frames) == 4
    np.testing.assert_allclose([f.seconds for f in frames], times, atol=1e-3)
    for number, each in enumerate(frames):
        assert np.abs(each.image.astype(int) - frame(number)).mean() < 6


def test_videos_are_read_frame_by_frame(tmp_path: Path):
    write_mp4(tmp_path / "a.mp4")
    assert_shows(list(read_video(tmp_path / "a.mp4")))
    assert_shows(list(read_video((tmp_path / "a.mp4").read_bytes())))


def test_a_video_of_a_camera_held_upright_is_turned(tmp_path: Path):
    write_mp4(tmp_path / "a.mp4", turned=True)
    frames = list(read_video(tmp_path / "a.mp4"))
    assert frames[0].image.shape == (96, 64, 3)
    # Shown after a quarter turn to the right.
    assert_shows([f._replace(image=np.rot90(f.image)) for f in frames])


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animations_are_read_frame_by_frame(tmp_path: Path, name: str):
    write_animation(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    assert is_animated(data)
    assert_shows(list(read_animation(data)))


def test_one_picture_is_no_animation(tmp_path: Path):
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        Image.fromarray(frame(0)).save(tmp_path / name)
        assert not is_animated((tmp_path / name).read_bytes())
    pages = [Image.fromarray(frame(n)) for n in range(2)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert not is_animated((tmp_path / "pages.tif").read_bytes())
    pages[0].save(tmp_path / "camera.jpg", format="MPO", save_all=True, append_images=pages[1:])
    assert not is_animated((tmp_path / "camera.jpg").read_bytes())


def test_what_is_no_video_is_refused(tmp_path: Path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"not a video" * 100)
    with pytest.raises(ImageError, match="can't be decoded"):
        list(read_video(tmp_path / "a.mp4"))
    # A playlist names other files, which nobody asked for.
    (tmp_path / "b.mp4").write_text("#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\n/etc/passwd\n")
    with pytest.raises(ImageError, match="can't be decoded"):
        list(read_video(tmp_path / "b.mp4"))
    write_mp4(tmp_path / "c.mp4")
    monkeypatch.setattr("casc.inference.video.max_pixels", lambda: 6000)
    with pytest.raises(ImageError, match=r"too large \(96 x 64, more than 6000"):
        list(read_video(tmp_path / "c.mp4"))
    with pytest.raises(OSError, match="No such file"):
        list(read_video(tmp_path / "d.mp4"))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImageError, match=r"pip install 'casc\[video\]'"):
        list(read_video(tmp_path / "c.mp4"))


def test_pictures_of_odd_sizes_are_written_in_their_time(tmp_path: Path):
    with video_writer(tmp_path / "a.mp4") as write:
        for number, seconds in enumerate(TIMES):
            write(Image.fromarray(frame(number)[:63, :95]), seconds)
    frames = list(read_video(tmp_path / "a.mp4"))
    assert frames[0].image.shape == (64, 96, 3)
    assert_shows(frames)
    assert [f.name for f in tmp_path.iterdir()] == ["a.mp4"]
    with pytest.raises(KeyError), video_writer(tmp_path / "b.mp4") as write:
        write({}["a picture"], 0.0)
    with video_writer(tmp_path / "c.mp4"):
        pass
    assert [f.name for f in tmp_path.iterdir()] == ["a.mp4"]


def find(batch: Batch) -> Detections:
    """The red square, if there is one."""
    found = Detections(
        *(torch.zeros(1, 1, 4), torch.full((1, 1), 0.9), torch.zeros(1, 1, dtype=torch.long)),
        *(torch.zeros(1, 1, dtype=torch.bool), torch.ones(1, 1, 28, 28)),
    )
    image = batch.image[0].int()
    red = (image[..., 0] - image[..., 1]) > 60
    if red.any():
        y, x = (np.flatnonzero(red.any(dim=d).numpy()) for d in (1, 0))
        found.boxes[0, 0] = torch.tensor([x[0], y[0], x[-1] + 1, y[-1] + 1])
        found.valid[0, 0] = True
    return found


@pytest.fixture
def detector() -> Detector:
    class Finder(Detector):
        def detect(self, batch, size, inference=None, image=None):
            return find(batch)

    compute, classes = Compute(compile=False), (Category(4, "red"),)
    config = DetectorConfig(classes=1)
    return Finder({}, {}, config, ImageConfig(), compute, torch.device("cpu"), classes)


def test_videos_become_videos_and_lines(tmp_path: Path, detector: Detector, monkeypatch):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    write_mp4(folder / "a.mp4")
    write_animation(folder / "b.gif")
    Image.fromarray(frame(0)).save(folder / "b.png")
    (folder / "c.mov").write_bytes(b"broken")
    data = (folder / "a.mp4").read_bytes()
    monkeypatch.setattr(images, "read_remote", lambda url, loading: data)
    lines: list[str] = []
    done = predict(detector, [folder, "https://host/d.mp4?key=1"], out, log=lines.append)
    assert [p.name for p in done.pictures] == ["a.mp4", "b.mp4", "b-2.jpg", "d.mp4"]
    assert [(Path(name).name, done.exit_code) for name, _ in done.failed] == [("c.mov", 1)]
    # Of a still image alone is there what COCO has.
    assert [(r["image_id"], r["file_name"]) for r in done.results] == [(2, "b.png")]
    assert lines[0] == f"{folder / 'a.mp4'}: 4 red -> {out / 'a.mp4'}"
    for name in ("a", "b", "d"):
        told = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert [each["frame"] for each in told] == [0, 1, 2, 3]
        np.testing.assert_allclose([each["seconds"] for each in told], TIMES, atol=1e-3)
        for number, each in enumerate(told):
            assert (each["height"], each["width"]) == SIZE
            (only,) = each["detections"]
            expected = [8 + 16 * number, 16, 40 + 16 * number, 48]
            np.testing.assert_allclose(only["box"], expected, atol=1)
        drawn = list(read_video(out / f"{name}.mp4"))
        np.testing.assert_allclose([each.seconds for each in drawn], TIMES, atol=1e-3)
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("channels", [1, 5])
def test_models_of_other_images_refuse_videos_in_a_line(tmp_path: Path, detector, channels: int):
    class Blind(Detector):
        def detect(self, batch, size, inference=None, image=None):
            assert batch.image.shape[3] == channels
            return find(batch._replace(image=torch.zeros(1, 1, 1, 3)))

    names = ("params", "buffers", "model", "image", "compute", "device", "categories")
    fields = {name: getattr(detector, name) for name in names}
    blind = Blind(**{**fields, "image": ImageConfig(channels=channels)})
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    write_mp4(folder / "a.mp4")
    write_animation(folder / "b.gif")
    np.save(folder / "c.npy", np.zeros((40, 50, channels), np.uint8))
    lines: list[str] = []
    done = predict(blind, [folder], out, log=lines.append)
    assert [p.name for p in done.pictures] == ["c.jpg"]
    assert [Path(name).name for name, _ in done.failed] == ["a.mp4", "b.gif"]
    told = f"skipped: videos and animations are RGB, but the model's --image.channels is {channels}"
    assert all(told in line and "\n" not in line for line in lines[:2])
    assert sorted(p.name for p in out.iterdir()) == ["c.jpg", "predictions.json"]


def test_inputs_are_not_overwritten(tmp_path: Path, detector: Detector):
    write_mp4(tmp_path / "a.mp4")
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(ValueError, match="would overwrite"):
        predict(detector, [tmp_path / "a.mp4"], tmp_path)
    assert (tmp_path / "a.mp4").read_bytes() == before
