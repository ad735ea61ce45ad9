"""Round trips, conventions and bad input of `casc convert`, on small models."""

import json
import pickle
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2_names import detectron2_model, detectron2_name
from torch import Tensor

from casc.checkpoints.detectron2 import read_detectron2
from casc.checkpoints.foreign import Stated, resnet_of
from casc.checkpoints.mmdetection import read_mmdetection
from casc.checkpoints.model import class_names, load_trained
from casc.cli import main as cli
from casc.data.index import Category, read_index
from casc.errors import UserError
from casc.model import detector
from casc.model.box_head import BoxHeadConfig
from casc.model.detector_config import DetectorConfig
from casc.model.fpn import FPNConfig
from casc.model.mask_head import MaskHeadConfig
from casc.model.preprocess import ImageConfig
from casc.model.resnet import ResNetConfig
from casc.model.rpn import RPNConfig

SMALL = DetectorConfig(
    classes=2,
    backbone=ResNetConfig(depth=50, width=8),
    fpn=FPNConfig(channels=16),
    rpn=RPNConfig(channels=16),
    box_head=BoxHeadConfig(channels=24),
    mask_head=MaskHeadConfig(convs=2, channels=8),
)
GROUPED = replace(
    SMALL,
    backbone=replace(SMALL.backbone, norm="gn"),
    fpn=replace(SMALL.fpn, norm="gn"),
    mask_head=replace(SMALL.mask_head, norm="gn"),
)
# MMDetection's config for Caffe's weights, cut down to what matters.
CAFFE = """
norm_cfg = dict(type='BN', requires_grad=False)
model = dict(
    type='CascadeRCNN',
    backbone=dict(type='ResNet', depth=50, style='caffe', norm_cfg=dict(type='BN')),
    neck=dict(type='FPN', num_outs=5),
    rpn_head=dict(anchor_generator=dict(type='AnchorGenerator', scales=[4],
        ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64])),
    roi_head=dict(
        type='CascadeRoIHead',
        bbox_roi_extractor=dict(roi_layer=dict(type='RoIAlign', sampling_ratio=0)),
        bbox_head=[
            dict(type='Shared2FCBBoxHead', reg_class_agnostic=True, num_classes=2,
                bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2])),
            dict(type='Shared2FCBBoxHead', reg_class_agnostic=True, num_classes=2,
                bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[0.05, 0.05, 0.1, 0.1])),
            dict(type='Shared2FCBBoxHead', reg_class_agnostic=True, num_classes=2,
                bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[0.03, 0.03, 0.06, 0.06])),
        ]),
    test_cfg=dict(rcnn=dict(score_thr=0.1, nms=dict(type='nms', iou_threshold=0.4),
        max_per_img=50)))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(640, 400), flip=False, transforms=[
        dict(type='Resize', keep_ratio=True),
        dict(type='Normalize', mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False),
        dict(type='Pad', size_divisor=32)])]
"""
MODERN = """
model = dict(
    type='mmdet.CascadeRCNN',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[103.53, 116.28, 123.675],
        std=[57.375, 57.12, 58.395], bgr_to_rgb=False, pad_size_divisor=32),
    backbone=dict(type='ResNet', depth=50, style='pytorch'),
    roi_head=dict(type='CascadeRoIHead'))
test_pipeline = [dict(type='Resize', scale=(1000, 600), keep_ratio=True)]
"""


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    params, buffers = detector.init(SMALL, generator)
    biases = {
        k: torch.randn(v.shape, generator=generator) for k, v in params.items() if "bias" in k
    }
    return params | biases | buffers


