import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from casc.data.sample import (
    annotation_edges,
    annotations_edges,
    iter_tar,
    polygon_edges,
    read_sample,
    signed_area,
)
from casc.errors import UserError

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded() -> bytes:
    out = io.BytesIO()
    Image.fromarray(IMAGE).save(out, "PNG")
    return out.getvalue()


def record(**fields: Any) -> bytes:
    objects = [
        {
            "train": True,
            "box": [1, 2, 11.5, 12],
            "label": 4,
            "segmentation": [[1, 2, 11, 2, 5, 12]],
        },
        {"train": False, "box": [0, 0, 9, 9], "label": 1, "segmentation": {"size": [20, 30]}},
        {
            "train": True,
            "box": [-3, 0, 4, 4],
            "label": 0,
            "segmentation": {"size": [20, 30], "counts": [600]},
            "rings": [[0, 0, 4, 0, 4, 4, 0, 4], [1, 1, 1, 2, 2, 2, 2, 1]],
        },
    ]
    whole = {
        "image_id": 9,
        "file_name": "a.png",
        "width": 30,
        "height": 20,
        "orientation": 1,
        "train": True,
        "annotations": objects,
    }
    return json.dumps({**whole, **fields}).encode()


def test_reads_what_is_trained_on():
    sample = read_sample(encoded(), record())
    np.testing.assert_array_equal(sample.image, IMAGE)
    np.testing.assert_array_equal(sample.boxes, [[1, 2, 11.5, 12], [-3, 0, 4, 4]])
    assert sample.boxes.dtype == np.float32
    np.testing.assert_array_equal(sample.labels, [4, 0])
    assert sample.labels.dtype == np.int64
    assert [len(edges) for edges in sample.edges] == [3, 8]
    assert all(edges.dtype == np.float32 for edges in sample.edges)
    assert sample.segmentations[0] == [[1, 2, 11, 2, 5, 12]]
    assert sample.image_id == 9


def test_an_image_without_objects_has_empty_arrays():
    sample = read_sample(encoded(), record(annotations=[]))
    assert sample.boxes.shape == (0, 4)
    assert sample.labels.shape == (0,)
    assert sample.edges == []


def test_an_image_is_turned_as_its_record_says():
    sample = read_sample(encoded(), record(orientation=6, width=20, height=30, annotations=[]))
    np.testing.assert_array_equal(sample.image, np.rot90(IMAGE, -1))


def test_another_size_than_recorded_is_refused():
    with pytest.raises(UserError, match=r"a\.png: decodes to 30 x 20"):
        read_sample(encoded(), record(width=31))


def winding(edges: np.ndarray, x: float, y: float) -> int:
    """Winding number of a point, by the crossings of a ray to the left."""
    number = 0
    for x0, y0, x1, y1 in edges.tolist():
        if (y0 <= y) != (y1 <= y) and x0 + (y - y0) / (y1 - y0) * (x1 - x0) < x:
            number += 1 if y1 > y0 else -1
    return number


def test_parts_that_run_either_way_unite():
    first = [2, 2, 12, 2, 12, 12, 2, 12]
    second = [8, 8, 8, 18, 18, 18, 18, 8]  # the other way round
    for parts in ([first, second], [second, first]):
        edges = polygon_edges(parts)
        assert [winding(edges, x, x) != 0 for x in (1, 5, 10, 15, 19)] == [
            False,
            True,
            True,
            True,
            False,
        ]
        assert winding(edges, 10, 10) == winding(edges, 5, 5) * 2


def test_rings_keep_their_direction_so_that_holes_stay_open():
    hole: Any = {"rings": [[0, 0, 9, 0, 9, 9, 0, 9], [3, 3, 3, 6, 6, 6, 6, 3]], "segmentation": {}}
    edges = annotation_edges(hole)
    assert winding(edges, 1, 1) == 1 or winding(edges, 1, 1) == -1
    assert winding(edges, 4.5, 4.5) == 0


