"""`casc bench card`: a card's figures, to send back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from casc.errors import UserError
from casc.printing import say


@dataclass(frozen=True)
class CardCommand:
    """Measure what casc does on this machine, in about ten minutes, as a page to send to someone.

    casc doctor, casc verify, the training step and inference at several sizes, memory, a trace
    and the costliest kernels; into card.json, card.html and trace.json.gz of a folder. Needs no
    network and no data. On a CPU it is a rehearsal: small images, eager.
    """

    out: Path = Path("card")
    """Folder for the results."""
    goldens: Path = Path("tests/goldens")
    """Folder of golden files for `casc verify`; without them that part is left out, and said."""
    device: str = "auto"
    """auto: the accelerator if there is one, else the CPU. Or cpu, cuda, npu, ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of convolutions and matrix products; auto takes bfloat16 where it suits the device."""
    compile: Literal["auto", "on", "off"] = "auto"
    """auto compiles on accelerators."""
    canvases: tuple[tuple[int, int], ...] = ()
    """Heights and widths of the images in pixels; by default 800 x 1088 and 1088 x 800, or on a
    CPU 64 x 96 and 96 x 64."""
    batches: tuple[int, ...] = ()
    """Images per training step; by default 2, 4, 8 and 16, or on a CPU 1 and 2."""
    inference_batches: tuple[int, ...] = ()
    """Images per step of inference; by default 1 and 8, or on a CPU 1 and 2."""
    steps: int | None = None
    """Timed steps of each, of which the median is reported; by default 10, or on a CPU 2."""
    minutes: float = 10
    """For all together; what there is no time for is left out, and said."""

    def run(self) -> int:
        """Measure; 1 if verify or a step failed."""
        from casc.bench.card import CardPlan, measure_card
        from casc.cli.bench import check_canvas
        from casc.device.devices import choose_device, choose_dtype

        device = choose_device(self.device)
        rehearsal = device.type == "cpu"
        batches = self.batches or ((1, 2) if rehearsal else (2, 4, 8, 16))
        inference_batches = self.inference_batches or ((1, 2) if rehearsal else (1, 8))
        steps = (2 if rehearsal else 10) if self.steps is None else self.steps
        most = 1e6  # minutes that a clock counts; no NaN either
        if min(*batches, *inference_batches, steps) < 1 or not 0 < self.minutes < most:
            raise UserError(
                "--batches, --inference-batches, --steps and --minutes must be positive"
            )
        canvases = self.canvases or (
            ((64, 96), (96, 64)) if rehearsal else ((800, 1088), (1088, 800))
        )
        for canvas in canvases:
            check_canvas(canvas)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.out}: can't be made ({error.strerror})") from None
        goldens = self.goldens if any(self.goldens.glob("*.safetensors")) else None
        if goldens is None and self.goldens != CardCommand.goldens:
            raise UserError(f"--goldens {self.goldens}: no golden files there")
        plan = CardPlan(
            out=self.out,
            goldens=goldens,
            device=str(device),
            dtype=str(choose_dtype(self.dtype, device)).removeprefix("torch."),
            compile=self.compile == "on" or (self.compile == "auto" and not rehearsal),
            canvases=canvases,
            batches=batches,
            inference_batches=inference_batches,
            steps=steps,
            seconds=60 * self.minutes,
        )
        report = measure_card(plan, say)
        failed = [row["name"] for row in report["steps"] if "error" in row]
        say(f"the page is {self.out / 'card.html'}, the figures {self.out / 'card.json'}")
        return int(bool(failed) or (goldens is not None and not report["verify"]["passed"]))
