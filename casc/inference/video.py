"""Videos and animations, frame by frame, and annotated videos out.

Animations are Pillow's, videos PyAV's, which brings its FFmpeg along (extra `video`).
"""

import io
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageSequence

from casc.data.decode import NPY, ImageError, max_pixels, open_image, rgb
from casc.inference.detector import Detector
from casc.inference.results import Results

SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts"))
"""Files that are taken for videos."""
_ANIMATIONS = frozenset(("GIF", "WEBP", "PNG"))
"""Pillow's formats of images that may move."""
_CONTAINERS = "mov,mp4,matroska,webm,avi,mpeg,mpegts"
"""What FFmpeg may open: none that refers to other files, as playlists do."""
_TICKS = 90_000
"""A second in a video that is written."""
_STILL = 0.1
"""Seconds of an animation's frame that says nothing, or 0, as browsers have it."""


class Frame(NamedTuple):
    """A picture of a video."""

    image: np.ndarray
    """`[h, w, 3]` uint8 RGB, upright."""
    seconds: float
    """When it is shown, from the start."""


class FoundFrame(NamedTuple):
    """What was found in a frame."""

    number: int
    seconds: float
    results: Results

    def to_dict(self) -> dict[str, Any]:
        """Give what JSON can hold: `frame`, `seconds`, and what `Results.to_dict` has."""
        seconds = round(self.seconds, 6)
        return {"frame": self.number, "seconds": seconds, **self.results.to_dict()}


def is_animated(data: bytes) -> bool:
    """Whether an image file has several frames.

    Raises:
        ImageError: it isn't an image.
    """
    if data.startswith(NPY):
        return False
    with open_image(data) as image:
        # A TIFF's pages are no frames, nor are the previews that cameras put into a JPEG.
        return image.format in _ANIMATIONS and getattr(image, "n_frames", 1) > 1


def find_in_frames(
    detector: Detector, frames: Iterable[Frame], *, threshold: float = 0.5, batch: int = 1
) -> Iterator[FoundFrame]:
    """Detect objects in one frame after the other; few are held at a time.

    Arguments and errors are those of `Detector.stream`; the detector is one of RGB images.
    """
    times: deque[float] = deque()

    def images() -> Iterator[np.ndarray]:
        for frame in frames:
            times.append(frame.seconds)
            yield frame.image

    found = detector.stream(images(), threshold=threshold, batch=batch)
    for number, results in enumerate(found):
        yield FoundFrame(number, times.popleft(), results)


def read_animation(data: bytes) -> Iterator[Frame]:
    """Yield the frames of a GIF, WebP or animated PNG.

    Raises:
        ImageError: it can't be decoded.
    """
    with open_image(data) as image:
        seconds = 0.0
        frames = iter(ImageSequence.Iterator(image))
        while True:
            try:
                frame = next(frames, None)
                if frame is None:
                    return
                picture = rgb(frame)
                # What a WebP says is known once it is decoded.
                shown = frame.info.get("duration", 0) / 1000
            except ImageError:
                raise
            except Exception as error:  # Pillow's decoders raise whatever they stumble upon
                raise ImageError(f"can't be decoded: {error}") from None
            yield Frame(np.ascontiguousarray(picture), seconds)
            seconds += shown or _STILL


def read_video(source: Path | bytes) -> Iterator[Frame]:
    """Yield the frames of a video, turned upright.

    Args:
        source: a file, or its bytes.

    Raises:
        ImageError: PyAV isn't installed, or the video can't be decoded or is too large.
        OSError: the file can't be read.
    """
    av = _av()
    # An open file, not a name, which FFmpeg might take for an address.
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        try:
            with av.open(file, options={"format_whitelist": _CONTAINERS}) as container:
                yield from _frames(container)
        except (av.error.FFmpegError, IndexError) as error:
            raise ImageError(f"can't be decoded: {getattr(error, 'strerror', error)}") from None


def _frames(container: Any) -> Iterator[Frame]:
    if not container.streams.video:
        raise ImageError("has no pictures")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > max_pixels():
        raise ImageError(f"is too large ({width} x {height}, more than {max_pixels()} pixels)")
    rate, start = stream.average_rate or Fraction(25), None
    number = -1
    for number, frame in enumerate(container.decode(stream)):
        seconds = float(number / rate) if frame.time is None else frame.time
        start = seconds if start is None else start
        image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
        yield Frame(np.ascontiguousarray(image), max(0.0, seconds - start))
    if number < 0:
        raise ImageError("has no pictures")


@contextmanager
def video_writer(path: Path) -> Iterator[Any]:
    """Write an mp4 that only is there when it is whole: gives a function (picture, seconds).

    Pictures are Pillow's, all of one size; without any there is no file.

    Raises:
        ImageError: PyAV isn't installed.
    """
    av = _av()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    making = path.with_name(f".{path.name}.part")
    try:
        with av.open(str(making), "w", format="mp4") as container:
            stream = container.add_stream(codec, rate=25)
            stream.codec_context.time_base = Fraction(1, _TICKS)
            last = -1

            def write(picture: Image.Image, seconds: float) -> None:
                nonlocal last
                pixels = np.asarray(picture)
                high, wide = (side % 2 for side in pixels.shape[:2])
                # The codec has one colour for each 2 x 2 pixels.
                pixels = np.pad(pixels, ((0, high), (0, wide), (0, 0)), mode="edge")
                if last < 0:
                    stream.height, stream.width = pixels.shape[:2]
                    stream.pix_fmt = "yuv420p"
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                last = frame.pts = max(last + 1, round(seconds * _TICKS))
                frame.time_base = Fraction(1, _TICKS)
                container.mux(stream.encode(frame))

            yield write
            if last >= 0:
                container.mux(stream.encode(None))
        if last >= 0:
            making.replace(path)
    finally:
        making.unlink(missing_ok=True)


def _av() -> Any:
    try:
        import av
        import av.error
    except ImportError:
        raise ImageError("videos and animations need PyAV: pip install 'casc[video]'") from None
    return av
