"""docs/first-ten-minutes.md, typed as it stands by somebody who has just installed casc."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_page_goes_from_an_export_to_pictures_and_a_model(tmp_path: Path):
    for name in ("casc", "data_tools"):
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m {name} "$@"\n')
        command.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    here = os.environ | {
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "CASC_CACHE": str(tmp_path / "kept"),
    }
    folder = tmp_path / "work"
    folder.mkdir()
    page = (ROOT / "docs" / "first-ten-minutes.md").read_text()
    found = re.findall(r"```(sh|python)\n(.*?)```", page, re.DOTALL)
    assert [language for language, _ in found].count("sh") >= 6
    said = ""
    for language, block in found:
        start = (
            [sys.executable, "-c"] if language == "python" else ["bash", "-euo", "pipefail", "-c"]
        )
        done = subprocess.run([*start, block], cwd=folder, env=here, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        said += done.stdout
    # Every image that nobody labelled has its picture, and something is found on some.
    unseen = sorted(p.stem for p in (folder / "unseen").iterdir())
    assert len(unseen) == 12
    assert sorted(p.stem for p in (folder / "pictures").glob("*.jpg")) == unseen
    assert json.loads((folder / "pictures/predictions.json").read_text())
    for picture in ("contact.png", "annotated.png", "runs/parts/first_batch.png"):
        with Image.open(folder / picture) as image:
            image.load()
    assert (folder / "runs/parts/report.html").stat().st_size > 10_000
    assert (folder / "parts.onnx").stat().st_size > 1_000_000
    assert "disc" in said
