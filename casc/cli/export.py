"""`casc export`."""

import json
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from casc.errors import UserError
from casc.inference.settings import Settings
from casc.printing import say

if TYPE_CHECKING:  # torch takes seconds to import, which --help needn't wait for
    from casc.checkpoints.model import Trained
    from casc.export.check import Agreement
    from casc.export.pictures import Picture
    from casc.export.program import Shape

_DIVISOR = 32
_LARGEST = 2**16
"""Pixels of a side, and images of a batch: more than JPEG has, or any machine's memory."""
_SOME = 3
"""Images per call that a program of any number is checked with."""


@dataclass(frozen=True)
class ExportCommand:
    """Write a checkpoint's detector, masks included, as a file that runs without casc.

    Decoded pixels in, detections out: resize and normalisation are inside. What was written
    is run on the CPU and compared with casc's own inference; it is kept only if they agree.

    Examples: `casc export runs/coco_1x detector.onnx`; `casc export runs/coco_1x detector.pt2
    --format pt2 --canvas 800 1344`.
    """

    checkpoint: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CHECKPOINT")]]
    """A run's folder, a checkpoint's folder, a .safetensors file, a checkpoint of MMDetection or
    Detectron2, its URL, or a published one's name (`casc weights`)."""
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    """The file: .onnx, or .pt2 for the other two forms. OUT.json is written beside it."""
    format: Literal["onnx", "pt2", "aoti"] = "onnx"
    """onnx: standard operators only. pt2: a torch.export program of plain ATen. aoti: the same,
    compiled by AOTInductor for processors like this machine's, for C++ or Python."""
    batch: int | Literal["dynamic"] = 1
    """Images per call. dynamic: any number, one after another within the program; onnx only."""
    opset: int | None = None
    """ONNX's operator set, from 18 on, for runtimes that know no newer one; by default 20."""
    canvas: tuple[int, int] | None = None
    """Height and width that images are resized into. By default a square with room for any
    image at the recipe's size; one that suits your images is faster. Images for which it has
    no room at that size are made smaller."""
    pixels: tuple[int, int] | None = None
    """Height and width of the input, which has to hold every image as it is decoded; by default
    the canvas's."""
    short: int | None = None
    """Resize the shorter side to this; by default as the checkpoint's recipe has it."""
    long: int | None = None
    """Limit of the longer side; by default as the recipe has it."""
    roi_align: Literal["trained", "fixed"] = "trained"
    """trained: as the recipe has it. fixed: 2x2 samples per cell, whatever that says."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    images: tuple[str, ...] = ()
    """Compare on these files, folders or patterns; by default on generated pictures."""
    check: bool = True
    """Run what was written and compare it with casc's own inference."""

    def run(self) -> int:
        """Export; 1 if the written program doesn't agree with eager."""
        from casc.export.files import check_form, write
        from casc.export.metadata import describe
        from casc.export.program import capture

        self._check_arguments()
        check_form(self.format, check=self.check)
        trained, shape = self._trained()
        metadata = describe(trained, shape, self.format)
        with tempfile.TemporaryDirectory(dir=self.out.parent, prefix=".export-") as folder:
            path = Path(folder) / self.out.name
            model, image = trained.model, trained.image
            pictures = self._pictures(shape, trained.image.channels) if self.check else []
            begin = time.perf_counter()
            program = capture(trained.params, trained.buffers, model, image, shape)
            write(program, path, self.format, metadata, shape, self.opset)
            seconds = time.perf_counter() - begin
            say(f"{self.out}: {path.stat().st_size / 2**20:.1f} MiB, made in {seconds:.0f} s")
            if self.check:
                found, agrees = self._compare(path, trained, shape, pictures)
                if not agrees:
                    say(f"{self.out} is not kept: it differs from casc's own inference")
                    return 1
                metadata["check"] = found
            beside = Path(folder) / f"{self.out.name}.json"
            beside.write_text(json.dumps(metadata, indent=2) + "\n")
            beside.replace(f"{self.out}.json")
            path.replace(self.out)
        return 0

    def _check_arguments(self) -> None:
        from casc.export.files import SUFFIXES, check_opset

        suffix = SUFFIXES[self.format]
        if self.out.suffix != suffix:
            raise UserError(f"{self.out}: --format {self.format} is written to a {suffix} file")
        if self.out.exists():
            raise UserError(f"{self.out}: is there already; remove it, or choose another name")
        if not self.out.parent.is_dir():
            raise UserError(f"{self.out}: there is no folder {self.out.parent}")
        for flag, value in (("batch", self.batch), ("short", self.short), ("long", self.long)):
            if isinstance(value, int) and not 1 <= value <= _LARGEST:
                raise UserError(f"--{flag} {value}: must be 1 to {_LARGEST}")
        if self.format != "onnx" and self.batch == "dynamic":
            raise UserError(
                f"--batch dynamic: --format {self.format} has a fixed batch; give a number, or"
                " take --format onnx"
            )
        check_opset(self.opset, self.format)
        for flag, sides, step in (("canvas", self.canvas, _DIVISOR), ("pixels", self.pixels, 1)):
            if sides is not None and (min(sides) < 1 or any(side % step for side in sides)):
                wanted = f"multiples of {step}" if step > 1 else "at least 1"
                raise UserError(f"--{flag} {sides[0]} {sides[1]}: both must be {wanted}")
            if sides is not None and max(sides) > _LARGEST:
                raise UserError(f"--{flag} {sides[0]} {sides[1]}: must be at most {_LARGEST}")
        if self.images and not self.check:
            raise UserError("--images: nothing is compared with --no-check; drop one of them")

    def _trained(self) -> "tuple[Trained, Shape]":
        """The checkpoint with the settings that the program will have, and the sizes."""
        from casc.checkpoints.model import class_names, load_trained
        from casc.export.program import Shape

        trained = load_trained(self.checkpoint)
        given = {"short": self.short, "long": self.long}
        image = replace(trained.image, **{k: v for k, v in given.items() if v is not None})
        if image.long < image.short:
            raise UserError(f"--long {image.long}: must be at least --short, {image.short}")
        model = trained.model
        if self.roi_align != "trained":
            model = replace(model, roi_align=self.roi_align)
        inference = self.settings.applied(model.inference, class_names(trained))
        if inference.soft_nms != "off":
            raise UserError("--soft-nms: exported programs suppress boxes; leave it out")
        model = replace(model, inference=inference)
        side = -(-image.long // _DIVISOR) * _DIVISOR
        canvas = self.canvas or (side, side)
        batch = None if self.batch == "dynamic" else self.batch
        shape = Shape(batch, self.pixels or canvas, canvas)
        return trained._replace(model=model, image=image), shape

    def _pictures(self, shape: "Shape", channels: int) -> "list[Picture]":
        """What is compared; read before any work, in case that they can't be."""
        from casc.export.pictures import generated_pictures, read_pictures

        if self.images:
            return read_pictures(self.images, shape.pixels, channels)
        return generated_pictures(shape.pixels, channels=channels)

    def _compare(
        self, path: Path, trained: "Trained", shape: "Shape", pictures: "list[Picture]"
    ) -> tuple[dict[str, Any], bool]:
        """What the comparison found, as JSON, and whether it is within the tolerances."""
        import torch

        from casc.config import to_json
        from casc.export.check import Tolerances, compare
        from casc.export.files import load
        from casc.export.pictures import batches
        from casc.export.program import infer

        spent = {"eager": 0.0, self.format: 0.0}

        def timed(name: str, run):
            def call(*args):
                begin = time.perf_counter()
                found = run(*args)
                spent[name] += time.perf_counter() - begin
                return found

            return call

        def eager(pixels, size):
            settings = trained.model, trained.image, shape.canvas
            with torch.no_grad():
                return infer(trained.params, trained.buffers, *settings, pixels, size)

        tolerances = Tolerances()
        found: Agreement = compare(
            batches(pictures, shape.batch or _SOME),
            timed("eager", eager),
            timed(self.format, load(path)),
            trained.model.inference,
            tolerances,
        )
        say(found.table(tolerances))
        each = {name: seconds / len(pictures) for name, seconds in spent.items()}
        for name, seconds in each.items():
            say(f"  {name:6}  {seconds:.3g} s per image, {torch.get_num_threads()} threads")
        result = {
            "images": "given" if self.images else "generated",
            "found": to_json(found),
            "tolerances": to_json(tolerances),
        }
        return result, found.within(tolerances)
