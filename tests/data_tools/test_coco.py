import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pycocotools import mask as coco_mask

from casc.data.index import Category
from casc.errors import UserError
from data_tools import json_stream
from data_tools.coco import Annotations, check_annotations, read_annotations


def make_data() -> dict[str, Any]:
    return {
        "info": {},
        "images": [
            {"id": 1, "file_name": "a.jpg", "width": 60, "height": 50},
            {"id": 2, "file_name": "sub/b.png", "width": 30.0, "height": 40},
        ],
        "annotations": [make_annotation(id=11), make_annotation(id=12, image_id=2, category_id=3)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "ant"}],
    }


def make_annotation(**fields: Any) -> dict[str, Any]:
    entry = {
        "id": 1,
        "image_id": 1,
        "category_id": 7,
        "bbox": [1, 2.5, 3, 4],
        "area": 12.0,
        "iscrowd": 0,
        "segmentation": [[1, 2, 4, 2, 4, 6]],
    }
    return {**entry, **fields}


def kinds(annotations: Annotations) -> list[tuple[str, int]]:
    return [(finding.kind, finding.id) for finding in annotations.findings]


def test_a_sound_file_is_put_in_order(tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(make_data()))
    annotations = read_annotations(file)
    assert annotations.categories == (Category(3, "ant"), Category(7, "cat"))
    assert [image.file_name for image in annotations.images] == ["a.jpg", "sub/b.png"]
    assert annotations.images[1].width == 30
    assert [entry["id"] for entry in annotations.by_image[2]] == [12]
    assert annotations.by_image[1][0]["bbox"] == [1, 2.5, 3, 4]
    assert annotations.findings == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b'{"images": [', "not valid JSON"),
        (b"\x80", "not valid JSON"),
        (json.dumps(make_data()).encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (json.dumps(make_data()).encode("utf-16-be"), "is UTF-16; save it as UTF-8"),
        (json.dumps(make_data()).encode("utf-32"), "is UTF-32; save it as UTF-8"),
        (json.dumps(make_data()).encode("utf-32-be"), "is UTF-32; save it as UTF-8"),
        (bytes(9), "not valid JSON"),
        (gzip.compress(b"{}", mtime=0), "is compressed; unpack it"),
        (b'{"image": 1}\n{"image": 2}', "one object a line isn't COCO's format"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"images": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b"[]", "expected an object"),
        (b"null", "expected an object"),
        (b"{}", "images: missing"),
    ],
)
def test_files_that_are_not_coco_are_refused(tmp_path: Path, content: bytes, reason: str):
    file = tmp_path / "instances_x.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        read_annotations(file)
    assert str(error.value).startswith(f"{file}: ")


