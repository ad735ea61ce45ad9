"""Exported programs of a small detector against eager, each run where casc can't be imported."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.export import ExportedProgram

from casc.checkpoints.model import Trained, load_trained
from casc.cli import main as cli
from casc.config import to_json
from casc.data.batch import Batch
from casc.device.compute import Compute
from casc.evaluate.mask_rle import paste_masks
from casc.export import files, runner
from casc.export.files import write
from casc.export.metadata import describe
from casc.export.operators import plain
from casc.export.pictures import generated_pictures
from casc.export.program import Shape, capture, infer
from casc.export.runner import detect, open_program
from casc.model import detector
from casc.model.detector_config import STAGES, DetectorConfig
from casc.model.forward_detect import Detections
from casc.model.preprocess import ImageConfig
from casc.model.steps import make_detect_step

DOCS = Path(__file__).resolve().parents[2] / "docs" / "exporting.md"
PIXELS = (80, 100)
SHAPE = Shape(batch=2, pixels=PIXELS, canvas=(96, 128))
COMPILER = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"
)


class World(NamedTuple):
    """A checkpoint, ten images, and what eager finds in them."""

    checkpoint: Path
    trained: Trained
    pixels: Tensor
    """[10, Hi, Wi, 3] uint8."""
    size: Tensor
    """[10, 2] int64."""
    eager: Detections
    """Fields [10, D, ...]."""


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory) -> World:
    """Random weights whose scores are spread, and a threshold that one image doesn't reach."""
    config, image, canvas = tiny
    image = replace(image, long=160)  # for which the canvas has no room
    scored = replace(config.mask_head, scoring=True)
    config = replace(config, stages=STAGES[:2], mask_head=scored)
    params, buffers = detector.init(config, torch.Generator().manual_seed(1))
    params["roi_head.mask_iou_head.fc_mask_iou.bias"] += 0.5  # some of what it tells is above 0
    pictures = generated_pictures(PIXELS)
    pixels, size = torch.stack([p for p, _ in pictures]), torch.tensor([s for _, s in pictures])

    def found(config: DetectorConfig) -> Detections:
        with torch.no_grad():
            return infer(params, buffers, config, image, canvas, pixels, size)

    best = found(config).scores.amax(dim=1).sort().values
    threshold = float(best[0] + best[1]) / 2
    config = replace(config, inference=replace(config.inference, score_threshold=threshold))
    eager = found(config)
    assert sorted(eager.valid.any(dim=1).tolist()) == [False] + [True] * 9
    assert eager.valid.sum() > 20
    path = tmp_path_factory.mktemp("export") / "weights.safetensors"
    recipe = {"model": to_json(config), "image": to_json(image)}
    classes = [{"id": i, "name": name} for i, name in enumerate(("red", "green", "blue"), start=1)]
    metadata = {"recipe": json.dumps(recipe), "classes": json.dumps(classes), "step": "7"}
    save_file(params | buffers, path, metadata)
    return World(path, load_trained(str(path)), pixels, size, eager)


