"""`casc weights`: published checkpoints, listed and downloaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from casc.errors import UserError
from casc.printing import say


@dataclass(frozen=True)
class WeightsCommand:
    """List published checkpoints that casc knows by name, or download some and report on them.

    The names are taken by `casc predict`, `casc eval`, `casc.load` and --init as well.

    Examples: `casc weights`; `casc weights mmdet:cascade_mask_rcnn_r50_fpn_1x_coco`.
    """

    names: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME...]")]] = ()
    """Which to download; without any, all are listed."""

    def run(self) -> int:
        """List or download."""
        from casc.checkpoints.published import PUBLISHED

        for name in self.names:
            if name not in PUBLISHED:
                raise UserError(f"{name}: isn't known; `casc weights` lists the names")
        if not self.names:
            width = max(map(len, PUBLISHED))
            say(f"{'name':{width}}  box AP  mask AP  licence  (as published, on COCO val2017)")
            for name, entry in PUBLISHED.items():
                figures = f"{entry.box_ap:6.1f}  {entry.mask_ap:7.1f}"
                say(f"{name:{width}}  {figures}  {entry.licence}")
        for name in self.names:
            _fetch(name)
        return 0


def _fetch(name: str) -> None:
    from casc.checkpoints.converting import read_any
    from casc.checkpoints.foreign import Stated
    from casc.checkpoints.published import PUBLISHED
    from casc.checkpoints.read import download_weights
    from casc.checkpoints.report import Report

    entry = PUBLISHED[name]
    say(f"{name}: {entry.url}, {entry.licence}")
    file: Path = download_weights(entry.url)
    kind, (_, rows, conventions) = read_any(str(file), Stated())
    say(Report(f"{file} ({kind})", name, rows, conventions, [], []))
