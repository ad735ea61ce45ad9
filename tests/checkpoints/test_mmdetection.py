"""docs/coming-from-mmdetection.md against the reference's config and casc's recipe."""

import ast
import dataclasses
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from casc.data.batch import Batch
from casc.data.index import canvas
from casc.evaluate.mask_rle import paste_masks
from casc.evaluate.metrics import IOU_TYPES
from casc.model.anchors import AnchorConfig
from casc.model.boxes import encode
from casc.model.detector import init, trainable
from casc.model.detector_config import ROI_LEVELS, STAGES, DetectorConfig
from casc.model.resnet import ResNetConfig, out_channels
from casc.model.rpn import STDS
from casc.train.recipe import Recipe, resolved

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "coming-from-mmdetection.md").read_text()
# MMDetection 2.13.0's config with its _base_ files merged, a line per key.
REFERENCE: dict[str, Any] = json.loads((ROOT / "tests" / "mmdetection_config.json").read_text())

# Installed under another name than where it lies, which type checkers can't follow.
coco_1x: Callable[[], Recipe] = importlib.import_module("casc.recipes.coco_1x").coco_1x

VERDICTS = ("fixed", "same", "differs", "none")


class Row(NamedTuple):
    """A line of the page's tables."""

    key: str
    value: Any
    fields: tuple[str, ...]
    here: Any
    note: str

    @property
    def verdict(self) -> str:
        """The word before the note's colon; empty for the same value under another name."""
        word = self.note.partition(":")[0]
        return word if word in VERDICTS else ""


def rows(page: str = PAGE) -> list[Row]:
    found = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| `") or len(cells) != 5:
            continue
        key, value, fields, here, note = cells
        found.append(
            Row(
                key.strip("`"),
                ast.literal_eval(value.strip("`")),
                tuple(re.findall(r"`([^`]+)`", fields)),
                ast.literal_eval(here.strip("`")) if here else None,
                note,
            )
        )
    return found


def keys(pattern: str) -> list[str]:
    """The reference's keys that a row stands for."""
    if "[*]" not in pattern:
        return [pattern]
    regex = re.escape(pattern).replace(re.escape("[*]"), r"\[\d+\]")
    return [key for key in REFERENCE if re.fullmatch(regex, key)]


def field(recipe: Recipe, path: str) -> Any:
    """A field of the recipe, by the name that its flag has too."""
    value: Any = recipe
    parts = re.findall(r"[^.\[\]]+|\[(?:\d+|\*)\]", path)
    for i, part in enumerate(parts):
        if part == "[*]":
            rest = "".join(f".{p}" if p[0] != "[" else p for p in parts[i + 1 :]).lstrip(".")
            return [field(entry, rest) for entry in value]
        value = value[int(part[1:-1])] if part.startswith("[") else getattr(value, part)
    return plain(value)


def plain(value: Any) -> Any:
    """Paths as text; tuples as lists; a list of one as its only entry."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return plain(value[0]) if len(value) == 1 else [plain(entry) for entry in value]
    return value


def faults(recipe: Recipe, table: list[Row], reference: dict[str, Any]) -> Iterator[str]:
    """What the page says that isn't so."""
    told = [key for row in table for key in keys(row.key)]
    yield from (f"{key}: not on the page" for key in reference if key not in told)
    yield from (f"{key}: twice" for key in set(told) if told.count(key) > 1)
    for row in table:
        if not keys(row.key):
            yield f"{row.key}: stands for no key"
        for key in keys(row.key):
            if key not in reference:
                yield f"{key}: no key of the reference"
            elif reference[key] != row.value:
                yield f"{key}: {row.value}, the reference has {reference[key]}"
        if row.fields:
            try:
                ours = plain([field(recipe, name) for name in row.fields])
            except (AttributeError, IndexError) as error:
                yield f"{row.key}: {error}"
                continue
            if ours != plain(row.here):
                yield f"{row.key}: {row.here} here, the recipe has {ours}"
            if not row.verdict and ours != plain(row.value):
                yield f"{row.key}: {ours} isn't {row.value}, and nothing is said of it"
        elif row.verdict not in ("fixed", "none"):
            yield f"{row.key}: neither a field nor a reason"
        if row.verdict in ("same", "differs") and not row.fields:
            yield f"{row.key}: which field?"
        if row.verdict and len(row.note.partition(":")[2]) < 8:
            yield f"{row.key}: no reason given"


