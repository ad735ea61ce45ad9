import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from casc.checkpoints.read import Weights
from casc.config import to_json
from casc.data.index import Category
from casc.errors import UserError
from casc.model.detector import init
from casc.train.loop import train
from casc.train.transfer import transfer

FIVE = tuple(Category(i + 1, name) for i, name in enumerate(("ant", "bee", "cat", "dog", "eel")))
CLS, LOGITS = "roi_head.bbox_head.{}.fc_cls", "roi_head.mask_head.{}.conv_logits"


def named(*names: str) -> tuple[Category, ...]:
    return tuple(Category(10 * (i + 1), name) for i, name in enumerate(names))


@pytest.fixture
def weights(tiny_recipe) -> Weights:
    """Of five classes, with values that say where they come from."""
    model = replace(tiny_recipe.model, classes=5)
    params, buffers = init(model, torch.Generator().manual_seed(5))
    recipe = to_json(replace(tiny_recipe, model=model))
    return Weights("five", "casc", params | buffers, FIVE, recipe)


def moved(recipe, weights, categories):
    recipe = replace(recipe, model=replace(recipe.model, classes=len(categories)))
    params, buffers = init(recipe.model, torch.Generator().manual_seed(1))
    made, _, notes = transfer(recipe, weights, params, buffers, categories)
    assert made.keys() == params.keys()
    return params, made, notes


def test_rows_follow_the_names_of_their_classes(tiny_recipe, weights):
    fresh, made, notes = moved(tiny_recipe, weights, named("dog", "fox", "ant"))
    for stage in range(3):
        for kind in ("weight", "bias"):
            for layer, rest in ((CLS, 1), (LOGITS, 0)):
                name = f"{layer.format(stage)}.{kind}"
                old, new = weights.tensors[name], made[name]
                assert new.shape == fresh[name].shape
                assert torch.equal(new[0], old[3])
                assert torch.equal(new[1], fresh[name][1])
                assert torch.equal(new[2], old[0])
                # The background comes last, whatever the number of classes.
                assert torch.equal(new[3:], old[5:])
                assert len(new[3:]) == rest
    for name, value in made.items():
        if "fc_cls" not in name and "conv_logits" not in name:
            assert torch.equal(value, weights.tensors[name])
    text = "\n".join(notes)
    taken = len(fresh) - 12
    assert f"{taken} tensors taken" in text
    assert "2 kept by name (dog, ant), 1 new (fox), 3 left (bee, cat, eel)" in text
    assert "re-made: known classes' rows taken" in text
    assert text.count("roi_head.bbox_head.1.fc_cls") == 1
    assert not [name for name in weights.tensors if "num_batches" not in name and name not in made]


def test_own_boxes_follow_the_names_of_their_classes(tiny_recipe):
    """Four rows each; and classes are kept where all share one box in the weights."""
    for own in (True, False):
        head = replace(tiny_recipe.model.box_head, class_specific=True)
        recipe = replace(tiny_recipe, model=replace(tiny_recipe.model, box_head=head))
        theirs = replace(head, class_specific=own)
        model = replace(recipe.model, classes=5, box_head=theirs)
        params, buffers = init(model, torch.Generator().manual_seed(5))
        weights = Weights("five", "casc", params | buffers, FIVE, None)
        fresh, made, _ = moved(recipe, weights, named("dog", "fox", "ant"))
        for stage in range(3):
            name = CLS.format(stage) + ".weight"
            assert torch.equal(made[name][[0, 2]], params[name][[3, 0]])
            name = name.replace("fc_cls", "fc_reg")
            new, old = made[name].unflatten(0, (3, 4)), fresh[name].unflatten(0, (3, 4))
            assert torch.equal(new[1], old[1])
            if own:
                assert torch.equal(new[[0, 2]], params[name].unflatten(0, (5, 4))[[3, 0]])
            else:
                assert torch.equal(new, old)


def test_scores_of_masks_follow_the_names_of_their_classes(tiny_recipe):
    head = replace(tiny_recipe.model.mask_head, scoring=True)
    recipe = replace(tiny_recipe, model=replace(tiny_recipe.model, mask_head=head))
    model = replace(recipe.model, classes=5)
    params, buffers = init(model, torch.Generator().manual_seed(5))
    weights = Weights("five", "casc", params | buffers, FIVE, None)
    fresh, made, _ = moved(recipe, weights, named("dog", "fox", "ant"))
    for name, rows in (("weight", 2), ("bias", 1)):
        name = f"roi_head.mask_iou_head.fc_mask_iou.{name}"
        assert made[name].dim() == rows
        assert torch.equal(made[name][[0, 2]], params[name][[3, 0]])
        assert torch.equal(made[name][1], fresh[name][1])


def test_the_same_classes_in_another_order_are_put_in_order(tiny_recipe, weights):
    """As many classes and all shapes alike: labels must not shift (mmdetection#9611)."""
    _, made, notes = moved(tiny_recipe, weights, FIVE[::-1])
    name = CLS.format(0) + ".weight"
    assert torch.equal(made[name][:5], weights.tensors[name][:5].flip(0))
    assert torch.equal(made[name][5], weights.tensors[name][5])
    assert "5 kept by name" in "\n".join(notes)
    _, made, notes = moved(tiny_recipe, weights, FIVE)
    assert torch.equal(made[name], weights.tensors[name])
    assert "re-made" not in "\n".join(notes)


