"""docs/measure_tiles.py, whose tables docs/seeing.md and docs/exporting.md have, on less data."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_tables_are_printed(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(ROOT / "docs" / "measure_tiles.py"))["main"]
    less = {"LARGE": (64, 128), "TRAIN": 4, "EPOCHS": 1, "OBJECTS": 6, "SMALL_IMAGES": 2}
    assert less.keys() <= main.__globals__.keys()
    main.__globals__.update(less)
    main()
    rows = re.findall(r"^(.*): box AP (\d\.\d{3})", capsys.readouterr().out, re.MULTILINE)
    canvases = [
        f"canvas x {n}, norms over {o}" for n in (1, 2, 3) for o in ("the image", "all of it")
    ]
    assert [name for name, _ in rows] == ["whole", "--tiles 64", *canvases]
    assert rows[2][1] == rows[3][1]  # an image that fills its canvas
