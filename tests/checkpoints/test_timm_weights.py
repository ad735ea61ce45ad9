"""`--init timm:NAME`: timm's own weights in casc's backbones. Nothing is downloaded here."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor

from casc.checkpoints.timm_weights import timm_weights
from casc.data.index import read_index
from casc.errors import UserError
from casc.model import detector
from casc.model.preprocess import ImageConfig
from casc.model.resnet import ResNetConfig
from casc.model.timm_backbone import TimmConfig
from casc.model.vit import ViTConfig
from casc.train.recipe import Recipe
from casc.train.start import fresh_state

VIT = ViTConfig(channels=192, heads=3, grid=6, drop_path=0.0)


@pytest.fixture
def made(monkeypatch) -> list[dict[str, Tensor]]:
    """timm without a network: asked for pretrained weights, it gives random ones, listed here."""
    created, states = timm.create_model, []

    def create(name, pretrained=False, **options):
        module = created(name, pretrained=False, **options)
        if pretrained:
            for value in module.parameters():
                torch.nn.init.normal_(value)
            states.append(module.state_dict())
        return module

    monkeypatch.setattr(timm, "create_model", create)
    return states


def start(recipe: Recipe, backbone, init: str):
    model = replace(recipe.model, backbone=backbone)
    recipe = replace(recipe, model=model, init=init)
    cpu = torch.device("cpu")
    return fresh_state(recipe, read_index(recipe.data), cpu, torch.contiguous_format)


@pytest.mark.parametrize(
    ("backbone", "init"),
    [
        (TimmConfig("convnext_atto"), "timm:convnext_atto.d2_in1k"),
        (TimmConfig("swin_tiny_patch4_window7_224"), "timm:swin_tiny_patch4_window7_224"),
        (ResNetConfig(depth=18, frozen_stages=1), "timm:resnet18.a1_in1k"),
    ],
)
def test_a_run_begins_with_timms_weights(backbone, init, tiny_recipe, made):
    state, notes = start(tiny_recipe, backbone, init)
    (theirs,) = made
    params = {**state.params, **state.buffers}
    for name, value in theirs.items():
        assert torch.equal(params[f"backbone.{name}"], value), name
    assert any(f"weights from {init}: " in note for note in notes)


def test_a_plain_transformer_leaves_its_tokens(tiny_recipe, made):
    """Embeddings of patches are taken, of the class token isn't; relative ones begin at 0."""
    half = (127.5, 127.5, 127.5)
    recipe = replace(tiny_recipe, image=replace(tiny_recipe.image, mean=half, std=half))
    state, _ = start(recipe, VIT, "timm:vit_tiny_patch16_224")
    (theirs,) = made
    assert theirs["pos_embed"].shape == (1, 37, 192)
    assert torch.equal(state.params["backbone.pos_embed"], theirs["pos_embed"][:, 1:])
    for name, value in state.params.items():
        if ".blocks." in name and ".rel_pos_" not in name:
            assert torch.equal(value, theirs[name.removeprefix("backbone.")]), name
        elif ".rel_pos_" in name:
            assert not value.any()


@pytest.mark.parametrize(
    ("backbone", "init", "message"),
    [
        (TimmConfig("convnext_atto"), "timm:convnext_tiny", "--init timm:convnext_atto"),
        (VIT, "timm:vit_small_patch16_224.dino", "doesn't fit the backbone at backbone."),
        (
            replace(VIT, channels=384, heads=6, layer_scale=True),
            "timm:vit_small_patch16_224.dino",
            "at backbone.blocks.0.ls1",
        ),
        (ResNetConfig(), "timm:convnext_atto", "doesn't fit the backbone at backbone.conv1"),
        (
            TimmConfig("convnext_atto"),
            "timm:convnext_atto.of_nobody",
            "no weights of_nobody of convnext_atto; it has convnext_atto.d2_in1k",
        ),
        (VIT, "timm:convnext_atto", "plain vision transformer; .*timm:vit_base_patch16_224.mae"),
        (TimmConfig("convnext_atto"), "timm:convnext_atta", "no such model|another network"),
    ],
)
def test_other_networks_weights_are_refused(backbone, init, message, tiny_recipe, made):
    with pytest.raises(UserError, match=f"--init .*{message}"):
        start(tiny_recipe, backbone, init)


def test_images_are_normalised_as_the_weights_want(tiny_recipe, made):
    """ImageNet's mean and deviation as casc has them, to the bit, or else it is said."""
    assert timm_weights("timm:convnext_atto", TimmConfig("convnext_atto")).recipe == {
        "image": {"mean": list(tiny_recipe.image.mean), "std": list(tiny_recipe.image.std)}
    }
    with pytest.raises(UserError, match=r"--image.mean: the weights of timm:vit_tiny.* 127.5"):
        start(tiny_recipe, VIT, "timm:vit_tiny_patch16_224")


def test_weights_that_cannot_be_fetched(tiny_recipe, monkeypatch):
    created = timm.create_model

    def create(name, pretrained=False, **options):
        if pretrained:
            raise ConnectionError("no route to host\nand more")
        return created(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(UserError, match=r"--init timm:.*could not be had \(no route to host\)"):
        start(tiny_recipe, TimmConfig("convnext_atto"), "timm:convnext_atto.d2_in1k")


def test_other_programs_have_no_such_backbone(tiny_recipe):
    from casc.checkpoints.foreign import check_expressible

    model = replace(tiny_recipe.model, backbone=TimmConfig("convnext_atto"))
    params, _ = detector.init(model, torch.Generator().manual_seed(0))
    assert "backbone.stem_0.weight" in params
    with pytest.raises(UserError, match="TimmConfig: only casc reads such a network"):
        check_expressible(model, ImageConfig())
