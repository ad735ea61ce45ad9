"""Golden sets: tensors recorded from MMDetection 2.13, and the weights they were made with.

A set is two files of one stem: NAME.safetensors (or NAME_lite.safetensors, in which big
maps are replaced by summaries) and NAME.json. Nothing here depends on a set's image sizes
or counts.

Legend: B images, G ground-truth capacity, A anchors, S samples.
"""

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from casc.data.batch import Batch
from casc.data.collate import collate
from casc.data.index import Bucket
from casc.data.sample import Sample, annotations_edges, edge_room
from casc.errors import UserError
from casc.model import noise as noises
from casc.model.detector import Inputs, init
from casc.model.detector_config import DetectorConfig
from casc.model.forward_train import Noise
from casc.model.layers import Params
from casc.model.preprocess import ImageConfig
from casc.model.targets import Targets

PREFIX = "goldens_"
LITE = "_lite"


@dataclass(frozen=True)
class GoldenSet:
    """One recorded run of the reference."""

    name: str
    """File stem."""
    tensors: dict[str, Tensor]
    """Everything recorded, as stored (int32 for int64, uint8 for bool)."""
    facts: dict
    """The JSON file: sizes, losses, gradient probes."""


def read_sets(folder: Path, log: Callable[[str], None]) -> list[GoldenSet]:
    """Every golden set of a folder; a lite file is left out where the full one is there.

    Args:
        folder: where they lie.
        log: told of files that are not sets.

    Raises:
        UserError: if the folder holds no set, or a file of one is unreadable.
    """
    files = sorted(folder.glob(f"{PREFIX}*.safetensors"))
    sets = []
    for file in files:
        full = file.with_name(file.name.replace(LITE + ".", "."))
        facts_file = full.with_suffix(".json")
        if full != file and full in files:
            continue
        if not facts_file.exists():
            log(f"{file.name}: left out, since there is no {facts_file.name} beside it")
            continue
        try:
            sets.append(GoldenSet(file.stem, load_file(file), json.loads(facts_file.read_text())))
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise UserError(f"{file}: not a readable golden set ({error}): copy it again") from None
    if not sets:
        raise UserError(
            f"{folder}: no golden set: expected {PREFIX}NAME.safetensors (or "
            f"{PREFIX}NAME{LITE}.safetensors) beside {PREFIX}NAME.json"
        )
    return sets


def golden_weights(config: DetectorConfig) -> tuple[Params, Params]:
    """The weights of every golden set, from tensor names and shapes alone.

    Each tensor is standard normal noise from PCG64 seeded with the CRC-32 of its name,
    scaled by a rule for its kind so that activations stay of order one.

    Returns:
        Parameters and buffers of `config`, float32.
    """
    params, buffers = init(config, torch.Generator().manual_seed(0))
    for tensors in (params, buffers):
        for name, value in tensors.items():
            tensors[name] = torch.from_numpy(_golden_tensor(name, tuple(value.shape)))
    return params, buffers


def digest(tensors: Params) -> str:
    """CRC-32 over names and bytes in the order of names, as the golden JSON records it."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(tensors[name].numpy()).tobytes(), crc)
    return f"{crc:08x}"


def _golden_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    normal = generator.standard_normal(shape)
    kind = name.rsplit(".", 1)[1]
    if name.startswith("backbone.") and len(shape) == 1:
        value = _norm_value(name, kind, normal)
    elif kind == "bias":
        value = 0.01 * normal
    else:
        # A transposed convolution's inputs are its first axis.
        fan_in = shape[0] if name.endswith("upsample.weight") else math.prod(shape[1:])
        value = normal * (_gain(name) * math.sqrt(2.0 / fan_in))
    return np.asarray(value).astype(np.float32)


def _norm_value(name: str, kind: str, normal: np.ndarray) -> np.ndarray:
    if kind == "running_var":
        return 1.0 + 0.1 * np.abs(normal)
    if kind != "weight":
        return 0.05 * normal
    weight = 1.0 + 0.05 * normal
    # The last norm of a bottleneck is small, or the residual sum would grow block by block.
    return 0.3 * weight if name.endswith("bn3.weight") else weight


def _gain(name: str) -> float:
    gains = {
        "lateral_convs": 0.5,
        "fpn_convs": 0.4,
        "rpn_cls": 0.5,
        "rpn_reg": 0.06,
        "fc_reg": 0.15,
        "conv_logits": 0.7,
    }
    return next((gain for part, gain in gains.items() if part in name), 1.0)


def image_config(golden: GoldenSet) -> ImageConfig:
    """The resize of the reference's pipeline: its largest sides tell."""
    sides = [meta["img_shape"][:2] for meta in golden.facts["train.meta"]]
    return ImageConfig(short=max(min(s) for s in sides), long=max(max(s) for s in sides))


def train_batch(golden: GoldenSet) -> Batch:
    """The training batch before its preprocessing, with seeds that flip what was flipped."""
    metas = golden.facts["train.meta"]
    flips = noises.uniform(torch.arange(1000), noises.FLIP, 1)[:, 0] < ImageConfig().flip
    seeds = [int((flips == meta["flip"]).nonzero()[0]) for meta in metas]
    return _batch([_sample(golden, image) for image in range(len(metas))], seeds)


def test_batch(golden: GoldenSet, image: int) -> Batch:
    """One image before its preprocessing."""
    return _batch([_sample(golden, image)], [0])


def _batch(samples: list[Sample], seeds: list[int]) -> Batch:
    heights, widths = zip(*(sample.image.shape[:2] for sample in samples), strict=True)
    edges = max(edge_room(sample.edges) for sample in samples)
    objects = max(len(sample.boxes) for sample in samples)
    bucket = Bucket("golden", 0.0, None, max(heights), max(widths), objects, edges, 0)
    return collate(samples, bucket, seeds=seeds, bitmaps=True)


