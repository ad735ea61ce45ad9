from types import SimpleNamespace

import numpy as np
import pytest
import torch

from casc.distributed import ALONE
from casc.errors import UserError
from casc.train import meter as meters
from casc.train.meter import Meter, watch_positives

FINE = torch.tensor(0)


def add(meter, step, ids, measures, in_a_row):
    """What the loop does: figures on the device, images on the host."""
    number = torch.full((), step, dtype=torch.int64, device=meter.sums.device)
    meter.add(measures, in_a_row, number)
    meter.add_images(step, ids)


def test_means_speed_and_waiting():
    meter = Meter(torch.device("cpu"), ALONE)
    stream = iter([1, 2, 3])
    for step, loss in enumerate((1.0, 2.0, 6.0)):
        assert meter.waiting(stream) == step + 1
        measures = {"loss": torch.tensor(loss), "grad_norm": torch.tensor(0.5)}
        add(meter, step, torch.tensor([7, 8]), measures, FINE)
    values = meter.read()
    assert values["loss"] == 3
    assert values["grad_norm"] == 0.5
    assert values["images_per_second"] > 0
    assert 0 <= values["data_wait"] <= 1
    meter.warming_up()
    add(
        meter, 3, torch.tensor([7]), {"loss": torch.tensor(4.0), "grad_norm": torch.tensor(1.0)},
        FINE,
    )  # fmt: skip
    assert meter.read()["loss"] == 4
    # The interval in which something was compiled doesn't count.
    assert meter.typical_speed() == values["images_per_second"]


def skip(meter, rows, first=0):
    """Steps of which `rows` says how many updates in a row were skipped; figures then are nan."""
    for step, row in enumerate(rows, first):
        loss = torch.tensor(float("nan") if row else step + 1.0)
        ids = torch.tensor([10 * step, 10 * step + 1])
        add(meter, step, ids, {"loss": loss}, torch.tensor(row))


def test_skipped_updates_are_named_and_left_out():
    told = []
    meter = Meter(torch.device("cpu"), ALONE, warn=told.append)
    skip(meter, (0, 0, 1, 2, 0))
    values = meter.read()
    assert values["loss"] == pytest.approx((1 + 2 + 5) / 3)
    assert values["skipped"] == 2
    (text,) = told
    assert text.startswith("step 2: ")
    assert "2 of the last 5 updates were skipped; images of the step: [20, 21]" in text
    skip(meter, (0, 0), first=5)
    assert meter.read()["skipped"] == 0
    assert len(told) == 1
    skip(meter, (1,), first=7)
    assert np.isnan(meter.read()["loss"])


def test_too_many_in_a_row_stop_the_run_even_if_one_went_well_since():
    meter = Meter(torch.device("cpu"), ALONE, max_skips=3)
    skip(meter, (0, 1, 2, 0, 1, 2, 3, 0))
    with pytest.raises(UserError, match=r"step 1: .* 3 updates in a row .*step: \[10, 11\]"):
        meter.check()
    meter = Meter(torch.device("cpu"), ALONE, max_skips=4)
    skip(meter, (0, 1, 2, 0, 1, 2, 3, 0))
    assert meter.check() == 5


def test_steps_are_not_read_one_by_one():
    """Adding moves nothing to the host: meta tensors have nothing to move."""
    meter = Meter(torch.device("meta"), ALONE)
    measure = torch.empty((), device="meta")
    for step in range(3):
        row = torch.empty((), device="meta", dtype=torch.int64)
        add(meter, step, torch.tensor([1]), {"loss": measure, "x": measure}, row)


def test_pauses_do_not_count(monkeypatch):
    clock = iter([0.0, 1.0, 101.0, 106.0, 106.0])  # begun, paused, gone on, read, begun again
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    meter = Meter(torch.device("cpu"), ALONE)
    with meter.paused():
        pass
    one = torch.tensor(1.0)
    add(meter, 0, torch.zeros(12), {"loss": one, "grad_norm": one}, FINE)
    assert meter.read()["images_per_second"] == 12 / 6


def test_heads_without_positives_are_told_once_each_time():
    told = []
    watch = watch_positives(told.append)
    for value in (0.0, 0.0, 2.0, 0.0):
        watch({"loss": 1.0, "rpn.positives": 3.0, "s1.positives": value})
    assert len(told) == 2
    assert all(text.startswith("s1 had no positive") for text in told)
