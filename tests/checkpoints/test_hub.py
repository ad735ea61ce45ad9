"""The hub, by a stand-in for huggingface_hub: nothing is sent anywhere."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import casc
from casc.checkpoints import hub
from casc.checkpoints.hub import figures_beside, push
from casc.checkpoints.read import read_weights
from casc.config import to_json
from casc.errors import UserError
from casc.model import detector

CLASSES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


class StandIn:
    """Repositories as folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.private: list[bool] = []

    def HfApi(self) -> "StandIn":  # noqa: N802 - its name there
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        if repo_id.startswith("them/"):
            raise PermissionError("403 Forbidden")
        (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        self.private.append(private)
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None) -> str:
        path = self.folder / repo_id / filename
        if not path.exists() or revision not in (None, "main"):
            raise FileNotFoundError(f"404: no {filename} in {repo_id}")
        return str(path)


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> StandIn:
    made = StandIn(tmp_path / "hub")
    monkeypatch.setattr(hub, "_hub", lambda: made)
    return made


def test_a_detector_goes_to_the_hub_and_back(stand_in, tmp_path, tiny_recipe):
    recipe = replace(tiny_recipe, init="https://user:secret@host/w.pth")
    params, buffers = detector.init(recipe.model, torch.Generator().manual_seed(0))
    metadata = {"recipe": json.dumps(to_json(recipe)), "classes": json.dumps(CLASSES), "step": "5"}
    file = tmp_path / "step" / "weights.safetensors"
    file.parent.mkdir()
    save_file(params | buffers, file, metadata=metadata)
    (file.parent / "metrics.json").write_text(json.dumps({"bbox_AP": 0.5, "segm_AP": None}))
    weights = read_weights(str(file))
    assert push(weights, figures_beside(weights), "me/pets", private=True) == "https://hub/me/pets"
    assert stand_in.private == [True]
    found = casc.load("hf://me/pets", device="cpu")
    assert found.names == ("cat", "dog")
    assert found.model == recipe.model
    assert found.image == recipe.image
    assert all(torch.equal(found.params[name], value) for name, value in params.items())
    assert casc.load("hf://me/pets@main", device="cpu").source == "hf://me/pets@main"
    pushed = stand_in.folder / "me" / "pets"
    card = (pushed / "README.md").read_text()
    for text in ("| bbox_AP | 0.500 |", 'casc.load("hf://me/pets")', "cat, dog", "2 classes"):
        assert text in card
    for each in pushed.iterdir():  # neither where the data lies, nor what began it
        assert b"secret" not in each.read_bytes()
        assert str(tmp_path).encode() not in each.read_bytes()


def test_what_the_hub_refuses_is_one_line(stand_in, tmp_path, tiny_recipe):
    with pytest.raises(UserError, match=r"hf://me/none: can't be had \(FileNotFoundError: 404"):
        casc.load("hf://me/none")
    params, buffers = detector.init(tiny_recipe.model, torch.Generator().manual_seed(0))
    metadata = {"recipe": json.dumps(to_json(tiny_recipe))}
    save_file(params | buffers, tmp_path / "w.safetensors", metadata=metadata)
    weights = read_weights(str(tmp_path / "w.safetensors"))
    with pytest.raises(UserError, match=r"them/pets: can't be pushed .*403"):
        push(weights, {}, "them/pets")
    with pytest.raises(UserError, match="isn't of casc"):
        push(replace(weights, kind="reference"), {}, "me/pets")