def test_an_absent_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"absent\.json: not found"):
        read_annotations(tmp_path / "absent.json")
    with pytest.raises(UserError, match="can't be read"):
        read_annotations(tmp_path)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("annotations", {}, "f: annotations: expected a list, got {}"),
        ("annotations", ..., "f: annotations: missing"),
        ("images", [], "f: images: empty"),
        ("categories", [], "f: categories: empty"),
        ("images.1", 5, "f: images[1]: expected an object, got 5"),
        ("images.1.id", " ", "f: images[1].id: expected an integer from 0 to 9223372036854775807"),
        ("images.1.id", -1, "f: images[1].id"),
        ("images.1.id", 2**63, "f: images[1].id"),
        ("images.1.id", True, "f: images[1].id"),
        ("images.1.id", 1, "f: images[1].id: 1 is also the id of 'a.jpg'"),
        ("images.1.id", ..., "f: images[1].id: missing"),
        (
            "images.1.width",
            0,
            "[1].width: expected the file's own, a whole number of pixels, got 0",
        ),
        ("images.1.height", ..., "f: images[1].height: missing, expected the file's own, a whole"),
        ("images.1.width", 30.5, "f: images[1].width"),
        ("images.1.height", NAN, "f: images[1].height"),
        ("images.1.height", 10**9, "f: images[1].height"),
        ("images.1.file_name", "", "f: images[1].file_name"),
        ("images.1.file_name", ["a"], "f: images[1].file_name"),
        ("images.1.file_name", "../..", "f: images[1].file_name"),
        ("images.1.file_name", "C:\\", "f: images[1].file_name"),
        ("images.1.file_name", "a\0.jpg", "NUL"),
        ("images.1.file_name", "a\ud800.jpg", "can't be a file's name"),
        ("categories.0.id", None, "f: categories[0].id"),
        ("categories.0.name", " ", "f: categories[0].name"),
        ("categories.0.id", 3, "f: categories[1].id: 3 is 'ant' here and 'cat' before"),
        ("annotations.1", [1], "f: annotations[1]: expected an object"),
        ("annotations.1.id", 1.5, "f: annotations[1].id"),
        ("annotations.1.id", 2**64, "f: annotations[1].id"),
        ("annotations.1.image_id", None, "f: annotations[1].image_id"),
        ("annotations.1.category_id", "cat", "f: annotations[1].category_id"),
        ("annotations.1.bbox", [1, 2], "f: annotations[1].bbox: expected 4 finite numbers"),
        ("annotations.1.bbox", [1, 2, 3, NAN], "got [1, 2, 3, nan]"),
        ("annotations.1.bbox", [1, 2, 3, INF], "f: annotations[1].bbox"),
        ("annotations.1.bbox", [1, 2, 3, 10**400], "f: annotations[1].bbox"),
        ("annotations.1.bbox", [1, 2, 3, "4"], "f: annotations[1].bbox"),
        ("annotations.1.bbox", [1, 2, 3, True], "f: annotations[1].bbox"),
        ("annotations.1.iscrowd", 2, "f: annotations[1].iscrowd: expected 0 or 1"),
        ("annotations.1.bbox", ["1", "2", "3", "4 px"], "f: annotations[1].bbox"),
        ("annotations.1.bbox", ["true", "2", "3", "4"], "f: annotations[1].bbox"),
        ("images.1.width", "true", "f: images[1].width"),
        ("images.1.width", "30,5", "f: images[1].width"),
        ("annotations.1.iscrowd", "no", "f: annotations[1].iscrowd"),
        ("annotations.1.ignore", 0.5, "f: annotations[1].ignore"),
        ("annotations.1.segmentation", "abc", "f: annotations[1].segmentation: expected a list"),
        ("annotations.1.segmentation", [1, 2, "3", 4, 5, 6], "annotations[1].segmentation[0]"),
        ("annotations.1.segmentation", [[1, 2], [3, None]], "annotations[1].segmentation[1]"),
        ("annotations.1.segmentation", {"counts": "a"}, "segmentation.size"),
        ("annotations.1.segmentation", {"size": [5, 5.5], "counts": []}, "segmentation.size"),
        ("annotations.1.segmentation", {"size": [5, 5]}, "segmentation.counts"),
        ("annotations.1.segmentation", {"size": [5, 5], "counts": [1, 2.0]}, "counts"),
    ],
)
def test_fields_of_a_wrong_form_are_refused_by_name(path: str, value: Any, named: str):
    data = make_data()
    *parents, last = path.split(".")
    place: Any = data
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    if value is ...:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    with pytest.raises(UserError) as error:
        check_annotations(data, "f")
    message = str(error.value)
    assert named in message
    assert "\n" not in message
    assert message.isascii()
    assert len(message) < 250


def test_copies_are_left_out_and_counted():
    data = make_data()
    data["images"].append(dict(data["images"][0]))
    data["annotations"].append(dict(data["annotations"][1]))
    data["categories"].append(dict(data["categories"][0]))
    annotations = check_annotations(data, "f")
    assert sorted(kinds(annotations)) == [
        ("duplicate_annotation", 12),
        ("duplicate_category", 7),
        ("duplicate_image", 1),
    ]
    assert len(annotations.images) == 2
    assert [entry["id"] for entry in annotations.by_image[2]] == [12]
    assert annotations.listed_images == 3
    assert annotations.listed_annotations == 3


