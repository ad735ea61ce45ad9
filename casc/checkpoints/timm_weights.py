"""Pretrained weights of timm as those of casc's backbones, by timm's names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from casc.checkpoints.read import Weights
from casc.errors import UserError
from casc.model.backbone import Backbone
from casc.model.resnet import PREFIX, ResNetConfig
from casc.model.timm_backbone import TimmConfig, build, create
from casc.model.vit import PATCH, ViTConfig

SOURCE = "timm:"


def timm_weights(source: str, backbone: Backbone) -> Weights:
    """Have timm fetch weights, from the Hugging Face hub or its cache.

    Those of a plain vision transformer are resized to the config's patches and grid. How images
    must be normalised for them is in the `recipe` that comes with them.

    Args:
        source: `timm:NAME`, with the tag of the weights where there are several
            (`timm:convnext_tiny.fb_in22k`).
        backbone: what they are for.

    Raises:
        UserError: timm isn't there, doesn't know them, can't get them, or they are of another
            network.
    """
    name = source.removeprefix(SOURCE)
    architecture = name.partition(".")[0]
    where = f"--init {source}"
    options: dict[str, Any] = {"pretrained": True}
    module: Any
    try:
        match backbone:
            case TimmConfig():
                if architecture != backbone.name.partition(".")[0]:
                    raise UserError(
                        f"{where}: weights of another network than"
                        f" --model.backbone.name {backbone.name}; use --init timm:{backbone.name}"
                    )
                module = create(name, where, **options)
                # What timm makes itself, and so doesn't store, too.
                held = dict(module.named_parameters()) | dict(module.named_buffers())
                tensors = {f"{PREFIX}.{k}": v.detach() for k, v in held.items()}
            case ViTConfig():
                size = backbone.grid * PATCH
                module = build(
                    name, where, num_classes=0, img_size=size, patch_size=PATCH, **options
                )
                tensors = _of_vit(module.state_dict(), backbone.grid)
            case ResNetConfig():
                module = build(name, where, num_classes=0, **options)
                tensors = {f"{PREFIX}.{k}": v for k, v in module.state_dict().items()}
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{where}: could not be had ({str(error).strip().splitlines()[0]}); fetch it"
            " where there is a network, and copy the Hugging Face cache ($HF_HOME) here"
        ) from None
    image = {
        key: [round(255 * x, 3) for x in module.pretrained_cfg[key]] for key in ("mean", "std")
    }
    return Weights(source, "timm", tensors, recipe={"image": image})


def _of_vit(found: Mapping[str, Tensor], grid: int) -> dict[str, Tensor]:
    """A vision transformer's without class and register tokens, final norm and head."""
    tensors = {
        name: value
        for name, value in found.items()
        if name.startswith(("patch_embed.proj.", "blocks."))
    }
    if "pos_embed" in found:
        # What comes first belongs to those tokens.
        tensors["pos_embed"] = found["pos_embed"].flatten(0, -2)[None, -(grid**2) :]
    return {f"{PREFIX}.{name}": value for name, value in tensors.items()}
