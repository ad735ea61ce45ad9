"""The whole detector against the reference's recorded numbers, eager and compiled."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from casc.device.compute import Compute
from casc.errors import UserError
from casc.model.detector_config import DetectorConfig, reference_settings
from casc.verify import format_rows, run_training, verify, verify_set
from casc.verify.compare import Comparison, Row
from casc.verify.compare_training import compare_gradients, compare_training
from casc.verify.goldens import GoldenSet, digest, golden_weights, read_sets
from casc.verify.record import Record

GOLDENS = Path(__file__).parents[1] / "goldens"
CPU = torch.device("cpu")
EAGER = Compute(compile=False)


def test_golden_weights_are_the_recorded_ones() -> None:
    params, buffers = golden_weights(DetectorConfig())
    assert len(params | buffers) == 400
    assert digest(params | buffers) == "8af58573"


def strided_set() -> GoldenSet:
    """Negatives drawn from everywhere; only the tensors that differ from set A are stored."""
    tensors = load_file(GOLDENS / "goldens_A_lite.safetensors")
    tensors |= load_file(GOLDENS / "strided_differences.safetensors")
    facts = json.loads((GOLDENS / "goldens_A_strided.json").read_text())
    return GoldenSet("goldens_A_strided", tensors, facts)


def assert_all_pass(rows: list[Row], at_least: int) -> None:
    failed = [row for row in rows if not row.passed]
    assert not failed, "\n" + "\n".join(format_rows(rows))
    assert len(rows) >= at_least


class Verified(NamedTuple):
    """The set that is in the folder, and what the eager step came by."""

    golden: GoldenSet
    config: DetectorConfig
    rows: list[Row]
    record: Record
    gradients: dict[str, Tensor | None]


@pytest.fixture(scope="module")
def eager() -> Verified:
    (golden,) = read_sets(GOLDENS, log=lambda line: None)
    made = []

    def kept(*arguments):
        made.append((arguments[1], *run_training(*arguments)))
        return made[-1][1:]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("casc.verify.run_training", kept)
        rows = verify_set(golden, CPU, EAGER)
    config, _, record, _, leaves = made[0]  # another is that of the fixed grid
    return Verified(golden, config, rows, record, {k: v.grad for k, v in leaves.items()})


def test_eager_reproduces_every_golden_tensor(eager: Verified) -> None:
    assert_all_pass(eager.rows, at_least=710)
    parts = {row.part for row in eager.rows}
    assert parts == {
        *("preprocessing", "features", "rpn", "losses", "gradients", "fixed grid"),
        *(f"stage {i}" for i in range(3)),
        *(f"detections {i}" for i in range(2)),
    }


def damaged(golden: GoldenSet, key: str) -> GoldenSet:
    """One entry of one tensor off by a little more than its tolerance."""
    tensors = dict(golden.tensors)
    value = tensors[key].clone()
    flat = value.view(-1)
    flat[flat.numel() // 2] += 1 if not value.is_floating_point() else value.abs().max() * 3e-3
    tensors[key] = value
    return replace(golden, tensors=tensors)


@pytest.mark.slow
def test_strided_sampling_passes() -> None:
    """Inference is that of set A."""
    golden = strided_set()
    config = reference_settings(DetectorConfig())
    params, buffers = golden_weights(config)
    _, record, loss, leaves = run_training(golden, config, params, buffers, CPU, EAGER)
    loss.backward()
    gradients = {k: v.grad for k, v in leaves.items()}
    table = Comparison(golden.tensors)
    compare_training(golden, config, record, table)
    compare_gradients(golden, gradients, table)
    assert_all_pass(table.rows, at_least=600)


def test_each_damage_is_found(eager: Verified) -> None:
    """A verification that can't fail would verify nothing."""
    golden, config, _, record, gradients = eager
    for key in (
        "feat.C3.ch_l2",
        "rpn.assign.gt_inds.0",
        "rpn.reg.2",
        "s0.cls_score",
        "s1.sample.neg_inds.1",
        "s2.mask_targets",
        "s2.rois",
        "loss.s1.loss_mask",
    ):
        bad = damaged(golden, key)
        table = Comparison(bad.tensors)
        compare_training(bad, config, record, table)
        assert {row.name for row in table.rows if not row.passed} == {key}
    name = "roi_head.bbox_head.1.fc_reg.weight"
    gradient = gradients[name]
    assert gradient is not None
    table = Comparison(golden.tensors)
    # The same norm, but one row's sign is turned.
    turned = torch.cat([-gradient[:1], gradient[1:]])
    compare_gradients(golden, gradients | {name: turned}, table)
    assert {row.name for row in table.rows if not row.passed} == {f"{name} (direction)"}


def test_nan_fails() -> None:
    assert not Row("rpn", "x", float("nan"), 1.0, "relative").passed


def test_missing_and_broken_sets_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no golden set"):
        read_sets(tmp_path, log=lambda line: None)
    (tmp_path / "goldens_X.safetensors").write_bytes(b"not a tensor file")
    lines: list[str] = []
    with pytest.raises(UserError, match="no golden set"):
        read_sets(tmp_path, lines.append)
    assert "goldens_X.json" in lines[0]
    (tmp_path / "goldens_X.json").write_text("{}")
    with pytest.raises(UserError, match=r"goldens_X\.safetensors: not a readable golden set"):
        read_sets(tmp_path, log=lambda line: None)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    save_file({"train.img": torch.zeros(1)}, tmp_path / "goldens_X.safetensors")
    (tmp_path / "goldens_X.json").write_text('{"weights_digest": "00000000"}')
    with pytest.raises(UserError, match="another weight recipe"):
        verify(tmp_path, CPU, log=lambda line: None)
