import pytest
import torch

from casc.errors import UserError
from casc.train.distributed import ALONE
from casc.train.meter import Meter, watch_positives


def test_means_speed_and_waiting():
    meter = Meter(torch.device("cpu"), ALONE)
    stream = iter([1, 2, 3])
    for step, loss in enumerate((1.0, 2.0, 6.0)):
        assert meter.waiting(stream) == step + 1
        measures = {"loss": torch.tensor(loss), "grad_norm": torch.tensor(0.5)}
        meter.add(step, torch.tensor([7, 8]), measures)
    values = meter.read()
    assert values["loss"] == 3
    assert values["grad_norm"] == 0.5
    assert values["images_per_second"] > 0
    assert 0 <= values["data_wait"] <= 1
    meter.warming_up()
    meter.add(3, torch.tensor([7]), {"loss": torch.tensor(4.0), "grad_norm": torch.tensor(1.0)})
    assert meter.read()["loss"] == 4
    # The interval in which something was compiled doesn't count.
    assert meter.typical_speed() == values["images_per_second"]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_bad_step_is_named(name, bad):
    meter = Meter(torch.device("cpu"), ALONE)
    for step in range(5):
        measures = {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(1.0)}
        if step in (2, 3):
            measures[name] = torch.tensor(bad)
        meter.add(step, torch.tensor([10 * step, 10 * step + 1]), measures)
    with pytest.raises(UserError, match=r"step 2: .*images of the step: \[20, 21\]"):
        meter.read()


def test_steps_are_not_read_one_by_one():
    """Adding moves nothing to the host: meta tensors have nothing to move."""
    meter = Meter(torch.device("meta"), ALONE)
    measure = torch.empty((), device="meta")
    for step in range(3):
        meter.add(step, torch.tensor([1]), {"loss": measure, "grad_norm": measure, "x": measure})


def test_pauses_do_not_count():
    import time

    meter = Meter(torch.device("cpu"), ALONE)
    with meter.paused():
        time.sleep(0.2)
    one = torch.tensor(1.0)
    meter.add(0, torch.zeros(10), {"loss": one, "grad_norm": one})
    assert meter.read()["images_per_second"] > 100


def test_heads_without_positives_are_told_once_each_time():
    told = []
    watch = watch_positives(told.append)
    for value in (0.0, 0.0, 2.0, 0.0):
        watch({"loss": 1.0, "rpn.positives": 3.0, "s1.positives": value})
    assert len(told) == 2
    assert all(text.startswith("s1 had no positive") for text in told)