def test_annotations_that_share_an_id_are_told_apart():
    data = make_data()
    data["annotations"] += [
        make_annotation(id=11, bbox=[9, 9, 9, 9]),
        make_annotation(id=11, bbox=[8, 8, 8, 8], image_id=2),
    ]
    annotations = check_annotations(data, "f")
    assert kinds(annotations) == [("renumbered", 11), ("renumbered", 11)]
    assert [entry["id"] for entry in annotations.by_image[1]] == [11, 13]
    assert [entry["id"] for entry in annotations.by_image[2]] == [12, 14]


def test_copies_with_nan_in_a_polygon_are_copies_still():
    data = make_data()
    bad = make_annotation(id=5, segmentation=[[NAN, 1, 2, 3, 4, 5]])
    data["annotations"] += [bad, json.loads(json.dumps(bad))]
    assert kinds(check_annotations(data, "f")) == [("duplicate_annotation", 5)]


def test_what_is_missing_but_dispensable_is_counted():
    data = make_data()
    del data["annotations"][0]["iscrowd"], data["annotations"][0]["area"]
    data["annotations"][1]["segmentation"] = None
    annotations = check_annotations(data, "f")
    assert sorted(kinds(annotations)) == [("missing_area", 11), ("missing_iscrowd", 11)]
    assert annotations.by_image[1][0]["iscrowd"] == 0
    assert annotations.by_image[1][0]["area"] is None
    assert annotations.by_image[2][0]["segmentation"] is None


RLE: Any = {"size": [40, 30], "counts": [85, 3, 37, 3, 1072]}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"bbox": ["1", "2.5", " 3 ", "4e0"]}, {"bbox": [1, 2.5, 3, 4]}),
        ({"iscrowd": "0"}, {"iscrowd": 0}),  # a truth, where it is asked whether it is one
        ({"iscrowd": "1"}, {"iscrowd": 1}),
        ({"iscrowd": "False", "ignore": "true"}, {"iscrowd": 0, "ignore": 1}),
        (
            {"segmentation": [["1", "2", ".5", "2", "4", "6"]]},
            {"segmentation": [[1, 2, 0.5, 2, 4, 6]]},
        ),
        ({"segmentation": ["1", "2", "4", "2", "4", "6"]}, {"segmentation": [[1, 2, 4, 2, 4, 6]]}),
        (
            {"segmentation": {"size": ["40", "30"], "counts": list(map(str, RLE["counts"]))}},
            {"segmentation": RLE},
        ),
    ],
)  # fmt: skip
def test_numbers_written_as_texts_are_taken_and_reported(tmp_path: Path, written: Any, meant: Any):
    data = make_data()
    data["annotations"][1] |= written
    file = tmp_path / "a.json"
    file.write_text(json.dumps(data))
    for found in (read_annotations(file), check_annotations(data, "f")):
        assert ("text_number", 12) in kinds(found)
        assert {k for k, _ in kinds(found)} <= {"text_number", "flat_outline"}
        [entry] = found.by_image[2]
        assert {key: entry[key] for key in meant} == meant


def test_sizes_written_as_texts_are_taken_and_reported():
    data = make_data()
    data["images"][1] |= {"width": "30", "height": "40.0"}
    found = check_annotations(data, "f")
    assert kinds(found) == [("text_size", 2)]
    assert found.images[1] == check_annotations(make_data(), "f").images[1]


