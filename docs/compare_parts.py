"""Compare parts of a recipe on generated data: `python docs/compare_parts.py`.

The same small detector, trained on easy shapes (`data_tools synth`) once, goes on for as many
epochs on hard ones (`--hard`), from several seeds per variant, and its rate falls to 0 over them; a
Markdown table of means and spreads is printed. Runs that the folder holds already aren't repeated,
so it can be stopped and started at will. With `--coco FOLDER` it goes on with photographs instead,
for one class of a data set in COCO's format, and what is compared are the augmentations.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from casc.data.index import INDEX_NAME
from casc.data.stream import TrainLoaderConfig
from casc.model.anchors import AnchorConfig
from casc.model.box_head import BoxHeadConfig
from casc.model.detector_config import DetectorConfig, InferenceConfig
from casc.model.fpn import FPNConfig
from casc.model.mask_head import MaskHeadConfig
from casc.model.preprocess import ImageConfig
from casc.model.resnet import ResNetConfig
from casc.model.rpn import RPNConfig
from casc.train.loop import train
from casc.train.optim import Optim
from casc.train.recipe import RANDOM, Recipe
from casc.train.schedule import Schedule
from data_tools.cli import ShardCommand, SynthCommand

SIDE, BATCH = 96, 4
FIGURES = (("bbox", "AP"), ("bbox", "AP50"), ("segm", "AP"), ("segm", "AP50"))


def base(data: Path, classes: int) -> Recipe:
    """What the variants differ from: SGD, smooth L1, three mask heads, group norm."""
    return Recipe(
        name="base", data=data, init=RANDOM, batch=BATCH, device="cpu", dtype="float32",
        compile=False, evaluate_every=1000, save_every=0, log_every=20,
        optim=Optim(lr=0.04, reference_batch=BATCH, clip_norm=10.0),
        schedule=Schedule(kind="cosine", warmup_steps=20, warmup_limit=0.25),
        image=ImageConfig(short=SIDE, long=SIDE),
        loading=TrainLoaderConfig(workers=0),
        model=DetectorConfig(
            classes=classes,
            backbone=ResNetConfig(depth=18, norm="gn", frozen_stages=-1, width=32),
            fpn=FPNConfig(channels=32, norm="gn"),
            anchors=AnchorConfig(scale=4.0),
            rpn=RPNConfig(
                channels=32, samples=64, train_pre_nms=100, train_proposals=64,
                test_pre_nms=100, test_proposals=50,
            ),
            box_head=BoxHeadConfig(samples=32, channels=128),
            mask_head=MaskHeadConfig(convs=1, channels=32, norm="gn"),
            inference=InferenceConfig(detections=30),
        ),
    )  # fmt: skip


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """Each part that is compared, alone against `base`."""
    model, image = recipe.model, recipe.image
    jitter = replace(image, jitter=(0.1, 2.0), jitter_size=SIDE)
    gentle = replace(image, jitter=(0.8, 1.25), jitter_size=SIDE)
    coloured = replace(image, colour=(0.4, 0.4, 0.4, 0.1))
    plain = replace(
        model,
        backbone=replace(model.backbone, norm="frozen_bn"),
        fpn=replace(model.fpn, norm="none"),
        mask_head=replace(model.mask_head, norm="none"),
    )
    giou = replace(model, box_head=replace(model.box_head, loss="giou", box_weight=10.0))
    first = replace(model, mask_head=replace(model.mask_head, stages="first"))
    adamw = Optim(
        kind="adamw", lr=1e-3, reference_batch=BATCH, weight_decay=0.05, decay_vectors=False,
        clip_norm=10.0,
    )  # fmt: skip
    return {
        "base": recipe,
        "jitter 0.1 to 2": replace(recipe, image=jitter),
        "jitter 0.1 to 2, copy-paste": replace(recipe, image=replace(jitter, copy_paste=1.0)),
        "GIoU, weight 10": replace(recipe, model=giou),
        "one mask head": replace(recipe, model=first),
        "AdamW 1e-3, decay 0.05": replace(recipe, optim=adamw),
        "EMA 0.99": replace(recipe, ema=replace(recipe.ema, decay=0.99)),
        "no norm": replace(recipe, model=plain),
        "jitter 0.8 to 1.25": replace(recipe, image=gentle),
        "colour 0.4 0.4 0.4 0.1": replace(recipe, image=coloured),
        "erase 0.5": replace(recipe, image=replace(image, erase=0.5)),
    }


def augmentations(tried: dict[str, Recipe]) -> list[str]:
    """The variants that differ from `base` in nothing but what is done to images."""
    plain = tried["base"]
    return [name for name, recipe in tried.items() if replace(recipe, image=plain.image) == plain]


def make_photographs(folder: Path, coco: Path, category: str) -> Path:
    """Shard photographs with the objects of one class alone, unless that is done."""
    shards = folder / "shards"
    if not (shards / INDEX_NAME).exists():
        made = folder / "one-class"
        (made / "annotations").mkdir(parents=True, exist_ok=True)
        for split in ("train2017", "val2017"):
            name = f"annotations/instances_{split}.json"
            truth = json.loads((coco / name).read_text())
            (kept,) = (each for each in truth["categories"] if each["name"] == category)
            objects = [each for each in truth["annotations"] if each["category_id"] == kept["id"]]
            one = truth | {"categories": [kept], "annotations": objects}
            (made / name).write_text(json.dumps(one))
            if not (made / split).exists():
                (made / split).symlink_to((coco / split).absolute())
        ShardCommand(made, out=shards, aspects=(1.0,), max_size=2 * SIDE, workers=1).run()
    return shards


def make_data(folder: Path, images: int, val: int, classes: int, hard: bool) -> Path:
    """Generate the images and shard them, unless that is done."""
    shards = folder / ("hard-shards" if hard else "easy-shards")
    if not (shards / INDEX_NAME).exists():
        made = folder / ("hard" if hard else "easy")
        if not (made / "annotations").exists():
            SynthCommand(
                made, train=images, val=val, size=SIDE, classes=classes, hard=hard
            ).run()  # fmt: skip
        ShardCommand(made, out=shards, aspects=(1.0,), workers=1).run()
    return shards


def make_start(folder: Path, epochs: int, images: int, val: int) -> Path:
    """Train the weights that all variants start from, on easy shapes, unless that is done."""
    out = folder / "start"
    if not (out / "finished").exists():
        data = make_data(folder, images, val, 8, hard=False)
        train(replace(base(data, 8), name="start", out=out, epochs=epochs, save_every=1000))
        (out / "finished").touch()
    return out


def run(recipe: Recipe, folder: Path, name: str, seed: int, epochs: int) -> dict:
    """Train and evaluate once."""
    out = folder / "runs" / f"{name.replace(' ', '_').replace(',', '')}-{epochs}-{seed}"
    start = time.process_time()
    summary = train(replace(recipe, out=out, seed=seed, epochs=epochs))
    assert summary.evaluation is not None
    figures = {f"{kind} {key}": summary.evaluation.figures[kind][key] for kind, key in FIGURES}
    return {
        "variant": name, "seed": seed, "epochs": epochs, "figures": figures,
        "seconds": time.process_time() - start,
    }  # fmt: skip


def table(results: list[dict], names: list[str]) -> str:
    """Mean and standard deviation over the seeds, in percent."""
    lines = [
        "| variant | seeds | box AP | box AP50 | mask AP | mask AP50 |",
        "|---|---|" + "---|" * 4,
    ]
    for name in names:
        found = [result for result in results if result["variant"] == name]
        if not found:
            continue
        cells = []
        for kind, key in FIGURES:
            values = [100 * (result["figures"][f"{kind} {key}"] or 0.0) for result in found]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    """Train what isn't trained yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/compare_parts"), help="folder")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--epochs", type=int, default=4, help="of each run")
    parser.add_argument("--start-epochs", type=int, default=3, help="of the common start")
    parser.add_argument(
        "--images", type=int, default=300, help="to train on; twice as many easy ones"
    )
    parser.add_argument("--val", type=int, default=60, help="to evaluate on")
    parser.add_argument("--classes", type=int, default=5, help="5 to 30")
    parser.add_argument("--coco", type=Path, help="photographs to go on with, in COCO's layout")
    parser.add_argument("--category", default="person", help="the class to find on these")
    parser.add_argument("--only", nargs="*", help="these variants alone, by name")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    start = make_start(options.out, options.start_epochs, 2 * options.images, options.val)
    if options.coco:
        out, classes = options.out / "photographs", 1
        data = make_photographs(out, options.coco, options.category)
    else:
        out, classes = options.out, options.classes
        data = make_data(out, options.images, options.val, classes, hard=True)
    tried = variants(replace(base(data, classes), init=str(start)))
    names = augmentations(tried) if options.coco else list(tried)
    names = [name for name in names if not options.only or name in options.only]
    file = out / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    results = [json.loads(line) for line in lines]
    # Runs of other lengths are other runs.
    results = [result for result in results if result["epochs"] == options.epochs]
    done = {(result["variant"], result["seed"]) for result in results}
    # Seed by seed, so that a comparison that is cut short has some of each.
    for seed in range(options.seeds):
        for name in names:
            if (name, seed) in done:
                continue
            results.append(run(tried[name], out, name, seed, options.epochs))
            with file.open("a") as kept:
                kept.write(json.dumps(results[-1]) + "\n")
    print(table(results, names))


if __name__ == "__main__":
    main()
