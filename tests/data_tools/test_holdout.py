"""`--val-share`: by image, seeded, with rare classes on both sides, and nothing lost."""

import json

import pytest

from casc.data.index import read_index
from casc.data.sample import iter_tar
from casc.errors import UserError


def ids(out, split) -> dict[int, set[int]]:
    """Category ids by image id."""
    found = {}
    for shard in read_index(out).splits[split].shards:
        for _, _, text in iter_tar(out / shard.name):
            record = json.loads(text)
            found[record["image_id"]] = {a["category_id"] for a in record["annotations"]}
    return found


def fill(coco, count=40, rare=10):
    for i in range(count):
        number = coco.image(40, 36, id=1000 + i)
        coco.object(number, bbox=[2, 2, 20, 10], segmentation=[[2, 2, 22, 2, 22, 12, 2, 12]])
        if i < rare:
            coco.object(number, category_id=1)


def test_images_are_held_out_with_rare_classes_on_both_sides(coco, tmp_path):
    fill(coco)
    index, out = coco.shard(val_share=0.2)
    train, val = ids(out, "train"), ids(out, "val")
    assert sorted([*train, *val]) == [image["id"] for image in coco.images]
    assert len(val) == 8
    assert sum(1 in numbers for numbers in val.values()) == 2
    listed = [index.splits[name].report["annotations"]["listed"] for name in ("train", "val")]
    assert sum(listed) == len(coco.annotations)
    # The order of the file doesn't count, the seed does.
    coco.images.reverse()
    coco.annotations.reverse()
    _, again = coco.shard(tmp_path / "again", val_share=0.2)
    assert ids(again, "val") == val
    _, other = coco.shard(tmp_path / "other", val_share=0.2, val_seed=1)
    assert set(ids(other, "val")) != set(val)


def test_a_file_under_several_ids_is_in_one_part(coco, tmp_path):
    """Else what is measured on was trained on."""
    fill(coco)
    for i, image in enumerate(coco.images):
        image["file_name"] = coco.images[i // 2 * 2]["file_name"]
    _, out = coco.shard(val_share=0.2)
    train, val = ids(out, "train"), ids(out, "val")
    assert (len(train), len(val)) == (32, 8)
    assert not {number // 2 for number in train} & {number // 2 for number in val}
    assert sum(1 in numbers for numbers in val.values()) == 2
    coco.images.reverse()
    _, again = coco.shard(tmp_path / "again", val_share=0.2)
    assert ids(again, "val") == val


@pytest.mark.parametrize(("share", "count"), [(0.5, 1), (0.1, 3)])
def test_a_part_without_images_is_refused(coco, share, count):
    fill(coco, count)
    with pytest.raises(UserError, match="--val-share"):
        coco.shard(val_share=share)


def test_parts_that_are_there_are_not_split_again(coco):
    fill(coco, 3)
    other = type(coco)(coco.root, "val")
    other.object(other.image())
    other.write()
    with pytest.raises(UserError, match=r"--val-share: .*train, val"):
        coco.shard(val_share=0.3)