def _sample(golden: GoldenSet, image: int) -> Sample:
    """A stored image and its trainable objects, as the reference's data set has them."""
    coco = golden.facts["coco"]
    number = coco["images"][image]["id"]
    kept = [
        a
        for a in coco["annotations"]
        if a["image_id"] == number and not a["iscrowd"] and min(a["bbox"][2:]) >= 1
    ]
    rows = np.array([a["bbox"] for a in kept], np.float32).reshape(-1, 4)
    classes = sorted(category["id"] for category in coco["categories"])
    return Sample(
        # OpenCV decodes to BGR.
        image=golden.tensors[f"raw.{image}"].numpy()[..., ::-1],
        boxes=np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:]], axis=1),
        labels=np.array([classes.index(a["category_id"]) for a in kept], np.int64),
        edges=annotations_edges(kept),
        segmentations=[a["segmentation"] for a in kept],
        image_id=number,
    )


def train_inputs(golden: GoldenSet) -> Inputs:
    """The training batch as the reference's pipeline left it, padded to a capacity."""
    t = golden.tensors
    image = t["train.img"]
    metas = golden.facts["train.meta"]
    counts = [t[f"train.gt_bboxes.{i}"].shape[0] for i in range(len(metas))]
    batch, capacity = len(metas), max(*counts, 1)
    boxes = torch.zeros(batch, capacity, 4)
    labels = torch.zeros(batch, capacity, dtype=torch.long)
    valid = torch.zeros(batch, capacity, dtype=torch.bool)
    bitmaps = torch.zeros(batch, capacity, *image.shape[2:], dtype=torch.uint8)
    for i, count in enumerate(counts):
        boxes[i, :count] = t[f"train.gt_bboxes.{i}"]
        labels[i, :count] = t[f"train.gt_labels.{i}"].long()
        valid[i, :count] = True
        masks = t[f"train.gt_masks.{i}"]
        bitmaps[i, :count, : masks.shape[1], : masks.shape[2]] = masks
    edges = torch.zeros(batch, 1, 4)
    targets = Targets(boxes, labels, valid, edges, labels[:, :1] * 0, bitmaps)
    return Inputs(image, _sizes(metas), _scales(metas), targets)


def test_inputs(golden: GoldenSet, image: int) -> Inputs:
    """One image as the reference's test pipeline left it."""
    meta = golden.facts[f"test{image}.meta"]
    pixels = golden.tensors[f"test{image}.img"]
    none = torch.zeros(1, 1, 4)
    off = torch.zeros(1, 1, dtype=torch.bool)
    targets = Targets(none, off.long(), off, none, off.long())
    return Inputs(pixels, _sizes([meta]), _scales([meta]), targets)


def sampling_noise(golden: GoldenSet, config: DetectorConfig, anchors: int) -> Noise:
    """Keys that draw the samples that the reference drew, wherever they may be drawn.

    Its recorded indices count only boxes that exist; ours count fixed slots: G ground
    truths, then the proposals, which after the first stage are the samples before, with
    ground truths left out.
    """
    t = golden.tensors
    batch = len(golden.facts["train.meta"])
    counts = [t[f"train.gt_bboxes.{i}"].shape[0] for i in range(batch)]
    capacity = max(*counts, 1)
    rpn = torch.stack([_keys(anchors, *_sampled(t, "rpn", i)) for i in range(batch)])
    stages = []
    previous: list[list[int]] = []
    for stage in range(len(config.stages)):
        proposals = config.box_head.samples if stage else config.rpn.train_proposals
        slots, keys = [], []
        for i, count in enumerate(counts):
            positive, negative = _sampled(t, f"s{stage}", i)
            place = list(range(count)) + [
                capacity + slot for slot in (previous[i] if stage else range(proposals))
            ]
            keys.append(
                _keys(
                    capacity + proposals,
                    torch.tensor([place[j] for j in positive], dtype=torch.long),
                    torch.tensor([place[j] for j in negative], dtype=torch.long),
                )
            )
            # The slots of this sample that go on to the next stage: not the ground truths.
            order = [*positive.tolist(), *negative.tolist()]
            slots.append([slot for slot, j in enumerate(order) if j >= count])
        previous = slots
        stages.append(torch.stack(keys))
    return Noise(rpn, tuple(stages))


def _sampled(tensors: dict[str, Tensor], part: str, image: int) -> tuple[Tensor, Tensor]:
    positive = tensors[f"{part}.sample.pos_inds.{image}"].long()
    return positive, tensors[f"{part}.sample.neg_inds.{image}"].long()


def _keys(count: int, positive: Tensor, negative: Tensor) -> Tensor:
    """[count] float32: falling along each list, 0 for all that was not drawn."""
    keys = torch.zeros(count)
    for chosen in (positive, negative):
        keys[chosen] = 1 - torch.arange(len(chosen)) / (len(chosen) + 1)
    return keys


def _sizes(metas: list[dict]) -> Tensor:
    return torch.tensor([meta["img_shape"][:2] for meta in metas], dtype=torch.float32)


def _scales(metas: list[dict]) -> Tensor:
    return torch.tensor([meta["scale_factor"] for meta in metas], dtype=torch.float32)


def gradient_probe(name: str, shape: tuple[int, ...]) -> Tensor:
    """The random direction on which the reference's gradient of `name` was projected."""
    seed = zlib.crc32(f"grad:{name}".encode())
    normal = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    return torch.from_numpy(np.asarray(normal))