def test_classes_that_are_all_new_begin_afresh(tiny_recipe, weights):
    fresh, made, notes = moved(tiny_recipe, weights, named("fox", "gnu"))
    for stage in range(3):
        for layer in (CLS, LOGITS):
            name = layer.format(stage) + ".weight"
            assert torch.equal(made[name], fresh[name])
    assert "re-made, at initial values" in "\n".join(notes)
    assert torch.equal(
        made["roi_head.bbox_head.0.shared_fcs.0.weight"],
        weights.tensors["roi_head.bbox_head.0.shared_fcs.0.weight"],
    )


def test_rows_are_not_kept_above_layers_that_were_not_taken(tiny_recipe, weights):
    tensors = dict(weights.tensors)
    tensors["roi_head.bbox_head.1.shared_fcs.0.bias"] = torch.zeros(7)
    fresh, made, _ = moved(tiny_recipe, replace(weights, tensors=tensors), named("dog", "ant"))
    for stage in (0, 1, 2):
        name = CLS.format(stage) + ".weight"
        kept = torch.equal(made[name][0], tensors[name][3])
        assert kept == (stage != 1)
        assert torch.equal(made[name], fresh[name]) == (stage == 1)


def test_weights_without_names(tiny_recipe, weights):
    nameless = replace(weights, categories=None)
    # By rising id, as COCO's own lists are; the data's labels may be in another order.
    categories = (Category(9, "x"), Category(2, "y"), Category(5, "z"), Category(7, "v"),
                  Category(6, "w"))  # fmt: skip
    _, made, notes = moved(tiny_recipe, nameless, categories)
    name = LOGITS.format(2) + ".weight"
    assert torch.equal(made[name], weights.tensors[name][[4, 0, 1, 3, 2]])
    assert "name none of their 5" in "\n".join(notes)
    fresh, made, notes = moved(tiny_recipe, nameless, named("ant", "bee"))
    assert torch.equal(made[name], fresh[name])
    assert "none can be kept" in "\n".join(notes)


def test_a_name_that_occurs_twice_matches_nothing(tiny_recipe, weights):
    fresh, made, notes = moved(tiny_recipe, weights, named("dog", "ant", "dog"))
    name = CLS.format(0) + ".bias"
    assert torch.equal(made[name][[0, 2]], fresh[name][[0, 2]])
    assert "1 kept by name (ant)" in "\n".join(notes)


def test_what_is_refused(tiny_recipe, weights):
    def refused(recipe, found, message):
        with pytest.raises(UserError, match=message):
            moved(recipe, found, named("ant", "bee"))

    only = {"unknown.weight": torch.ones(3)}
    refused(tiny_recipe, replace(weights, tensors=only), "none of its 1 tensors fits")
    four = replace(weights, categories=FIVE[:4])
    refused(tiny_recipe, four, "five: names 4 classes, but its heads know 5")
    image = replace(tiny_recipe.image, mean=(0.0, 0.0, 0.0))
    refused(replace(tiny_recipe, image=image), weights, r"--image.mean: .* trained with \[123.675")
    # Frozen layers that keep random values would learn nothing, ever.
    other = replace(tiny_recipe.model.backbone, width=16, frozen_stages=1)
    narrow = replace(tiny_recipe, init="five", model=replace(tiny_recipe.model, backbone=other))
    refused(
        narrow, weights, "--init five: .*backbone.conv1.weight .*--model.backbone.frozen-stages"
    )


def test_other_anchors_are_pointed_out(tiny_recipe, weights):
    anchors = replace(tiny_recipe.model.anchors, scale=3.0)
    recipe = replace(tiny_recipe, model=replace(tiny_recipe.model, anchors=anchors))
    _, _, notes = moved(recipe, weights, FIVE)
    assert notes[-1] == (
        "warning: the weights were trained with model.anchors.scale 2, this run has 3.0"
    )
    _, _, notes = moved(tiny_recipe, weights, FIVE)
    assert not [note for note in notes if note.startswith("warning")]
    _, _, notes = moved(tiny_recipe, replace(weights, problem="asks for more"), FIVE)
    assert notes[-1] == "warning: five: asks for more"


def test_a_run_says_what_it_took(tiny_recipe, weights, tmp_path, capsys):
    classes = [{"id": i, "name": name} for i, name in enumerate(("red", "b", "c", "d", "e"))]
    metadata = {"recipe": json.dumps(weights.recipe), "classes": json.dumps(classes)}
    save_file(weights.tensors, tmp_path / "five.safetensors", metadata=metadata)
    backbone = replace(tiny_recipe.model.backbone, frozen_stages=4)
    recipe = replace(
        tiny_recipe, init=str(tmp_path / "five.safetensors"), max_steps=2,
        model=replace(tiny_recipe.model, backbone=backbone),
    )  # fmt: skip
    state = train(recipe).state
    shown = capsys.readouterr().out
    assert "classes: 1 kept by name (red), 1 new (green), 4 left (b, c, d, e)" in shown
    for name, value in state.params.items():
        if name.startswith("backbone."):
            assert not value.requires_grad
            assert torch.equal(value, weights.tensors[name])
    assert not torch.equal(
        state.params["neck.fpn_convs.0.conv.weight"],
        weights.tensors["neck.fpn_convs.0.conv.weight"],
    )
