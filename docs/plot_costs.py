"""Measure how a step's cost grows and draw docs/costs.svg: `python docs/plot_costs.py`.

Steps run eager and on one thread, so that nothing but the work changes from point to point.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from casc.bench.batch import CLASSES, Load, made_up_batch
from casc.bench.train import image_config
from casc.device.compute import Compute
from casc.model import detector, forward_train
from casc.model.detector_config import DetectorConfig
from casc.model.losses import mean_losses
from casc.model.steps import anchor_count, to_format, training_inputs

SWEEPS = {
    "images per step (256 x 256)": [
        (batch, ["--canvas", "256", "256", "--batch", str(batch)]) for batch in (1, 2, 4, 8)
    ],
    "megapixels (one image)": [
        (h * w / 1e6, ["--batch", "1", "--canvas", str(h), str(w)])
        for h, w in ((256, 256), (512, 512), (640, 800), (800, 1088))
    ],
    "objects per image (256 x 256, two images)": [
        (n, ["--canvas", "256", "256", "--objects", str(n), "--capacity", "100"])
        for n in (0, 10, 40, 100)
    ],
}
WIDTH, HEIGHT, LEFT, TOP = 300, 200, 48, 40
BLUE, ORANGE = "#1565c0", "#b85c00"


def measure(options: list[str]) -> dict:
    """One `casc bench train` in float32."""
    command = [sys.executable, "-m", "casc", "bench", "train", "--json", "--no-compile"]
    command += ["--dtype", "fp32", "--threads", "1", "--steps", "3", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def without_masks(counts: list[int], rounds: int = 5) -> list[float]:
    """Median seconds of a step's losses and gradients but the masks', the counts in turns."""
    torch.set_num_threads(1)
    canvas, config = (256, 256), DetectorConfig(classes=CLASSES)
    compute = Compute(torch.float32, torch.channels_last, compile=False)
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    params = to_format(params, compute.memory_format)
    learning = list(detector.trainable(config, params).values())
    for value in learning:
        value.requires_grad_()

    def step(load: Load) -> float:
        batch = made_up_batch(load, CLASSES)
        start = time.perf_counter()
        inputs = training_inputs(batch, image_config(load), canvas, compute)
        anchors = anchor_count(config.anchors, canvas)
        noise = forward_train.draw_noise(config, batch.seed, anchors, batch.valid.shape[1])
        features = detector.extract(params, buffers, config, inputs.image)
        losses, _, _ = forward_train.box_branch(params, config, features, inputs, noise)
        torch.autograd.grad(mean_losses(losses)[0], learning, allow_unused=True)
        return time.perf_counter() - start

    loads = [Load(canvas, objects=n, capacity=100) for n in counts]
    times = [[step(load) for load in loads] for _ in range(rounds + 1)][1:]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def chart(title: str, lines: dict[str, list[tuple[float, float]]], left: int) -> str:
    """One panel: seconds over what the title names, a line for each kind of step."""
    points = [point for line in lines.values() for point in line]
    right, top = max(x for x, _ in points), 1.1 * max(y for _, y in points)
    parts = [
        f'<text x="{left + LEFT}" y="20" font-size="13">{title}</text>',
        f'<path d="M{left + LEFT} {TOP}v{HEIGHT}h{WIDTH}" fill="none" stroke="gray"/>',
        f'<text x="{left + LEFT - 6}" y="{TOP + HEIGHT}" font-size="11" text-anchor="end">0</text>',
    ]
    for x in sorted({x for x, _ in points}):
        at = f'x="{left + LEFT + x / right * WIDTH:.0f}" y="{TOP + HEIGHT + 16}"'
        parts.append(f'<text font-size="11" text-anchor="middle" {at}>{x:.3g}</text>')
    for (name, line), colour in zip(lines.items(), (BLUE, ORANGE), strict=False):
        place = [
            (left + LEFT + x / right * WIDTH, TOP + HEIGHT - y / top * HEIGHT) for x, y in line
        ]
        parts.append(
            f'<polyline points="{" ".join(f"{x:.0f},{y:.0f}" for x, y in place)}"'
            f' fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        drop, last = 18 if colour == ORANGE else -9, -40.0
        for (_, y), (px, py) in zip(line, place, strict=True):
            anchor = "start" if px < left + LEFT + 20 else "middle"
            label = f'font-size="11" fill="{colour}" text-anchor="{anchor}"'
            parts.append(f'<circle cx="{px:.0f}" cy="{py:.0f}" r="3.5" fill="{colour}"/>')
            if px - last >= 40:  # labels would lie on each other
                parts.append(f'<text {label} x="{px:.0f}" y="{py + drop:.0f}">{y:.2f} s</text>')
                last = px
        if len(lines) > 1:
            row = TOP + 12 + 16 * list(lines).index(name)
            at = f'x="{left + LEFT + 8}" y="{row}"'
            parts.append(f'<text font-size="11" fill="{colour}" {at}>{name}</text>')
    return "\n".join(parts)


def main() -> None:
    """Measure every point, print it, and draw."""
    panels = []
    for i, (title, sweep) in enumerate(SWEEPS.items()):
        points = []
        for x, options in sweep:
            report = measure(options)
            print(title, x, f"{report['step_s']:.3f} s", report["positives"], flush=True)
            points.append((x, report["step_s"]))
        lines = {"whole step": points}
        if title.startswith("objects"):
            counts = [int(x) for x, _ in sweep]
            seconds = without_masks(counts)
            print("without masks", dict(zip(counts, seconds, strict=True)), flush=True)
            lines["without the mask branch"] = list(zip(counts, seconds, strict=True))
        panels.append(chart(title, lines, i * (WIDTH + LEFT + 30)))
    size = f'width="{3 * (WIDTH + LEFT + 30)}" height="{HEIGHT + TOP + 30}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    back = '<rect width="100%" height="100%" fill="white"/>'
    text = "\n".join([head, back, *panels, "</svg>"])
    (Path(__file__).parent / "costs.svg").write_text(text + "\n")


if __name__ == "__main__":
    main()