@given(
    parts=st.lists(
        st.lists(st.integers(0, 20), max_size=14).map(lambda v: v[: len(v) // 2 * 2]), max_size=4
    ),
    keep=st.booleans(),
)
def test_edges_close_every_part_and_have_length(parts: list[list[float]], keep: bool):
    edges = polygon_edges(parts, keep_direction=keep)
    assert edges.dtype == np.float32
    assert edges.shape[1:] == (4,)
    assert (edges[:, :2] != edges[:, 2:]).any(axis=1).all()
    # As many edges start at a point as end there.
    starts = sorted(map(tuple, edges[:, :2].tolist()))
    assert starts == sorted(map(tuple, edges[:, 2:].tolist()))
    # Green's theorem gives the parts' areas back.
    green = 0.5 * float((edges[:, 0] * edges[:, 3] - edges[:, 2] * edges[:, 1]).sum())
    used = [np.reshape(part, (-1, 2)).astype(float) for part in parts if len(part) >= 6]
    areas = [signed_area(part) for part in used]
    assert green == pytest.approx(sum(areas if keep else map(abs, areas)), abs=1e-3)


PARTS = st.lists(
    st.lists(st.integers(0, 20), max_size=14).map(lambda v: v[: len(v) // 2 * 2]), max_size=4
)


def by_hand(parts: list[list[float]], keep: bool) -> list[tuple[float, ...]]:
    """Edges, one part and point after the other."""
    edges = []
    for part in parts:
        points = list(zip(part[::2], part[1::2], strict=True))
        if len(points) < 3:
            continue
        following = points[1:] + points[:1]
        turns = zip(points, following, strict=True)
        if sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in turns) < 0 and not keep:
            points = points[::-1]
            following = points[1:] + points[:1]
        edges += [(*p, *q) for p, q in zip(points, following, strict=True) if p != q]
    return edges


@given(st.lists(st.tuples(PARTS, st.booleans()), max_size=5))
def test_edges_of_many_objects_are_each_objects_own(objects: list[tuple[Any, bool]]):
    annotations: list[Any] = [
        {"rings": parts, "segmentation": {}} if keep else {"segmentation": parts}
        for parts, keep in objects
    ]
    together = annotations_edges(annotations)
    assert len(together) == len(objects)
    for edges, annotation, (parts, keep) in zip(together, annotations, objects, strict=True):
        assert edges.dtype == np.float32
        assert edges.shape[1:] == (4,)
        assert list(map(tuple, edges.tolist())) == by_hand(parts, keep)
        np.testing.assert_array_equal(edges, annotation_edges(annotation))


@pytest.mark.parametrize(
    "parts",
    [
        [[0, 0, 4, 0, 4, 4, 0]],
        [[0, 0, 4, 0, 4, 4, 0], [0, 0, 4, 0, 4, 4, 0]],
        [[[0, 0], [4, 0], [4, 4], [0, 4], [1, 1], [2, 2]]],
    ],
)
def test_polygons_that_are_no_flat_lists_of_pairs_are_refused(parts: Any):
    with pytest.raises(ValueError, match="polygon"):
        polygon_edges(parts)


def test_area_is_positive_clockwise_on_the_screen():
    assert signed_area(np.array([[0, 0], [4, 0], [4, 3], [0, 3.0]])) == 12
    assert signed_area(np.array([[0, 0], [0, 3], [4, 3], [4, 0.0]])) == -12
    # Far from the origin nothing is lost.
    far = np.array([[0, 0], [1, 0], [1, 1], [0, 1.0]]) + 1e8
    assert signed_area(far) == 1


def tar(*members: tuple[str, bytes], other: str = "", kind: bytes = b"", mode: str = "w") -> bytes:
    out = io.BytesIO()
    archive: tarfile.TarFile
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        if other:
            entry = tarfile.TarInfo(other)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


PAIRS = [("01.jpg", b"x" * 700), ("01.json", b"{}"), ("02.png", b"y"), ("02.json", b"[]")]


def test_a_tar_gives_its_pairs_in_order(tmp_path: Path):
    data = tar(*PAIRS)
    expected = [("01", b"x" * 700, b"{}"), ("02", b"y", b"[]")]
    assert list(iter_tar(io.BytesIO(data))) == expected
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    assert list(iter_tar(path)) == expected
    assert list(iter_tar(str(path))) == expected


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (PAIRS[:3], "'02' has the members png, not one image and one json"),
        (PAIRS[1:], "'01' has the members json, not"),
        ([PAIRS[0], PAIRS[3]], "'01' has the members jpg, not"),
        ([PAIRS[0], PAIRS[2]], "'01' has the members jpg, not"),
        ([PAIRS[0], ("01.png", b"y"), PAIRS[1]], "'01' has the members jpg, png, json, not"),
        ([*PAIRS[:2], PAIRS[1]], "01.json: duplicate"),
        ([*PAIRS[:2], ("README", b"")], "'README' has the members , not"),
    ],
)
def test_members_without_a_partner_are_refused(members: list[tuple[str, bytes]], reason: str):
    with pytest.raises(UserError, match=reason):
        list(iter_tar(io.BytesIO(tar(*members))))


def test_a_damaged_tar_is_named(tmp_path: Path):
    path = tmp_path / "broken.tar"
    path.write_bytes(tar(*PAIRS)[:900])
    with pytest.raises(UserError, match=r"broken\.tar: not a complete tar"):
        list(iter_tar(path))
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"broken\.tar"):
        list(iter_tar(path))
    with pytest.raises(UserError, match=r"absent\.tar: can't be opened"):
        list(iter_tar(tmp_path / "absent.tar"))


def test_links_are_never_read_and_folders_passed_over():
    expected = [("01", b"x" * 700, b"{}"), ("02", b"y", b"[]")]
    whole = tar(*PAIRS, other="folder", kind=tarfile.DIRTYPE)
    assert list(iter_tar(io.BytesIO(whole))) == expected
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        linked = tar(PAIRS[1], other="01.jpg", kind=kind)
        with pytest.raises(UserError, match="'01' has the members json, not one image"):
            list(iter_tar(io.BytesIO(linked)))


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_refused(mode: str):
    """One of a few kilobytes may unpack to more than there is memory."""
    bomb = tar(("01.jpg", bytes(10**6)), PAIRS[1], mode=mode)
    with pytest.raises(UserError, match="doesn't begin with a tar header"):
        list(iter_tar(io.BytesIO(bomb)))


@pytest.mark.parametrize("bytes_before", [0, 512, 20_000, 40_000])
def test_what_reading_raises_keeps_its_words(bytes_before: int):
    class Failing(io.BytesIO):
        def read(self, count: int | None = -1, /) -> bytes:
            if self.tell() + (count or 0) > bytes_before:
                raise UserError("the server says 500")
            return super().read(count)

    data = tar(("01.jpg", b"x" * 30_000), PAIRS[1], ("02.jpg", b"x" * 30_000), PAIRS[3])
    with pytest.raises(UserError) as raised:
        list(iter_tar(Failing(data)))
    assert str(raised.value) == "the server says 500"
