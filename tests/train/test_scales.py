"""Runs at several scales: from shards to a checkpoint, stopped and continued."""

from dataclasses import replace

import pytest
import torch

from casc.train.loop import train


@pytest.mark.parametrize(
    ("settings", "exactness"),
    [
        ({"train_short": (40, 64)}, "default"),
        ({"jitter": (0.3, 2.0), "jitter_size": 64}, "default"),
        ({"jitter": (0.3, 2.0), "jitter_size": 64, "copy_paste": 1.0}, "reference"),
        (
            {
                "jitter": (0.5, 1.5),
                "jitter_size": 64,
                "antialias": True,
                "copy_paste": 1.0,
                "colour": (0.4, 0.4, 0.4, 0.1),
                "erase": 0.5,
            },
            "default",
        ),
    ],
    ids=["multi-scale", "jitter", "jitter and copy-paste with bitmaps", "all"],
)
def test_stopping_and_resuming_changes_nothing(tiny_recipe, tmp_path, settings, exactness):
    image = replace(tiny_recipe.image, **settings)
    straight = replace(tiny_recipe, image=image, exactness=exactness, max_steps=4, evaluate_every=1)
    whole = train(straight)
    assert whole.evaluation is not None
    assert (straight.folder / "first_batch.png").stat().st_size > 500
    broken = replace(straight, out=tmp_path / "broken", evaluate_every=0)
    train(replace(broken, max_steps=2))
    second = train(broken)
    plain = train(replace(broken, out=tmp_path / "plain", image=tiny_recipe.image))
    differs = False
    for name, value in whole.state.params.items():
        assert value.isfinite().all()
        assert torch.equal(value, second.state.params[name]), name
        differs |= not torch.equal(value, plain.state.params[name])
    assert differs