@pytest.mark.parametrize("box", [..., None, []])
def test_boxes_that_are_missing_are_their_masks(tmp_path: Path, box: Any):
    data = make_data()
    rle = coco_mask.frPyObjects(RLE, 40, 30)
    masks = [RLE, {**rle, "counts": rle["counts"].decode()}, [[2, 3, 9, 3, 9, 8]]]
    boxes = [coco_mask.toBbox(rle).tolist()] * 2 + [[2, 3, 7, 5]]
    data["annotations"] = [
        make_annotation(id=i, image_id=2, bbox=box, segmentation=mask)
        for i, mask in enumerate(masks)
    ]
    data["annotations"].append(make_annotation(id=9, image_id=2))
    if box is ...:
        for entry in data["annotations"][:3]:
            del entry["bbox"]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(data))
    found = read_annotations(file)
    assert kinds(found)[-3:] == [("missing_box", i) for i in range(3)]
    given = make_annotation()["bbox"]
    assert [entry["bbox"] for entry in found.by_image[2]] == [*boxes, given]
    x, y, w, h = given  # were these [x, y, x, y], the masks' boxes wouldn't be
    turned = [entry["bbox"] for entry in found.by_image.with_corners()[2]]
    assert turned == [*boxes, [x, y, w - x, h - y]]
    data["annotations"][1]["segmentation"] = []
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"\[1\]\.bbox: missing, .* or a mask; .*--skip-invalid"):
        read_annotations(file)
    assert ("invalid", 1) in kinds(read_annotations(file, skip_invalid=True))


def test_annotations_without_an_id_are_numbered(tmp_path: Path):
    data = make_data()
    data["annotations"] += [make_annotation(id=None), make_annotation(image_id=2, area=3)]
    del data["annotations"][3]["id"]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(data))
    for found in (read_annotations(file), check_annotations(data, "f")):
        assert kinds(found) == [("missing_id", 13), ("missing_id", 14)]
        assert [entry["id"] for entry in found.by_image[1]] == [11, 13]
        assert [(e["id"], e["area"]) for e in found.by_image[2]] == [(12, 12.0), (14, 3)]


def test_annotations_of_unknown_images_are_counted():
    data = make_data()
    data["annotations"][1]["image_id"] = 99
    annotations = check_annotations(data, "f")
    assert kinds(annotations) == [("unknown_image", 12)]
    assert annotations.by_image[2] == []


def test_shared_names_are_mentioned():
    data = make_data()
    data["images"][1]["file_name"] = "a.jpg"
    data["categories"][1]["name"] = "cat"
    annotations = check_annotations(data, "f")
    assert kinds(annotations) == [("duplicate_category_name", 3), ("duplicate_file_name", 2)]
    assert len(annotations.images) == 2


def test_flags_may_be_booleans():
    data = make_data()
    data["annotations"][0] |= {"iscrowd": True, "ignore": True}
    data["annotations"][1] |= {"iscrowd": False, "ignore": 0}
    annotations = check_annotations(data, "f")
    assert annotations.by_image[1][0]["iscrowd"] == 1
    assert annotations.by_image[1][0]["ignore"] == 1
    assert "ignore" not in annotations.by_image[2][0]


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_a_file_is_read_in_pieces_of_any_size(tmp_path: Path, monkeypatch, chunk: int):
    """As the standard library reads it whole; annotations before images, other keys between."""
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    data = make_data()
    data["images"][0]["file_name"] = "Übung 図🙂.jpg"
    data["annotations"][1]["area"] = 12.25e-3
    data["annotations"][0]["who"] = "数 Ünal"
    data["annotations"].insert(0, make_annotation(id=9, image_id=2))
    mixed = {"info": {"a": [1, {"b": "]}"}]}, **{k: data[k] for k in sorted(data)}, "licenses": []}
    plain = json.dumps(mixed, ensure_ascii=False)
    for text in (plain, "\ufeff" + plain, json.dumps(mixed, indent=3)):
        file = tmp_path / "a.json"
        file.write_text(text, encoding="utf-8")
        found, whole = read_annotations(file), check_annotations(mixed, "f")
        assert found._replace(by_image=dict(found.by_image)) == whole._replace(
            by_image=dict(whole.by_image)
        )


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path):
    file, data = tmp_path / "a.json", make_data()
    file.write_text(json.dumps(data))
    found = read_annotations(file).by_image
    assert [entry["id"] for entry in found[1]] == [11]
    data["annotations"].reverse()
    file.write_text(json.dumps(data, indent=1))
    with pytest.raises(UserError, match=r"a\.json: changed while shards were made"):
        found[1]
    file.unlink()
    with pytest.raises(UserError, match=r"a\.json: can't be read any more"):
        found[1]


