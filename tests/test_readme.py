"""What the README says is true of the project it stands in."""

import re
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from casc.checkpoints.published import COCO_CLASSES, PUBLISHED
from casc.data.index import Category
from casc.device.compute import Compute
from casc.inference.detector import Detector
from casc.model.box_head import BoxHeadConfig
from casc.model.detector import init
from casc.model.detector_config import DetectorConfig
from casc.model.preprocess import ImageConfig
from casc.model.resnet import ResNetConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TWO_COMMANDS = [f"python3 -m pip install rust-just && just {job}" for job in ("demo", "test")]


def test_first_screen_has_the_two_commands() -> None:
    first_screen = README.splitlines()[:24]
    for command in TWO_COMMANDS:
        assert any(line.strip() == command for line in first_screen)


def test_ci_runs_the_readmes_test_command() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    install, job = TWO_COMMANDS[1].split(" && ")
    assert install.split()[-1] in ci
    assert job in ci.splitlines()


def test_the_three_lines_run(tmp_path, monkeypatch) -> None:
    """With a fresh detector for the published one, which tests can't download."""
    (example,) = re.findall(r"```python\n(.*?)```", "\n".join(README.splitlines()[:20]), re.DOTALL)
    (name,) = re.findall(r'"(mmdet:.*?)"', example)
    assert name in PUBLISHED
    config = DetectorConfig(backbone=ResNetConfig(width=8), box_head=BoxHeadConfig(channels=16))
    params, buffers = init(config, torch.Generator().manual_seed(0))
    classes = tuple(Category(i + 1, text) for i, text in enumerate(COCO_CLASSES))
    image, compute = ImageConfig(short=64, long=96), Compute(compile=False)
    found = Detector(params, buffers, config, image, compute, torch.device("cpu"), classes)
    monkeypatch.setattr("casc.inference.load.load", {name: found}.__getitem__)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (640, 480)).save("photo.jpg")
    exec(compile(example, "README.md", "exec"), {})
    with Image.open("annotated.png") as picture:
        assert picture.size == (640, 480)


def test_library_example_runs() -> None:
    page = (ROOT / "docs" / "one-graph.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict = {}
    exec(compile(example, "docs/one-graph.md", "exec"), names)
    assert names["total"].isfinite()
    assert all(p.grad is not None for p in names["params"].values() if p.requires_grad)
    assert names["boxes"].shape == (2, 100, 4)
    assert names["masks"].shape == (2, 100, 28, 28)


def test_every_just_recipe_named_exists() -> None:
    named = set(re.findall(r"\bjust ([a-z][\w-]*)", README)) - {"instead"}
    just = Path(sys.executable).with_name("just")
    listed = subprocess.run(
        [just, "--justfile", ROOT / "justfile", "--summary"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert named <= set(listed)


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / target).exists(), target


def test_readme_stays_short() -> None:
    assert len(README.splitlines()) < 120
