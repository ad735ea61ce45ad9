"""Detectors on the Hugging Face hub: `hf://owner/name`, by huggingface_hub.

What is pushed is a safetensors file with the model, the image sizes, the classes and the figures;
where the run read its data and wrote its output stays at home.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from casc.checkpoints.format import METRICS, VERSION, WEIGHTS, WEIGHTS_FORMAT
from casc.checkpoints.read import Weights
from casc.errors import UserError
from casc.json_files import read_json

CARD = """\
---
library_name: casc
pipeline_tag: image-segmentation
tags: [cascade-mask-rcnn, instance-segmentation, object-detection]
---

# {title}

Cascade Mask R-CNN, trained with casc: {classes} classes, images of {short} x {long} pixels.

```python
import casc

detector = casc.load("hf://{name}")
detector("photo.jpg").draw().save("annotated.png")
```

| figure | value |
|---|---|
{figures}

Classes: {names}.
"""


def push(weights: Weights, figures: dict[str, Any], name: str, *, private: bool = False) -> str:
    """Upload a run's weights with a model card.

    Args:
        weights: of a run of casc.
        figures: its evaluation, as the checkpoint has it; may be empty.
        name: `owner/name`; the repository is made if it isn't there.
        private: whether only the owner sees a repository that is made.

    Returns:
        The page's URL.

    Raises:
        UserError: these aren't a run's weights, huggingface_hub isn't installed, or the hub
            refuses.
    """
    if weights.kind != "casc" or weights.recipe is None:
        raise UserError(f"{weights.source}: isn't of casc; `casc convert` makes it so")
    hub = _hub()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _write(weights, figures, name, folder)
        api = hub.HfApi()
        try:
            url = api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add the detector")
        except Exception as error:  # of the network, of the hub, of a name that it won't have
            raise UserError(f"{name}: can't be pushed ({_first_line(error)})") from None
    return str(url)


def fetch(source: str) -> Path:
    """Download the weights of `hf://owner/name` or `hf://owner/name@revision`; they are kept.

    Raises:
        UserError: huggingface_hub isn't installed, or there is no such detector.
    """
    name, _, revision = source.removeprefix("hf://").partition("@")
    hub = _hub()
    try:
        return Path(hub.hf_hub_download(name, WEIGHTS, revision=revision or None))
    except Exception as error:  # of the network, of the hub, of a name that it won't have
        raise UserError(f"{source}: can't be had ({_first_line(error)})") from None


def figures_beside(weights: Weights) -> dict[str, Any]:
    """Give the figures that the checkpoint of these weights was evaluated to; none if it wasn't."""
    file = Path(weights.source).with_name(METRICS)
    return read_json(file) if file.is_file() else {}


def _write(weights: Weights, figures: dict[str, Any], name: str, folder: Path) -> None:
    recipe = weights.recipe or {}
    shared = {key: recipe[key] for key in ("name", "model", "image", "dtype") if key in recipe}
    classes = [{"id": c.id, "name": c.name} for c in weights.categories or ()]
    metadata = {
        "format": WEIGHTS_FORMAT,
        "version": str(VERSION),
        "recipe": json.dumps(shared),
        "classes": json.dumps(classes or None),
        "step": json.dumps(weights.step),
    }
    save_file(weights.tensors, folder / WEIGHTS, metadata=metadata)
    for file, data in (("recipe.json", shared), ("classes.json", classes), (METRICS, figures)):
        (folder / file).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    image = shared.get("image", {})
    rows = [f"| {key} | {value:.3f} |" for key, value in figures.items() if value is not None]
    card = CARD.format(
        title=name.rpartition("/")[2],
        name=name,
        classes=len(classes) or shared.get("model", {}).get("classes"),
        short=image.get("short"),
        long=image.get("long"),
        figures="\n".join(rows) or "| not evaluated | |",
        names=", ".join(c["name"] for c in classes) or "not named",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("the hub needs `pip install 'casc[hub]'`") from None
    return huggingface_hub


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