def run(capsys, *args, code: int = 0) -> str:
    """The command's output, or its one line of error."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", *(str(arg) for arg in args)])
    done = capsys.readouterr()
    assert stop.value.code == code, done.err
    if code:
        assert done.err.startswith("casc: ")
        assert done.err.count("\n") == 1
        assert not done.out
    return done.err if code else done.out


def same_bytes(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].contiguous().numpy().tobytes() == value.numpy().tobytes(), name


def test_caffes_conventions_are_taken_over_and_come_back(tmp_path, capsys, state):
    meta = {"CLASSES": ("cat", "dog"), "config": CAFFE, "mmdet_version": "2.13.0"}
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "a.pth")
    text = run(capsys, tmp_path / "a.pth", tmp_path / "a.safetensors")
    assert "assumed" not in text
    trained = load_trained(str(tmp_path / "a.safetensors"))
    model, image = trained.model, trained.image
    assert model.backbone == replace(SMALL.backbone, stride_in_1x1=True)
    assert (image.mean, image.std) == ((123.675, 116.28, 103.53), (1.0, 1.0, 1.0))
    assert (image.short, image.long) == (400, 640)
    assert model.anchors.scale == 4
    assert [stage.stds[3] for stage in model.stages] == [0.2, 0.1, 0.06]
    inference = model.inference
    assert (inference.score_threshold, inference.nms_iou, inference.detections) == (0.1, 0.4, 50)
    assert model.roi_align == "adaptive"
    # Its network takes blue first, casc's red.
    name = "backbone.conv1.weight"
    assert torch.equal(trained.params[name][:, 0], state[name][:, 2])
    assert torch.equal(trained.params[name][:, 2], state[name][:, 0])
    # Read without converting, it is the same detector.
    direct = load_trained(str(tmp_path / "a.pth"))
    assert (direct.model, direct.image) == (model, image)
    same_bytes(direct.params, trained.params)
    assert [c.name for c in class_names(direct)] == ["cat", "dog"]

    run(capsys, tmp_path / "a.safetensors", tmp_path / "b.pth", "--to", "mmdetection")
    back = torch.load(tmp_path / "b.pth", weights_only=True)
    same_bytes(back["state_dict"], state)
    run(capsys, tmp_path / "b.pth", tmp_path / "b.safetensors")
    again = load_trained(str(tmp_path / "b.safetensors"))
    assert (again.model, again.image) == (model, image)
    same_bytes(again.params | again.buffers, trained.params | trained.buffers)
    # In the other order of colours on demand.
    args = ("--to", "mmdetection", "--channels", "rgb")
    text = run(capsys, tmp_path / "a.safetensors", tmp_path / "c.pth", *args)
    assert "mean=[123.675, 116.28, 103.53], std=[1.0, 1.0, 1.0], to_rgb=True" in text
    turned = torch.load(tmp_path / "c.pth", weights_only=True)["state_dict"]
    assert torch.equal(turned[name], state[name].flip(1))


def test_mmdetection_3(tmp_path, capsys, state):
    meta = {"cfg": MODERN, "dataset_meta": {"classes": ["cat", "dog"], "palette": [(1, 2, 3)]}}
    tensors = {**state, "ema_backbone_conv1_weight": state["backbone.conv1.weight"]}
    torch.save({"meta": meta, "state_dict": tensors}, tmp_path / "a.pth")
    text = run(capsys, tmp_path / "a.pth", tmp_path / "a.safetensors", "--report", tmp_path / "r")
    assert "BGR" in text
    trained = load_trained(str(tmp_path / "a.safetensors"))
    assert trained.image.std == (58.395, 57.12, 57.375)
    assert (trained.image.short, trained.image.long) == (600, 1000)
    assert not resnet_of(trained.model).stride_in_1x1
    assert trained.weights.categories == (Category(-1, "cat"), Category(-1, "dog"))
    report = json.loads((tmp_path / "r").read_text())
    by_source = {row["source"]: row["how"] for row in report["tensors"]}
    assert by_source.keys() == tensors.keys()
    assert by_source.pop("ema_backbone_conv1_weight") == "left over"
    assert by_source.pop("backbone.conv1.weight") == "reordered"
    assert set(by_source.values()) == {"matched"}
    assert report["counts"]["matched"] == len(state) - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("type='CascadeRCNN'", "type='MaskRCNN'"), "model.type is 'MaskRCNN'"),
        (("sampling_ratio=0", "sampling_ratio=0, aligned=False"), "aligned is False"),
        (("sampling_ratio=0", "sampling_ratio=4"), "samples per cell"),
        (("reg_class_agnostic=True", "reg_class_agnostic=False"), "reg_class_agnostic is False"),
        (("num_classes=2", "num_classes=3"), "counted the background"),
        (("scales=[4]", "scales=[4, 8]"), "unexpected kind"),
        (("score_thr=0.1", "score_thr='much'"), "score_threshold: 'much' is not a float"),
        (("style='caffe'", "style='caffe', dcn=dict(type='DCN')"), "dcn is {'type': 'DCN'}"),
        (("type='nms'", "type='soft_nms'"), "'soft_nms'"),
        (("num_outs=5", "num_outs=5, add_extra_convs='on_input'"), "add_extra_convs"),
        (("model = dict(", "model = dict)"), "can't be read"),
    ],
)
def test_what_casc_cannot_do_is_refused(tmp_path, capsys, state, change, message):
    old, new = change
    assert old in CAFFE
    meta = {"config": CAFFE.replace(old, new, 1)}
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "a.pth")
    assert message in run(capsys, tmp_path / "a.pth", tmp_path / "a.safetensors", code=1)
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("config", [SMALL, GROUPED], ids=["frozen_bn", "gn"])
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_detectron2_and_back(tmp_path, capsys, config, suffix):
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    theirs = detectron2_model(params | buffers)
    sizes, halves = (32, 64, 128, 256, 512), []
    for size in sizes:  # the buffers of older files: one square and two oblong anchors
        sides = [(size * r**-0.5 / 2, size * r**0.5 / 2) for r in (0.5, 1.0, 2.0)]
        halves.append(torch.tensor([[-w, -h, w, h] for w, h in sides]))
    anchors = {
        f"proposal_generator.anchor_generator.cell_anchors.{i}": cells
        for i, cells in enumerate(halves)
    }
    file = tmp_path / f"model_final{suffix}"
    if suffix == ".pkl":
        arrays = {name: value.numpy() for name, value in (theirs | anchors).items()}
        file.write_bytes(pickle.dumps({"model": arrays, "__author__": "them"}))
    else:
        torch.save({"model": theirs | anchors, "iteration": 7, "optimizer": {"lr": 1}}, file)
    text = run(capsys, file, tmp_path / "a.safetensors")
    assert "BGR" in text
    trained = load_trained(str(tmp_path / "a.safetensors"))
    assert trained.model == replace(
        config,
        backbone=replace(config.backbone, stride_in_1x1=True),
        stages=trained.model.stages,
        inference=replace(config.inference, average="probabilities"),
        roi_align="adaptive",
    )
    assert [s.stds for s in trained.model.stages] == [
        (1 / w, 1 / w, 2 / w, 2 / w) for w in (10, 20, 30)
    ]
    assert trained.image == ImageConfig(std=(1.0, 1.0, 1.0))
    for stage in (1, 2):
        name = f"roi_head.mask_head.{stage}.upsample.weight"
        assert torch.equal(trained.params[name], params["roi_head.mask_head.0.upsample.weight"])

    back = tmp_path / f"back{suffix}"
    text = run(capsys, tmp_path / "a.safetensors", back, "--to", "detectron2")
    assert "MODEL.PIXEL_MEAN: [103.53, 116.28, 123.675]" in text
    assert "STRIDE_IN_1X1 True" in text
    if suffix == ".pkl":
        found = pickle.loads(back.read_bytes())
        found["model"] = {name: torch.from_numpy(v) for name, v in found["model"].items()}
    else:
        found = torch.load(back, weights_only=True)
    same_bytes(found["model"], theirs)
    assert "__author__" in found


def detectron2_file(folder, state, **changes):
    model = detectron2_model(state) | changes
    model = {name: value for name, value in model.items() if value is not None}
    torch.save({"model": model}, folder / "d2.pth")
    return folder / "d2.pth"


def test_what_detectron2s_files_leave_out_can_be_said(tmp_path, capsys, state):
    file = detectron2_file(tmp_path, state, pixel_mean=None, pixel_std=None)
    out = tmp_path / "a.safetensors"
    flags = "--channels rgb --pixel-mean 1 2 3 --pixel-std 4 5 6 --stride-in-1x1 no --roi-align"
    weights = [float(n) for n in range(1, 13)]
    run(capsys, file, out, *flags.split(), "fixed", "--reg-weights", *weights)
    trained = load_trained(str(out))
    name = "backbone.conv1.weight"
    assert torch.equal(trained.params[name], detectron2_model(state)[detectron2_name(name) or ""])
    assert (trained.image.mean, trained.image.std) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert not resnet_of(trained.model).stride_in_1x1
    assert trained.model.roi_align == "fixed"
    assert trained.model.stages[1].stds == (1 / 5, 1 / 6, 1 / 7, 1 / 8)
    # The order of the flags' numbers is that of the colours.
    run(capsys, file, out, "--pixel-mean", 1, 2, 3, "--overwrite")
    assert load_trained(str(out)).image.mean == (3.0, 2.0, 1.0)


def test_user_and_file_must_agree(tmp_path, capsys, state):
    out = tmp_path / "a.safetensors"
    file = detectron2_file(tmp_path, state)
    error = run(capsys, file, out, "--pixel-std", 57.375, 57.12, 58.395, code=1)
    assert "--pixel-std: the file says 1, 1, 1" in error
    run(capsys, file, out, "--pixel-std", 1, 1, 1)
    torch.save({"meta": {"config": CAFFE}, "state_dict": state}, tmp_path / "b.pth")
    new = tmp_path / "b.safetensors"
    for flags in (("--channels", "rgb"), ("--stride-in-1x1", "no"), ("--pixel-mean", 1, 2, 3)):
        error = run(capsys, tmp_path / "b.pth", new, *flags, code=1)
        assert f"{flags[0]}: the file says" in error
    error = run(capsys, file, new, "--reg-weights", 1, 2, 3, 4, code=1)
    assert "expected 12 positive numbers" in error
    error = run(capsys, out, tmp_path / "c.safetensors", "--stride-in-1x1", "no", code=1)
    assert "casc's own and says that itself" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"roi_heads.box_predictor.0.bbox_pred.weight": torch.zeros(8, 24)},
            "it regresses a box per class",
        ),
        ({"roi_heads.mask_head.predictor.weight": None}, "conv_logits.weight' is missing"),
        ({"sem_seg_head.predictor.weight": torch.zeros(1)}, "is no part of casc's model"),
        ({"backbone.fpn_output2.norm.weight": torch.zeros(16)}, "gn.weight' is missing"),
        ({"backbone.bottom_up.res3.0.conv2.weight": torch.zeros(16, 2, 3, 3)}, "grouped"),
        (
            {"proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4)},
            "other anchors",
        ),
        ({"pixel_std": torch.ones(1)}, "has 1 numbers instead of 3"),
        ({"backbone.fpn_lateral2.bias": torch.full((16,), 0.1, dtype=torch.float64)}, "float64"),
        (
            {"proposal_generator.rpn_head.objectness_logits.weight": torch.zeros(15, 16, 1, 1)},
            "not the weights",
        ),
    ],
)
def test_other_models_of_detectron2_are_refused(tmp_path, capsys, state, changes, message):
    file = detectron2_file(tmp_path, state, **changes)
    assert message in run(capsys, file, tmp_path / "a.safetensors", code=1)


def test_what_detectron2_cannot_do_is_refused_or_accepted(tmp_path, capsys, state):
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    out = tmp_path / "b.pkl"
    args = (tmp_path / "a.pth", out, "--to", "detectron2")
    assert "one mask head" in run(capsys, *args, code=1)
    assert "stages are 0 to 2" in run(capsys, *args, "--mask-stage", 3, code=1)
    error = run(capsys, *args, "--mask-stage", 2, code=1)
    assert "can't be made to compute the same" in error
    assert not out.exists()
    text = run(capsys, *args, "--mask-stage", 2, "--accept-differences")
    assert "differs there" in text
    assert "their probabilities" in text
    found = pickle.loads(out.read_bytes())["model"]["roi_heads.mask_head.deconv.weight"]
    assert (found == state["roi_head.mask_head.2.upsample.weight"].numpy()).all()


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision_and_back(tmp_path, capsys, depth):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(f"resnet{depth}", weights=None).state_dict()
    torch.save(theirs, tmp_path / "r.pth")
    text = run(capsys, tmp_path / "r.pth", tmp_path / "r.safetensors")
    assert "the classifier" in text
    run(capsys, tmp_path / "r.safetensors", tmp_path / "b.pth", "--to", "torchvision")
    back = torch.load(tmp_path / "b.pth", weights_only=True)
    same_bytes(back, {k: v for k, v in theirs.items() if not k.startswith("fc.")})
    error = run(capsys, tmp_path / "r.safetensors", tmp_path / "c.pth", "--to", "mmdetection",
                code=1)  # fmt: skip
    assert "a backbone alone" in error


def test_torchvision_has_no_other_networks(tmp_path, capsys, state):
    torch.save({"meta": {"config": CAFFE}, "state_dict": state}, tmp_path / "a.pth")
    error = run(capsys, tmp_path / "a.pth", tmp_path / "b.pth", "--to", "torchvision", code=1)
    assert "torchvision has no ResNet like that" in error
    with torch.device("meta"):
        names = torchvision.models.resnet18(weights=None).state_dict()
    other = {k: torch.zeros(v.shape) for k, v in names.items()}
    other["layer4.1.conv2.weight"] = torch.zeros(512, 512, 1, 1)
    torch.save(other, tmp_path / "w.pth")
    error = run(capsys, tmp_path / "w.pth", tmp_path / "w.safetensors", code=1)
    assert "'layer4.1.conv2.weight' isn't of casc's ResNet" in error
    del other["layer4.1.conv2.weight"]
    torch.save(other, tmp_path / "w.pth")
    error = run(capsys, tmp_path / "w.pth", tmp_path / "w.safetensors", code=1)
    assert "'layer4.1.conv2.weight' is missing" in error


def test_classes_are_put_in_the_shards_order(tmp_path, capsys, state, write_shards):
    write_shards(tmp_path / "shards", {"val": [(0, 1, True)]})
    red, green = read_index(tmp_path / "shards").categories
    assert (red.name, green.name) == ("red", "green")
    meta = {"CLASSES": ("green", "red")}
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "a.pth")
    args = (tmp_path / "a.pth", tmp_path / "a.safetensors", "--shards", tmp_path / "shards")
    text = run(capsys, *args)
    assert "moved into the order of" in text
    trained = load_trained(str(tmp_path / "a.safetensors"))
    assert class_names(trained) == (red, green)
    changed = []
    for name, value in state.items():
        mine = (trained.params | trained.buffers)[name]
        if not torch.equal(mine, value):
            changed.append(name)
            order = [1, 0, 2] if "fc_cls" in name else [1, 0]
            assert torch.equal(mine, value[order])
    assert len(changed) == 12  # weight and bias of both heads, in three stages
    torch.save({"meta": {"CLASSES": ("blue", "red")}, "state_dict": state}, tmp_path / "a.pth")
    assert "'green' is none of" in run(capsys, *args, "--overwrite", code=1)
    # Without names they are taken to stand by rising id, which is the order here.
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    text = run(capsys, *args, "--overwrite")
    assert "by rising id" in text
    trained = load_trained(str(tmp_path / "a.safetensors"))
    assert class_names(trained) == (red, green)
    same_bytes(trained.params | trained.buffers, state)


def test_bad_input_is_one_line(tmp_path, capsys, state):
    good = tmp_path / "good.pth"
    torch.save({"state_dict": state}, good)
    out = tmp_path / "out.safetensors"
    run(capsys, good, out)
    whole, written = good.read_bytes(), out.read_bytes()
    (tmp_path / "short.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "short.safetensors").write_bytes(written[: len(written) // 2])
    (tmp_path / "text.pkl").write_text("hello")
    (tmp_path / "empty").mkdir()
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    torch.save({"meta": {"mmdet_version": "1.2.0"}, "state_dict": state}, tmp_path / "old.pth")
    torch.save({"state_dict": {**state, "rpn_head.more": torch.zeros(1)}}, tmp_path / "more.pth")
    (tmp_path / "c2.pkl").write_bytes(pickle.dumps({"blobs": {"conv1_w": 1}}))
    newer = written.replace(b'"version":"1"', b'"version":"2"')
    assert newer != written
    (tmp_path / "newer.safetensors").write_bytes(newer)
    new = tmp_path / "new.safetensors"
    for source, target, message in (
        ("absent.pth", new, "no such file or folder"),
        ("empty", new, "no checkpoint in this folder"),
        ("short.pth", new, "not a file of tensors"),
        ("short.safetensors", new, "not readable as safetensors"),
        ("newer.safetensors", new, "written by a newer version of casc"),
        ("text.pkl", new, "not a pickle of arrays"),
        ("other.pth", new, "no checkpoint of MMDetection, Detectron2 or torchvision"),
        ("list.pth", new, "no checkpoint of MMDetection"),
        ("old.pth", new, "of MMDetection 1.2.0"),
        ("more.pth", new, "'rpn_head.more' is no part"),
        ("c2.pkl", new, "Detectron 1"),
        ("good.pth", out, "--overwrite replaces it"),
        ("good.pth", tmp_path / "x" / "y.safetensors", "there is no folder"),
        ("good.pth", tmp_path / "y.pth", "a file for casc is named *.safetensors"),
        ("good.pth", tmp_path / "empty", "a file for casc"),
        ("out.safetensors", out, "is what is to be read"),
    ):
        error = run(capsys, tmp_path / source, target, code=1)
        assert message in error
    assert "download it first" in run(capsys, "https://x.invalid/a.pth", new, code=1)
    assert not new.exists()
    assert out.read_bytes() == written
    assert not list(tmp_path.glob(".*"))


def test_the_report_names_every_tensor_once(tmp_path, capsys, state):
    """From one foreign program to another, in one go."""
    file = detectron2_file(tmp_path, state)
    args = ("--to", "mmdetection", "--accept-differences", "--report", tmp_path / "r.json")
    run(capsys, file, tmp_path / "b.pth", *args)
    theirs = torch.load(file, weights_only=True)["model"]
    ours = torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"]
    rows = json.loads((tmp_path / "r.json").read_text())["tensors"]
    targets = [row["target"] for row in rows if row["target"]]
    assert sorted(targets) == sorted(ours)
    assert {row["source"] for row in rows if row["source"]} == theirs.keys()
    for row in rows:
        how, source, target = row["how"], row["source"], row["target"]
        if how == "left over":
            assert source in ("pixel_mean", "pixel_std")
            continue
        assert row["shape"] == list(ours[target].shape)
        if how == "created":
            assert target.endswith("num_batches_tracked")
            continue
        assert detectron2_name(target.replace("mask_head.1", "mask_head.0").replace(
            "mask_head.2", "mask_head.0")) == source  # fmt: skip
        assert (how == "copied") == ("mask_head" in target)
        # Both programs take the colours in the order in which the model once had them.
        assert torch.equal(ours[target], theirs[source])
        assert how in ("renamed", "copied", "reordered")


def test_the_documented_report_is_what_the_command_says(tmp_path, capsys, monkeypatch):
    page = Path(__file__).resolve().parents[2] / "docs/converting.md"
    (block,) = re.findall(r"```\n(model_final\.pkl .*?)\n```", page.read_text(), re.DOTALL)
    config = replace(SMALL, classes=80, mask_head=MaskHeadConfig(channels=8))
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    arrays = {k: v.numpy() for k, v in detectron2_model(params | buffers).items()}
    zoo = {"model": arrays, "__author__": "Detectron2 Model Zoo"}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(zoo))
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "model_final.pkl", "d2.safetensors").strip() == block


@pytest.mark.parametrize("theirs", [False, True], ids=["mmdetection", "detectron2"])
def test_damaged_models_are_refused_and_never_crash(state, theirs):
    whole = detectron2_model(state) if theirs else state
    key, read = ("model", read_detectron2) if theirs else ("state_dict", read_mmdetection)
    rng = random.Random(0)
    for name in rng.sample(sorted(whole), 40):
        for shape in ((), (0,), (3,), (5, 1), (2, 2, 2, 2)):
            if shape != whole[name].shape and (name, shape) != ("pixel_mean", (3,)):
                damaged = {**whole, name: torch.zeros(shape)}
                with pytest.raises(UserError, match=r"^x: "):
                    read({key: damaged}, "x", Stated())