def test_new_ids_are_free_and_fit_64_bits():
    data = make_data()
    data["annotations"] = [make_annotation(id=2**63 - 1, area=area) for area in (1, 2, 3)]
    data["annotations"].append(make_annotation(id=1))
    found = check_annotations(data, "f").by_image[1]
    assert [entry["id"] for entry in found] == [2**63 - 1, 2, 3, 1]


@pytest.mark.parametrize(
    "broken",
    ['{"images": [1 2]}', '{"images" [1]}', '{"images": [1]', '{"images": []} x', '{"a": nul}',
     '{"images": [{"id": 1,}]}', "{3: 4}"],
)  # fmt: skip
def test_what_is_no_json_is_refused_wherever_it_stands(tmp_path: Path, broken: str):
    file = tmp_path / "a.json"
    file.write_text(broken)
    with pytest.raises(UserError, match=r"a\.json: not valid JSON|expected an object"):
        read_annotations(file)


def test_ids_of_many_digits_and_of_tables_of_floats():
    data = make_data()
    data["images"][0]["id"] = 12_345_678_901_234_567
    data["images"][1]["id"] = 2.0
    data["annotations"][0] |= {"image_id": 12_345_678_901_234_567, "id": 11.0}
    data["annotations"][1] |= {"image_id": 2.0, "category_id": 7.0}
    data["categories"][0]["id"] = 7.0
    found = check_annotations(data, "f")
    assert [image.id for image in found.images] == [12_345_678_901_234_567, 2]
    assert [a["id"] for a in found.by_image[12_345_678_901_234_567]] == [11]
    assert [(a["id"], a["category_id"]) for a in found.by_image[2]] == [(12, 7)]
    assert all(type(a["category_id"]) is int for a in found.by_image[2])
    assert found.categories == (Category(3, "ant"), Category(7, "cat"))


@pytest.mark.parametrize("spelt", ["{}", "00{}", "{}.0", " {}", "+{}\n"])
@pytest.mark.parametrize("other", ["{}", "00{}"])
def test_ids_that_are_texts_of_numbers(spelt: str, other: str):
    """Of any spelling, and of another where they are referred to."""
    data = make_data()
    data["images"][1]["id"] = spelt.format(2)
    data["annotations"][0] |= {"id": 11, "image_id": other.format(1), "category_id": 7}
    data["annotations"][1] |= {"id": "12", "image_id": other.format(2), "category_id": "3"}
    data["annotations"].append(make_annotation(id=spelt.format(13), image_id=2, category_id=3.0))
    data["categories"][0]["id"] = other.format(7)
    data["categories"][1]["id"] = spelt.format(3)
    found = check_annotations(data, "f")
    assert [image.id for image in found.images] == [1, 2]
    assert [(a["id"], a["category_id"]) for a in found.by_image[2]] == [(12, 3), (13, 3)]
    assert [(a["id"], a["category_id"]) for a in found.by_image[1]] == [(11, 7)]
    assert found.categories == (Category(3, "ant"), Category(7, "cat"))
    assert found.findings == []


def test_ids_that_are_texts(tmp_path: Path):
    """UUIDs get numbers that their text alone makes; padded ones are numbers already."""
    data = make_data()
    texts = ["6f1c-a", "Ünïcode"]
    numbers = [int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) for text in texts]
    data["images"][0]["id"], data["images"][1]["id"] = texts[0], "0002"
    data["annotations"][0] |= {"id": texts[1], "image_id": texts[0]}
    data["annotations"][1] |= {"id": "12", "image_id": "0002"}
    data["annotations"].append(make_annotation(id="x", image_id="nowhere"))
    file = tmp_path / "a.json"
    for turn in (1, -1):
        data["images"] = data["images"][::turn]
        file.write_text(json.dumps(data))
        found = read_annotations(file)
        assert {image.id for image in found.images} == {numbers[0], 2}
        assert [a["id"] for a in found.by_image[numbers[0]]] == [numbers[1]]
        assert [a["image_id"] for a in found.by_image[2]] == [2]
        details = {f.kind: (f.id, f.detail) for f in found.findings}
        assert details["text_image_id"] == (numbers[0], "'6f1c-a'")
        assert details["text_id"][0] == numbers[1]
        assert sorted(details) == ["text_id", "text_image_id", "unknown_image"]
        assert max(numbers) < 2**53


