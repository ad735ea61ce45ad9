"""Golden weights under other programs' names detect what the goldens say, and come back."""

import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2_names import REG_WEIGHTS, detectron2_model
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from casc.checkpoints.model import Trained, load_trained
from casc.cli import main as cli
from casc.device.compute import Compute
from casc.model.detector_config import DetectorConfig
from casc.model.forward_detect import detect
from casc.model.rpn import Proposals
from casc.ops.probe import Recorder
from casc.verify import goldens, run_detections
from casc.verify.compare import BOX_PIXELS, MASK, SCORE, Comparison
from casc.verify.compare_detections import compare_detections
from casc.verify.goldens import GoldenSet, digest, golden_weights, read_sets
from casc.verify.record import Record, detection_record

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
CPU = torch.device("cpu")
CLASSES = tuple(f"thing {i}" for i in range(80))


@pytest.fixture(scope="module")
def golden() -> GoldenSet:
    (golden,) = read_sets(GOLDENS, log=lambda line: None)
    return golden


@pytest.fixture(scope="module")
def reference(golden) -> dict[str, Tensor]:
    """The reference's state_dict: its names and bytes are in the digest that it recorded."""
    params, buffers = golden_weights(DetectorConfig())
    assert digest(params | buffers) == golden.facts["weights_digest"]
    return params | buffers


def convert(*args) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", *(str(arg) for arg in args)])
    assert stop.value.code == 0


def same_bytes(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].numpy().tobytes() == value.numpy().tobytes(), name


def test_mmdetections_checkpoint_gives_the_golden_detections(golden, reference, tmp_path):
    meta = {"CLASSES": CLASSES, "mmdet_version": "2.13.0", "epoch": 12}
    torch.save({"meta": meta, "state_dict": reference}, tmp_path / "epoch_12.pth")
    convert(tmp_path / "epoch_12.pth", tmp_path / "in.safetensors")
    trained = load_trained(str(tmp_path / "in.safetensors"))
    eager = Compute(compile=False)
    _, record, masks = next(
        run_detections(golden, trained.model, trained.params, trained.buffers, CPU, eager)
    )
    table = Comparison(golden.tensors)
    compare_detections(golden, trained.model, 0, record, masks, table)
    assert not [row for row in table.rows if not row.passed]
    compared = {row.name for row in table.rows}
    assert {f"test0.{n}" for n in ("det_labels", "det_bboxes", "mask_prob", "masks")} <= compared

    convert(tmp_path / "in.safetensors", tmp_path / "back.pth", "--to", "mmdetection")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    same_bytes(back["state_dict"], reference)
    assert back["meta"]["CLASSES"] == back["meta"]["dataset_meta"]["classes"] == CLASSES


def test_detectron2s_checkpoint_gives_the_detections_of_its_conventions(
    golden, reference, tmp_path
):
    theirs = detectron2_model(reference)
    zoo = {
        "model": {name: value.numpy() for name, value in theirs.items()},
        "__author__": "Detectron2 Model Zoo",
    }
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(zoo, protocol=2))
    # The goldens' strides sit in the 3x3 convolutions.
    convert(tmp_path / "zoo.pkl", tmp_path / "in.safetensors", "--stride-in-1x1", "no")
    trained = load_trained(str(tmp_path / "in.safetensors"))
    check_detections(golden, run(golden, trained))

    convert(tmp_path / "in.safetensors", tmp_path / "back.pkl", "--to", "detectron2")
    back = pickle.loads((tmp_path / "back.pkl").read_bytes())
    same_bytes({k: torch.from_numpy(v) for k, v in back["model"].items()}, theirs)


def run(golden: GoldenSet, trained: Trained) -> Record:
    """Inference on the goldens' first image, normalised as the checkpoint's settings say."""
    inputs = goldens.test_inputs(golden, 0)
    # The recorded pixels are (raw - mean) / std; padding stays 0 either way.
    was, now = torch.tensor([58.395, 57.12, 57.375]), torch.tensor(trained.image.std)
    assert trained.image.mean == (123.675, 116.28, 103.53)
    inputs = inputs._replace(image=inputs.image * (was / now)[:, None, None])
    rows = golden.tensors["test0.proposals"][None]
    valid = torch.ones(rows.shape[:2], dtype=torch.bool)
    proposals = Proposals(rows[..., :4], rows[..., 4], valid)
    recorder = Recorder({"proposals": proposals})
    with torch.no_grad():
        found = detect(trained.params, trained.buffers, trained.model, inputs, recorder)
    record = detection_record(recorder.seen, found)
    return {name: value[0] for name, value in record.items()}


def check_detections(golden: GoldenSet, record: Record) -> None:
    """Against what Detectron2's rules make of the logits and deltas that the goldens hold."""
    t = {k.removeprefix("test0."): v for k, v in golden.tensors.items() if k.startswith("test0.")}
    meta = golden.facts["test0.meta"]
    rois = t["s2.rois"][:, 1:]
    for stage in range(3):
        logits = record[f"s{stage}.cls_score"][: len(rois)]
        torch.testing.assert_close(logits, t[f"s{stage}.cls_score"], rtol=1e-3, atol=1e-3)
    # Each stage's probabilities, averaged; boxes of the last stage.
    scores = torch.stack([t[f"s{i}.cls_score"].softmax(-1) for i in range(3)]).mean(0)[:, :80]
    coder = BoxCoder(REG_WEIGHTS[2])
    stds = torch.tensor((0.033, 0.033, 0.067, 0.067))
    boxes = coder.decode_single(t["s2.bbox_pred"] * stds * torch.tensor(REG_WEIGHTS[2]), rois)
    boxes = torchvision.ops.clip_boxes_to_image(boxes, tuple(meta["img_shape"][:2]))
    boxes = boxes / torch.tensor(meta["scale_factor"])
    row, label = (scores > 0.05).nonzero().T
    keep = torchvision.ops.batched_nms(boxes[row], scores[row, label], label, 0.5)[:100]
    expected = boxes[row][keep], scores[row, label][keep], label[keep]

    valid = record["det_valid"]
    found, labels = record["det_bboxes"][valid], record["det_labels"][valid]
    assert len(found) == len(keep) > 20
    apart = torch.cdist(expected[0], found[:, :4], p=float("inf"))
    nearest = apart + 1e6 * (expected[2][:, None] != labels)
    pair = nearest.argmin(dim=1)
    assert nearest.amin(dim=1).max() <= BOX_PIXELS
    assert (found[pair, 4] - expected[1]).abs().max() <= SCORE
    # The reference averaged logits instead: other scores.
    assert (t["cls_score_avg"].softmax(-1)[:, :80] - scores).abs().max() > 100 * SCORE

    # The goldens hold the first mask head's logits of the reference's own detections.
    apart = torch.cdist(t["det_bboxes"][:, :4], found[:, :4], p=float("inf"))
    apart += 1e6 * (t["det_labels"][:, None] != labels)
    (both,) = (apart.amin(dim=1) <= BOX_PIXELS).nonzero(as_tuple=True)
    assert len(both) > 10
    ours = record["mask_prob"][valid][apart.argmin(dim=1)[both]]
    assert (ours - t["s0.mask_logits"][both].sigmoid()).abs().max() <= MASK
