"""Measure how a step's cost grows and draw docs/costs.svg: `python docs/plot_costs.py`.

Steps run eager and on one thread, so that nothing but the work changes from point to point.
"""

import json
import subprocess
import sys
from pathlib import Path

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


def measure(options: list[str]) -> dict:
    """One `casc bench train` in float32."""
    command = [sys.executable, "-m", "casc", "bench", "train", "--json", "--no-compile"]
    command += ["--dtype", "fp32", "--threads", "1", "--steps", "3", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def chart(title: str, points: list[tuple[float, float]], left: int) -> str:
    """One panel: seconds over what the title names."""
    right, top = max(x for x, _ in points), 1.1 * max(y for _, y in points)
    place = [(left + LEFT + x / right * WIDTH, TOP + HEIGHT - y / top * HEIGHT) for x, y in points]
    parts = [
        f'<text x="{left + LEFT}" y="24" font-size="13">{title}</text>',
        f'<path d="M{left + LEFT} {TOP}v{HEIGHT}h{WIDTH}" fill="none" stroke="gray"/>',
        f'<polyline points="{" ".join(f"{x:.0f},{y:.0f}" for x, y in place)}"'
        ' fill="none" stroke="#1565c0" stroke-width="2"/>',
    ]
    for (x, y), (px, py) in zip(points, place, strict=True):
        parts.append(f'<circle cx="{px:.0f}" cy="{py:.0f}" r="3.5" fill="#1565c0"/>')
        label = f'font-size="11" text-anchor="middle" x="{px:.0f}"'
        parts.append(f'<text {label} y="{py - 8:.0f}">{y:.2f} s</text>')
        parts.append(f'<text {label} y="{TOP + HEIGHT + 16}">{x:.3g}</text>')
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
        panels.append(chart(title, points, i * (WIDTH + LEFT + 20)))
    size = f'width="{3 * (WIDTH + LEFT + 20)}" height="{HEIGHT + TOP + 30}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    back = '<rect width="100%" height="100%" fill="white"/>'
    text = "\n".join([head, back, *panels, "</svg>"])
    (Path(__file__).parent / "costs.svg").write_text(text + "\n")


if __name__ == "__main__":
    main()
