import json
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

from casc.bench.decoders import agreement, decoders
from casc.bench.loader import LoaderCommand
from casc.bench.loader_parts import choose, load, time_parts
from casc.bench.loader_usual import load_usually
from casc.data.collate import collate
from casc.data.index import read_index
from casc.data.sample import iter_tar, read_sample
from casc.errors import UserError
from casc.model.preprocess import ImageConfig, plain_view, prepare
from data_tools.cli import ShardCommand
from data_tools.synth import SynthSettings, synthesise


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loader")
    synthesise(folder / "coco", {"train2017": 12}, SynthSettings(size=96))
    ShardCommand(folder / "coco", folder / "shards", workers=1, progress=False).run()
    return folder / "shards"


def test_prints_one_object(shards, capsys):
    arguments = f"{shards} --samples 6 --rounds 2 --workers 0 1 --seconds 0.1 --json".split()
    command = tyro.cli(LoaderCommand, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    assert command.run() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 6
    assert found["rounds"] == 2
    for name in ("img_per_s", "usual_img_per_s", "usual_last_img_per_s", "ratio", "ratio_last"):
        spread = found[name]
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert {"read", "JSON", "decode", "edges", "collate"} <= set(found["shares"])
    assert found["read_img_per_s"] > 0
    assert found["decode_img_per_s"]["pillow"] > 0
    assert set(found["decoders_equal"]) == set(found["decode_img_per_s"])
    assert [rate["workers"] for rate in found["workers"]] == [0, 1]
    for rate in found["workers"]:
        assert rate["img_per_s"] == pytest.approx(2 * rate["steps_per_s"])


def test_makes_its_own_images_and_prints_a_table(capsys):
    command = LoaderCommand(samples=8, rounds=1, workers=())
    assert command.run() == 0
    table = capsys.readouterr().out
    assert "8 images of 0." in table
    assert "casc / usual" in table
    assert torch.get_num_threads() >= 1


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rounds": 0}, "--rounds"),
        ({"workers": (-1,)}, "--workers"),
        ({"split": "other"}, "--split other"),
    ],
)
def test_wrong_numbers_are_refused(shards, fields, reason):
    with pytest.raises(UserError, match=reason):
        LoaderCommand(shards, **fields).run()


def test_samples_come_from_all_buckets(shards):
    split = read_index(shards).splits["train2017"]
    assert len(split.buckets) > 1
    for samples in (len(split.buckets) * 2, 10**6):
        work = choose(split, samples)
        wanted = min(samples, split.train_samples)
        assert sum(segment.stop - segment.start for _, segment in work) == wanted
    names = {bucket.name for bucket, _ in choose(split, 10**6)}
    assert names == {split.buckets[s.bucket].name for s in split.shards if s.train}


def test_parts_are_of_the_whole(shards):
    split = read_index(shards).splits["train2017"]
    work = choose(split, 12)
    load(shards, split, work, 2)
    parts = time_parts(shards, split, work, 2)
    assert all(seconds >= 0 for seconds in parts.values())
    assert parts["decode"] > 0


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_the_usual_way_does_the_same_work(shards, flip, last):
    """Else there would be nothing to compare with."""
    split = read_index(shards).splits["train2017"]
    config = ImageConfig(short=120, long=200)
    compared = 0
    for shard in (s for s in split.shards if s.train):
        bucket = split.buckets[shard.bucket]
        for _, image, record in list(iter_tar(shards / shard.name))[:2]:
            batch = collate([read_sample(image, record)], bucket, bitmaps=True)
            view = plain_view(batch.size, config)._replace(flip=torch.tensor([flip]))
            ours = prepare(batch, view, config, (224, 224), torch.float32)
            usual = load_usually(image, record, flip, config, rasterise_last=last)
            height, width = usual.image.shape[1:]
            assert ours.size[0].tolist() == [height, width]
            std = torch.tensor(config.std)[:, None, None]
            differ = (usual.image - ours.image[0, :, :height, :width]).abs() * std
            assert differ.max() <= 1.01  # grey levels, of which torchvision rounds to whole ones
            valid = ours.targets.valid[0]
            torch.testing.assert_close(usual.boxes, ours.targets.boxes[0][valid], atol=0.01, rtol=0)
            assert torch.equal(usual.labels, ours.targets.labels[0][valid])
            assert ours.targets.bitmaps is not None
            bitmaps = ours.targets.bitmaps[0][valid][:, :height, :width].bool()
            assert usual.masks.shape == bitmaps.shape
            for mask, bitmap in zip(usual.masks.bool(), bitmaps, strict=True):
                # Small masks have much outline, which the two ways round differently.
                least = 0.8 if last else 0.98
                assert (mask & bitmap).sum() >= least * (mask | bitmap).sum()
                compared += 1
    assert compared > 5


def test_every_decoder_gives_pillows_pixels(shards):
    split = read_index(shards).splits["train2017"]
    images = [
        image
        for shard in split.shards
        for _, image, _ in list(iter_tar(shards / shard.name))[:2]
    ]  # fmt: skip
    found = decoders()
    assert next(iter(found)) == "pillow"
    assert "opencv" in found
    for name, decoder in found.items():
        assert agreement(decoder, images) == (len(images), len(images), 0), name
    # And a decoder that is wrong is found out.
    wrong = agreement(lambda data: found["pillow"](data) ^ np.uint8(2), images)
    assert wrong == (0, len(images), 2)