def export(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", *(str(arg) for arg in args)])
    assert isinstance(stop.value.code, int)
    return stop.value.code


ARGUMENTS = ("--batch", 2, "--canvas", 96, 128, "--pixels", *PIXELS)


def fenced(language: str, word: str) -> str:
    """The one of the page's blocks in a language that has a word in it."""
    blocks = re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    (found,) = (block for block in blocks if word in block)
    return found


def snippet(word: str) -> str:
    """One of the page's programs."""
    return fenced("python", word)


def run_alone(world: World, folder: Path, code: str) -> Detections:
    """Run the page's `detect` on the images two at a time, in a process that has no casc."""
    np.savez(folder / "images.npz", pixels=world.pixels.numpy(), size=world.size.numpy())
    script = f"""
import sys
sys.modules["casc"] = None
{code}
import numpy as np
images = np.load("images.npz")
parts = [
    detect(images["pixels"][i : i + 2], images["size"][i : i + 2])
    for i in range(0, len(images["size"]), 2)
]
names = {Detections._fields}
np.savez("found.npz", **{{n: np.concatenate([np.asarray(p[n]) for p in parts]) for n in names}})
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / "found.npz") as found:
        return Detections(*(torch.from_numpy(found[name]) for name in Detections._fields))


def assert_agrees(found: Detections, eager: Detections) -> None:
    """Row by row: scores of these images are all apart, so that order is settled."""
    assert torch.equal(found.valid, eager.valid)
    gaps = eager.scores[:, :-1] - eager.scores[:, 1:]
    assert gaps[eager.valid[:, 1:]].min() > 1e-5
    assert torch.equal(found.labels, eager.labels)
    torch.testing.assert_close(found.boxes, eager.boxes, rtol=0, atol=1e-2)
    torch.testing.assert_close(found.scores, eager.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.masks, eager.masks, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.mask_scores, eager.mask_scores, rtol=0, atol=1e-5)
    assert eager.mask_scores is not None
    assert eager.mask_scores.any()
    assert not found.scores[~found.valid].any()


def test_onnx_agrees_with_eager_and_needs_no_casc(world, tmp_path, capsys):
    import onnx

    path = tmp_path / "detector.onnx"
    assert export(world.checkpoint, path, *ARGUMENTS) == 0
    assert "10 images, 1 without detections" in capsys.readouterr().out
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    found = run_alone(world, tmp_path, snippet("onnxruntime.InferenceSession"))
    assert_agrees(found, world.eager)
    # What travels with the file, and what lies beside it.
    (entry,) = model.metadata_props
    inside, beside = (
        json.loads(entry.value),
        json.loads((tmp_path / "detector.onnx.json").read_text()),
    )
    assert beside["check"]["found"]["images"] == 10
    assert {k: v for k, v in beside.items() if k != "check"} == inside
    assert [c["name"] for c in inside["classes"]] == ["red", "green", "blue"]
    assert inside["checkpoint"]["step"] == 7
    image = world.trained.image
    assert inside["preprocessing"]["mean"] == list(image.mean)
    assert inside["preprocessing"]["canvas"] == [96, 128]
    threshold = world.trained.model.inference.score_threshold
    assert inside["thresholds"]["score"] == threshold
    for said, is_there in (
        (inside["inputs"], model.graph.input),
        (inside["outputs"], model.graph.output),
    ):
        shapes = [[d.dim_value for d in t.type.tensor_type.shape.dim] for t in is_there]
        assert [t["shape"] for t in said] == shapes
        assert [t["name"] for t in said] == [t.name for t in is_there]


@pytest.fixture(scope="module")
def program(world) -> ExportedProgram:
    """Of plain ATen, so that the two forms of it share the work."""
    one = world.trained
    return plain(capture(one.params, one.buffers, one.model, one.image, SHAPE))


def test_torch_export_agrees_with_eager_and_needs_no_casc(world, program, tmp_path):
    metadata = describe(world.trained, SHAPE, "pt2")
    write(program, tmp_path / "detector.pt2", "pt2", metadata, SHAPE)
    assert_agrees(run_alone(world, tmp_path, snippet("torch.export.load")), world.eager)
    extra = {"casc.json": ""}
    torch.export.load(tmp_path / "detector.pt2", extra_files=extra)
    assert json.loads(extra["casc.json"]) == metadata


def test_onnx_of_any_batch_agrees_with_eager(world, tmp_path, capsys, monkeypatch):
    """Also with an older operator set, and run as the page's runner does, without casc."""
    import onnx

    path, sizes = tmp_path / "detector.onnx", ARGUMENTS[2:]
    assert export(world.checkpoint, path, *sizes, "--batch", "dynamic", "--opset", 18) == 0
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert json.loads(model.metadata_props[0].value)["inputs"][0]["shape"] == ["batch", *PIXELS, 3]
    found = run_by_runner(world, tmp_path, "detector.onnx")
    assert_agrees(found, world.eager)
    # The page's own lines.
    for name, size in (("a.jpg", (70, 60)), ("b.jpg", (100, 80))):
        Image.fromarray(world.pixels[1].numpy()).resize(size).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    capsys.readouterr()
    exec(compile(snippet("from runner import"), str(DOCS), "exec"), {})
    assert capsys.readouterr().out.count("[") >= 4
    session = open_program(path).run
    for count in (1, 4):
        parts = session(world.pixels[:count].numpy(), world.size[:count].numpy())
        for name in ("boxes", "scores", "masks", "mask_scores"):
            expected = getattr(world.eager, name)[:count].numpy()
            np.testing.assert_allclose(parts[name], expected, atol=1e-2)


def run_by_runner(world: World, folder: Path, name: str) -> Detections:
    """Run a file as the page says, each image cut out to its size, where casc can't be imported."""
    shutil.copy(runner.__file__, folder)
    images = [
        p[:h, :w].numpy() for p, (h, w) in zip(world.pixels, world.size.tolist(), strict=True)
    ]
    np.savez(folder / "images.npz", *images)
    script = f"""
import sys
sys.modules["casc"] = None
import numpy as np
from runner import detect, open_program
program = open_program({name!r})
with np.load("images.npz") as images:
    found = list(detect(program, [images[f"arr_{{i}}"] for i in range(len(images))]))
pairs = [(f"{{name}}{{i}}", v) for i, each in enumerate(found) for name, v in each.items()]
np.savez("found.npz", **dict(pairs))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = Detections._make(t if t is None else torch.zeros_like(t) for t in world.eager)
    with np.load(folder / "found.npz") as found:
        for i in range(len(images)):
            count = len(found[f"scores{i}"])
            made.valid[i, :count] = True
            for key in ("boxes", "scores", "labels", "masks", "mask_scores"):
                getattr(made, key)[i, :count] = torch.from_numpy(found[f"{key}{i}"])
    return made


def test_the_runner_refuses_what_the_program_cannot_take(world, program, tmp_path):
    path = tmp_path / "detector.pt2"
    write(program, path, "pt2", describe(world.trained, SHAPE, "pt2"), SHAPE)
    assert_agrees(run_by_runner(world, tmp_path, "detector.pt2"), world.eager)
    opened = open_program(path)
    assert (opened.batch, opened.pixels) == (2, PIXELS)
    assert list(detect(opened, [])) == []
    for wrong, says in (
        (
            np.zeros((81, 40, 3), np.uint8),
            r"image 1: 81 x 40 .* at most 80 x 100.* --pixels 81 100",
        ),
        (np.zeros((40, 101, 3), np.uint8), r"at most 80 x 100: .* --pixels 80 101"),
        (np.zeros((40, 40), np.uint8), r"\[h, w, 3\] uint8 RGB, not \[40, 40\] uint8"),
        (np.zeros((40, 40, 3), np.float32), r"not \[40, 40, 3\] float32"),
        (np.zeros((0, 40, 3), np.uint8), r"not \[0, 40, 3\] uint8"),
        ("photo.jpg", "not str"),
    ):
        with pytest.raises(ValueError, match=says):
            list(detect(opened, [np.zeros((40, 40, 3), np.uint8), wrong]))  # type: ignore
    (tmp_path / "other.pt2").write_text("")
    with pytest.raises(ValueError, match=r"neither an \.onnx file nor"):
        open_program(tmp_path / "other.pt2")


@pytest.fixture(scope="module")
def package(world, program, tmp_path_factory) -> Path:
    """A folder with a compiled program in it."""
    folder = tmp_path_factory.mktemp("package")
    metadata = describe(world.trained, SHAPE, "aoti")
    write(program, folder / "detector.pt2", "aoti", metadata, SHAPE)
    return folder


@COMPILER
@pytest.mark.slow
def test_aot_inductor_agrees_with_eager_and_needs_no_casc(world, package):
    assert_agrees(run_alone(world, package, snippet("aoti_load_package")), world.eager)
    loaded = torch._inductor.aoti_load_package(str(package / "detector.pt2"))
    metadata = describe(world.trained, SHAPE, "aoti")
    assert json.loads(loaded.get_metadata()["casc"]) == metadata


@COMPILER
@pytest.mark.slow
def test_the_cpp_program_finds_the_same(world, package):
    """Built by the page's own line, and run on the images as PPM files."""
    (package / "docs").symlink_to(DOCS.parent)
    found_first = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    build = fenced("sh", "g++").replace("g++", shutil.which("g++") or "clang++")
    shell = {"cwd": package, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(["bash", "-ec", build], env={**os.environ, "PATH": found_first}, **shell)
    assert done.returncode == 0, done.stderr
    names = [f"{i}.ppm" for i in range(len(world.size))]
    for name, pixels, (height, width) in zip(names, world.pixels, world.size.tolist(), strict=True):
        Image.fromarray(pixels[:height, :width].numpy()).save(package / name)
    done = subprocess.run(["./detect", "detector.pt2", *names], **shell)
    assert done.returncode == 0, done.stderr
    assert_printed(done.stdout, names, world)

    (package / "text.ppm").write_text("P3 1 1 255 0 0 0")
    (package / "short.ppm").write_bytes(b"P6 # a comment\n 40 30\n255\n" + bytes(40 * 30))
    Image.new("RGB", (101, 40)).save(package / "wide.ppm")
    for arguments, says in (
        ((), "usage: detect PACKAGE.pt2 IMAGE.ppm..."),
        (("none.pt2", "0.ppm"), "none.pt2: can't be opened"),
        (("detector.pt2", "none.ppm"), "none.ppm: can't be opened"),
        (("detector.pt2", "text.ppm"), "text.ppm: isn't a binary PPM of 8 bits (P6, 255)"),
        (("detector.pt2", "short.ppm"), "short.ppm: ends before its last pixel"),
        (
            ("detector.pt2", "wide.ppm"),
            "wide.ppm: 40 x 101 pixels (height x width), but the program takes at most 80 x 100:"
            " reduce it, or export with --pixels 80 101",
        ),
    ):
        done = subprocess.run(["./detect", *arguments], **shell)
        assert (done.returncode, done.stderr) == (1, f"detect: {says}\n")


def assert_printed(text: str, names: list[str], world: World) -> None:
    """What the C++ program printed is what eager found, image by image and row by row."""
    lines = iter(text.splitlines())
    classes = [c["name"] for c in describe(world.trained, SHAPE, "aoti")["classes"]]
    eager = world.eager
    assert eager.masks is not None
    for i, name in enumerate(names):
        count = int(eager.valid[i].sum())
        assert next(lines) == f"{name}: {count} objects"
        for row in range(count):
            score, box, label, mask = next(lines).split("  ")
            assert float(score) == pytest.approx(float(eager.scores[i, row]), abs=1e-5)
            sides = [float(side) for side in box.split()]
            assert sides == pytest.approx(eager.boxes[i, row].tolist(), abs=1e-2)
            assert label == classes[eager.labels[i, row]]
            on, cells = mask.removesuffix(" cells").split(" of ")
            sure = (eager.masks[i, row] - 0.5).abs() > 1e-4
            least = int(((eager.masks[i, row] > 0.5) & sure).sum())
            assert least <= int(on) <= least + int((~sure).sum())
            assert int(cells) == eager.masks[i, row].numel()
    assert next(lines, None) is None


def test_eager_here_is_what_evaluation_and_predict_run(world):
    """`infer` and the step of `casc eval` and `casc predict`, where the canvas has the room."""
    trained = world.trained
    image, canvas = ImageConfig(short=96, long=160), (160, 160)
    batch = Batch(
        world.pixels,
        world.size.float(),
        torch.zeros(10, 1, 4),
        torch.zeros(10, 1, dtype=torch.long),
        torch.zeros(10, 1, dtype=torch.bool),
        torch.zeros(10, 1, 4),
        torch.zeros(10, 1, dtype=torch.long),
        torch.zeros(10, dtype=torch.long),
        torch.zeros(10, dtype=torch.long),
    )
    step = make_detect_step(trained.model, image, canvas, Compute(compile=False))
    expected = step(trained.params, trained.buffers, batch)
    with torch.no_grad():
        found = infer(
            *(trained.params, trained.buffers, trained.model, image, canvas),
            *(world.pixels, world.size),
        )
    for a, b in zip(found, expected, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_the_pages_paste_is_cascs(world):
    names: dict = {}
    exec(compile(snippet("def paste"), str(DOCS), "exec"), names)
    image = int(world.eager.valid.sum(dim=1).argmax())
    rows = world.eager.valid[image]
    boxes, masks = world.eager.boxes[image, rows], world.eager.masks[image, rows]
    height, width = world.size[image].tolist()
    expected = paste_masks(masks, boxes, height, width)
    assert expected.any()
    for i in range(len(boxes)):
        made = names["paste"](masks[i].numpy(), boxes[i].numpy(), height, width)
        assert (made != expected[i].numpy()).mean() < 1e-3


def test_a_program_that_differs_is_not_kept(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("casc.export.program.capture", lambda *args: None)
    monkeypatch.setattr(files, "write", lambda program, path, *rest: path.write_text(""))

    def wrong(path):
        def run(pixels, size):
            image, canvas = world.trained.image, SHAPE.canvas
            one = world.trained
            found = infer(one.params, one.buffers, one.model, image, canvas, pixels, size)
            assert found.masks is not None
            return found._replace(masks=found.masks + 0.1)

        return run

    monkeypatch.setattr(files, "load", wrong)
    assert export(world.checkpoint, tmp_path / "d.onnx", *ARGUMENTS) == 1
    output = capsys.readouterr().out
    assert "masks   differ by 0.1 at most" in output
    assert "not kept" in output
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line_and_leave_nothing(world, tmp_path, capsys, monkeypatch):
    out = tmp_path / "d.onnx"
    (tmp_path / "there.onnx").write_text("")
    for args, message in (
        ((out, "--format", "pt2"), "--format pt2 is written to a .pt2 file"),
        ((tmp_path / "there.onnx",), "is there already"),
        ((tmp_path / "no" / "d.onnx",), "there is no folder"),
        ((out, "--batch", 0), "--batch 0: must be 1 to 65536"),
        ((out, "--opset", 17), "--opset 17: must be from 18 to 21"),
        ((tmp_path / "d.pt2", "--format", "pt2", "--opset", 20), "--format pt2 has none"),
        (
            (tmp_path / "d.pt2", "--format", "aoti", "--batch", "dynamic"),
            "--batch dynamic: --format aoti has a fixed batch; give a number, or",
        ),
        ((out, "--canvas", 100, 128), "--canvas 100 128: both must be multiples of 32"),
        ((out, "--pixels", 0, 128), "--pixels 0 128: both must be at least 1"),
        ((out, "--short", 200), "--long 160: must be at least --short, 200"),
        ((out, "--images", "x.jpg", "--no-check"), "--images: nothing is compared"),
    ):
        assert export(world.checkpoint, *args) == 1
        error = capsys.readouterr().err
        assert error.startswith("casc: ")
        assert error.count("\n") == 1
        assert message in error
    find = files.importlib.util.find_spec
    missing = lambda name, *rest: None if name == "onnxscript" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(files.importlib.util, "find_spec", missing)
    assert export(world.checkpoint, out) == 1
    assert "onnxscript is missing; python -m pip install 'casc[export]'" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["there.onnx"]


def test_no_compiler_is_said_before_any_work():
    import torch._inductor.config as inductor

    with (
        inductor.patch({"cpp.cxx": (None, "/no/such/compiler")}),
        pytest.raises(files.UserError, match="install g\\+\\+"),
    ):
        files.check_form("aoti", check=True)