@pytest.mark.parametrize("area", [NAN, INF, "12", "", [12], {}])
def test_an_area_that_is_no_number_counts_as_none(area: Any):
    data = make_data()
    data["annotations"][1]["area"] = area
    found = check_annotations(data, "f")
    assert kinds(found) == [("missing_area", 12)]
    assert found.by_image[2][0]["area"] is None


@pytest.mark.parametrize(
    ("listed", "sought"),
    [
        ("/etc/passwd", "etc/passwd"),
        ("C:\\data\\a.jpg", "data/a.jpg"),
        ("../../images/a.jpg", "images/a.jpg"),
        ("a\\..\\..\\b.jpg", "a/b.jpg"),
        ("a/b..c/d.jpg", "a/b..c/d.jpg"),
    ],
)
def test_no_name_leads_out_of_the_folder(listed: str, sought: str):
    data = make_data()
    data["images"][1]["file_name"] = listed
    assert check_annotations(data, "f").images[1].file_name == sought


def test_a_list_that_is_there_twice_is_refused(tmp_path: Path):
    """Python's reader takes the last, others the first; both together nobody means."""
    data = make_data()
    for key in ("images", "annotations", "categories"):
        file = tmp_path / f"{key}.json"
        text = json.dumps(data)[:-1]
        for again in (data[key], None):
            file.write_text(
                f'{text}, "other": [1], "other": 2, {json.dumps(key)}: {json.dumps(again)}}}'
            )
            with pytest.raises(UserError, match=rf"\.json: {key}: is there twice; keep the one"):
                read_annotations(file)


def test_half_a_surrogate_pair_is_no_name(tmp_path: Path):
    """What can't be written as UTF-8 can't be read from the index again."""
    data = make_data()
    data["categories"][0]["name"] = "cat \ud83d"
    with pytest.raises(
        UserError, match=r"categories\[0\]\.name: expected a text of whole characters"
    ):
        check_annotations(data, "f")
    data["categories"][0]["name"] = "cat \N{CAT}"
    assert "cat \N{CAT}" in [c.name for c in check_annotations(data, "f").categories]


def test_lvis_names_images_by_an_address():
    data = make_data()
    del data["images"][0]["file_name"]
    data["images"][0]["coco_url"] = "http://images.cocodataset.org/train2017/000000000009.jpg"
    found = check_annotations(data, "f")
    assert found.images[0].file_name == "train2017/000000000009.jpg"


def test_up_to_ten_faults_are_named_with_the_flag_that_passes_over_them(tmp_path: Path):
    data = make_data()
    wrong = [make_annotation(id=20 + i, bbox=[1, 2, 3]) for i in range(12)]
    data["annotations"] += wrong
    with pytest.raises(UserError) as error:
        check_annotations(data, "f")
    message = str(error.value)
    assert "\n" not in message
    assert [f"annotations[{i}].bbox" in message for i in range(2, 14)] == [True] * 10 + [False] * 2
    assert "--skip-invalid" in message
    file = tmp_path / "a.json"
    file.write_text(json.dumps(data))
    found = read_annotations(file, skip_invalid=True)
    assert [(f.kind, f.id) for f in found.findings if f.kind == "invalid"] == [
        ("invalid", entry["id"]) for entry in wrong
    ]
    assert [a["id"] for i in (1, 2) for a in found.by_image[i]] == [11, 12]
    assert found.listed_annotations == 14
    # Images and categories have to be mended: nothing would be known of what is on them.
    data["images"][1]["width"] = 0
    with pytest.raises(UserError) as error:
        check_annotations(data, "f")
    assert "--skip-invalid" not in str(error.value)


def test_categories_without_an_annotation_are_reported():
    data = make_data()
    data["categories"].append({"id": 9, "name": "dodo"})
    found = [(f.kind, f.id) for f in check_annotations(data, "f").findings]
    assert found == [("unused_category", 9)]
