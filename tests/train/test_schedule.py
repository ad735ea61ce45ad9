import math
from dataclasses import replace

import pytest

from casc.train.schedule import (
    Schedule,
    learning_rate,
    rate_table,
    scaled_rate,
    warmup_length,
)


def mmcv(step, per_epoch, base=0.02):
    """MMDetection 2.13's lr_config as reference.md states it, written out literally."""
    epoch = step // per_epoch
    lr = base
    if epoch >= 8:
        lr = lr * 0.1
    if epoch >= 11:
        lr = lr * 0.1
    if step < 500:
        k = (1 - step / 500) * (1 - 0.001)
        return lr * (1 - k)
    return lr


@pytest.mark.parametrize("per_epoch", [7330, 40])
def test_follows_the_reference(per_epoch):
    schedule = Schedule(warmup_limit=0.1 if per_epoch > 500 else 1)
    for step in [*range(520), *(e * per_epoch + d for e in range(1, 12) for d in (-1, 0, 1))]:
        rate = learning_rate(schedule, 0.02, step, steps_per_epoch=per_epoch, epochs=12)
        assert rate == pytest.approx(mmcv(step, per_epoch), rel=1e-12)
    assert learning_rate(schedule, 0.02, 0, steps_per_epoch=per_epoch, epochs=12) == (
        pytest.approx(2e-5)
    )


def test_cosine():
    schedule = Schedule(kind="cosine", warmup_steps=0)

    def rate(step):
        return learning_rate(schedule, 1.0, step, steps_per_epoch=10, epochs=2)

    assert [rate(s) for s in (0, 5, 10, 20, 25)] == pytest.approx(
        [1, (1 + math.sqrt(0.5)) / 2, 0.5, 0, 0]
    )


def test_linear_scaling():
    assert scaled_rate(0.02, 16, 16) == 0.02
    assert scaled_rate(0.02, 16, 2) == pytest.approx(0.0025)


def test_the_table_covers_every_step():
    schedule = Schedule(drops=(2, 3), warmup_steps=15, warmup_limit=1)
    table = rate_table(schedule, 0.1, steps_per_epoch=10, epochs=4)
    assert [row[:2] for row in table] == [(0, 14), (15, 19), (20, 29), (30, 39)]
    for first, last, a, b in table:
        for step, expected in ((first, a), (last, b)):
            assert expected == learning_rate(schedule, 0.1, step, steps_per_epoch=10, epochs=4)
    assert [row[2] for row in table[1:]] == pytest.approx([0.1, 0.01, 0.001])


def test_a_drop_during_warm_up_still_counts():
    schedule = Schedule(drops=(1,), warmup_steps=100, warmup_limit=1)
    before = learning_rate(schedule, 1.0, 9, steps_per_epoch=10, epochs=2)
    after = learning_rate(schedule, 1.0, 10, steps_per_epoch=10, epochs=2)
    assert after < before


def test_a_short_runs_warm_up_is_a_tenth_of_it():
    """Twelve images, two a step, for eight epochs: 48 steps, of which four warm up."""
    short, whole = Schedule(warmup_steps=100), Schedule(warmup_steps=100, warmup_limit=1)
    assert [warmup_length(s, 48) for s in (short, whole)] == [4, 100]

    def rate(schedule, step):
        return learning_rate(schedule, 1.0, step, steps_per_epoch=6, epochs=8)

    assert rate(short, 4) == 1
    assert rate(short, 3) == rate(replace(whole, warmup_steps=4), 3) < 1
    assert rate(whole, 47) < 0.5
    table = rate_table(short, 1.0, steps_per_epoch=6, epochs=8)
    assert table[0][:2] == (0, 3)
    assert warmup_length(short, 5) == 0
    assert rate_table(short, 1.0, steps_per_epoch=1, epochs=5) == [(0, 4, 1.0, 1.0)]