def test_page_agrees_with_reference_and_recipe() -> None:
    assert list(faults(coco_1x(), rows(), REFERENCE)) == []


def test_only_roi_aligns_sampling_differs() -> None:
    differing = {row.key for row in rows() if row.verdict == "differs"}
    assert {key.rsplit(".", 1)[1] for key in differing} == {"sampling_ratio"}
    exact = dataclasses.replace(coco_1x(), exactness="reference")
    assert resolved(exact).model.roi_align == "adaptive"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda recipe: dataclasses.replace(recipe, epochs=13),
        lambda recipe: dataclasses.replace(
            recipe, optim=dataclasses.replace(recipe.optim, weight_decay=0.0)
        ),
        lambda recipe: dataclasses.replace(
            recipe, model=dataclasses.replace(recipe.model, stages=STAGES[:2])
        ),
    ],
)
def test_another_recipe_is_noticed(spoil: Callable[[Recipe], Recipe]) -> None:
    assert list(faults(spoil(coco_1x()), rows(), REFERENCE))


def test_missing_row_and_wrong_value_are_noticed() -> None:
    table = rows()
    assert list(faults(coco_1x(), table[1:], REFERENCE)) == ["model.type: not on the page"]
    spoilt = REFERENCE | {"lr_config.step": [16, 22]}
    assert len(list(faults(coco_1x(), table, spoilt))) == 1


def test_code_named_for_what_is_fixed_exists() -> None:
    for row in rows():
        names = re.findall(r"`((?:casc|data_tools)\.[\w.]+)`", row.note)
        assert names or row.verdict != "fixed", row.key
        for name in names:
            assert _exists(name), f"{row.key}: there is no {name}"


def _exists(name: str) -> bool:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


def test_fixed_values_are_the_references(tiny) -> None:
    model = DetectorConfig()
    backbone = ResNetConfig()
    assert model.backbone == backbone
    # Names and shapes of the real thing would cost seconds; these don't depend on the size.
    config, _, _ = tiny
    params, _ = init(config, torch.Generator().manual_seed(0))
    trained = trainable(config, params)
    box = torch.tensor([[1.0, 2.0, 11.0, 22.0]])

    def default(function: Callable, name: str) -> Any:
        return inspect.signature(function).parameters[name].default

    ours = {
        "model.backbone.num_stages": len(out_channels(backbone)),
        "model.backbone.out_indices": list(range(len(out_channels(backbone)))),
        "model.backbone.norm_cfg.requires_grad": "backbone.layer2.0.bn1.weight" in trained,
        "model.neck.in_channels": out_channels(backbone),
        "model.neck.num_outs": len(AnchorConfig().strides),
        "model.rpn_head.bbox_coder.target_means": encode(box, box, STDS)[0].tolist(),
        "model.rpn_head.bbox_coder.target_stds": list(STDS),
        "model.roi_head.num_stages": len(model.stages),
        "model.roi_head.bbox_roi_extractor.featmap_strides": list(
            model.anchors.strides[:ROI_LEVELS]
        ),
        "model.roi_head.mask_roi_extractor.featmap_strides": list(
            model.anchors.strides[:ROI_LEVELS]
        ),
        "model.roi_head.bbox_head[0].reg_class_agnostic": (
            params["roi_head.bbox_head.0.fc_reg.weight"].shape[0] == 4
        ),
        "model.train_cfg.rcnn[0].mask_size": 2 * model.mask_head.cells,
        "model.test_cfg.rcnn.mask_thr_binary": default(paste_masks, "threshold"),
        "train_pipeline[5].size_divisor": default(canvas, "divisor"),
        "train_pipeline[1].with_bbox": "boxes" in Batch._fields,
        "train_pipeline[1].with_mask": "edges" in Batch._fields,
        "evaluation.metric": list(IOU_TYPES),
    }
    fixed = {key for row in rows() if row.verdict == "fixed" for key in keys(row.key)}
    assert ours.keys() <= fixed
    assert ours == {key: REFERENCE[key] for key in ours}
