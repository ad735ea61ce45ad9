import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from made_up_run import Log


@pytest.fixture
def new_log(tmp_path: Path) -> Callable[..., Log]:
    return lambda **options: Log(tmp_path / "run", **options)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium, which the tests of pages in a browser need."""
    named = os.environ.get("CASC_CHROMIUM")
    for name in [named] if named else ["chromium", "chromium-browser", "google-chrome"]:
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium here: install one, or name it in CASC_CHROMIUM")
