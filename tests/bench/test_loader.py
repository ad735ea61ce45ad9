"""The loader beside the usual way to load, and the command that times it."""

import json
from pathlib import Path

import pytest
import torch
from usual_loader import load_usually

from casc.cli.main import main
from casc.data.collate import collate
from casc.data.index import read_index
from casc.data.sample import iter_tar, read_sample
from casc.model.preprocess import ImageConfig, plain_view, prepare
from data_tools.cli import ShardCommand
from data_tools.synth import SynthSettings, synthesise


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loader")
    synthesise(folder / "coco", {"train2017": 12}, SynthSettings(size=96))
    ShardCommand(folder / "coco", folder / "shards", workers=1, progress=False).run()
    return folder / "shards"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "loader", *map(str, arguments)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_prints_one_object(shards, capsys):
    assert run(shards, "--workers", 0, 1, "--seconds", 0.1, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["what"], found["split"], found["images"]) == ("loader", "train2017", 12)
    assert set(found["img_per_s"]) == {"0", "1"}
    assert all(rate > 0 for rate in found["img_per_s"].values())


def test_makes_its_own_images_and_prints_a_table(capsys):
    assert run("--samples", 8, "--workers", 0, "--seconds", 0.1) == 0
    lines = capsys.readouterr().out.splitlines()
    # Of the folder that they are made in, which is gone, nothing is said.
    names = [line.split()[0] for line in lines]
    assert names == ["what", "split", "images", "batch", "img_per_s:"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--seconds", 0), "--seconds"),
        (("--seconds", "nan"), "--seconds"),
        (("--workers", -1), "--workers"),
        (("--split", "other"), "--split other"),
    ],
)
def test_wrong_numbers_are_refused(shards, arguments, reason, capsys):
    assert run(shards, *arguments) == 1
    assert reason in capsys.readouterr().err


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
