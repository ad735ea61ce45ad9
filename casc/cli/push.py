"""`casc push`: a run's detector to the Hugging Face hub."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from casc.printing import say


@dataclass(frozen=True)
class PushCommand:
    """Upload a run's detector to the Hugging Face hub, with classes, figures and a model card.

    `casc.load("hf://OWNER/NAME")` and all commands read it from there. Needs casc[hub], and a
    login as `hf auth login` makes it. The run's paths and URLs aren't sent.

    Examples: `casc push runs/coco_1x me/shapes`; `casc push runs/coco_1x me/shapes --private`.
    """

    checkpoint: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CHECKPOINT")]]
    """A run's folder, a checkpoint's folder, or a .safetensors file."""
    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OWNER/NAME")]]
    """The repository on the hub, made if it isn't there."""
    private: bool = False
    """Make a repository that only its owner sees."""

    def run(self) -> int:
        """Upload."""
        from casc.checkpoints.hub import figures_beside, push
        from casc.checkpoints.read import read_weights

        weights = read_weights(self.checkpoint)
        url = push(weights, figures_beside(weights), self.name, private=self.private)
        say(f"{weights.source} is at {url}; load it as hf://{self.name}")
        return 0
