"""Published checkpoints by name: synthetic files of the real ones' names, from a local server."""

import hashlib
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
import torch
from detectron2_names import detectron2_model

import casc
from casc.checkpoints import published, read
from casc.checkpoints.foreign import resnet_of
from casc.checkpoints.model import load_trained
from casc.checkpoints.published import COCO_CLASSES, PUBLISHED
from casc.checkpoints.read import download_weights, read_weights
from casc.cli import main as cli
from casc.data.loader_config import RemoteConfig
from casc.errors import UserError
from casc.model import detector
from casc.model.box_head import BoxHeadConfig
from casc.model.detector_config import DetectorConfig
from casc.model.fpn import FPNConfig
from casc.model.mask_head import MaskHeadConfig
from casc.model.resnet import ResNetConfig
from casc.model.rpn import RPNConfig

MMDET, D2 = "mmdet:cascade_mask_rcnn_r50_fpn_1x_coco", "detectron2:cascade_mask_rcnn_R_50_FPN_3x"
SMALL = DetectorConfig(
    backbone=ResNetConfig(depth=50, width=8),
    fpn=FPNConfig(channels=16),
    rpn=RPNConfig(channels=16),
    box_head=BoxHeadConfig(channels=24),
    mask_head=MaskHeadConfig(channels=8),
)


class Files(BaseHTTPRequestHandler):
    """Serves `files` by path, from the byte that is asked for; breaks off where `stop` says."""

    files: ClassVar[dict[str, bytes]] = {}
    stop: ClassVar[list[int]] = []
    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        data = self.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[start : self.stop.pop() if self.stop else None])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[str]:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(read, "RemoteConfig", lambda: RemoteConfig(retries=1, backoff=0.01))
    monkeypatch.setattr(Files, "files", {})
    monkeypatch.setattr(Files, "stop", [])
    monkeypatch.setattr(Files, "asked", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def state():
    params, buffers = detector.init(SMALL, torch.Generator().manual_seed(0))
    return params | buffers


def serve(monkeypatch, server: str, name: str, data: bytes) -> str:
    """Let a name of the table mean a file of the server, named by its hash as the real one is."""
    digest = hashlib.sha256(data).hexdigest()
    path = f"/{name.partition(':')[2]}_20200203-{digest[:8]}.pth"
    if name == D2:
        path = f"/144998488/{PUBLISHED[D2].url.rpartition('/')[2]}"
    Files.files[path] = data
    entry = replace(PUBLISHED[name], url=server + path)
    for module in (published, read):
        monkeypatch.setattr(module, "PUBLISHED", PUBLISHED | {name: entry})
    return server + path


def mmdet_file(tmp_path, state) -> bytes:
    meta = {"CLASSES": COCO_CLASSES, "epoch": 12, "mmdet_version": "2.0.0"}
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "made.pth")
    return (tmp_path / "made.pth").read_bytes()


def test_mmdetections_checkpoint_is_loaded_by_its_name(server, tmp_path, state, monkeypatch):
    serve(monkeypatch, server, MMDET, mmdet_file(tmp_path, state))
    found = casc.load(MMDET, device="cpu")
    assert found.names == COCO_CLASSES
    assert found.source == MMDET
    assert all(torch.equal(found.params[name], state[name]) for name in found.params)
    Files.files.clear()  # what was downloaded is kept
    assert read_weights(MMDET).categories is not None
    assert len(found(np.zeros((64, 80, 3), np.uint8), threshold=1.0)) == 0


def test_detectron2s_checkpoint_is_converted_as_it_is_loaded(server, state, monkeypatch):
    theirs = {name: value.numpy() for name, value in detectron2_model(state).items()}
    serve(monkeypatch, server, D2, pickle.dumps({"model": theirs, "__author__": "Detectron2"}))
    trained = load_trained(D2)
    assert trained.model.inference.average == "probabilities"
    assert resnet_of(trained.model).stride_in_1x1
    assert [c.name for c in trained.weights.categories or ()] == list(COCO_CLASSES)
    stem = torch.from_numpy(theirs["backbone.bottom_up.stem.conv1.weight"])
    assert torch.equal(trained.params["backbone.conv1.weight"], stem.flip(1))  # BGR to RGB
    name = "neck.fpn_convs.0.conv.weight"
    assert torch.equal(trained.params[name], state[name])


def test_an_interrupted_download_goes_on_where_it_was(server, tmp_path, state, monkeypatch):
    data = mmdet_file(tmp_path, state)
    url = serve(monkeypatch, server, MMDET, data)
    Files.stop[:] = [0, 20_000]  # then nothing more, and the process gives up
    with pytest.raises(UserError, match=r"gave up after 1 retries.*or download it elsewhere to"):
        download_weights(url)
    assert download_weights(url).read_bytes() == data
    assert Files.asked == [None, "bytes=20000-", "bytes=20000-"]
    assert [f.name for f in (tmp_path / "hub" / "checkpoints").iterdir()] == [url.split("/")[-1]]


def test_another_content_than_the_name_says_is_refused(server, tmp_path, state, monkeypatch):
    url = serve(monkeypatch, server, MMDET, mmdet_file(tmp_path, state))
    Files.files[url.removeprefix(server)] = b"something else"
    with pytest.raises(UserError, match=r"its SHA-256 begins .*, not "):
        download_weights(url)
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())


def test_processes_that_want_one_file_download_it_once(server, tmp_path, state, monkeypatch):
    data = mmdet_file(tmp_path, state)
    url = serve(monkeypatch, server, MMDET, data)
    threads = [threading.Thread(target=download_weights, args=(url,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert download_weights(url).read_bytes() == data
    assert Files.asked == [None]


def test_the_table_is_listed_and_downloads_are_reported(
    server, tmp_path, state, monkeypatch, capsys
):
    serve(monkeypatch, server, MMDET, mmdet_file(tmp_path, state))
    for arguments, code in ((["weights"], 0), (["weights", MMDET], 0), (["weights", "mmdet:x"], 1)):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == code
    said = capsys.readouterr()
    assert all(name in said.out for name in PUBLISHED)
    assert "matched" in said.out
    assert "conventions" in said.out
    assert "mmdet:x: isn't known; `casc weights` lists the names" in said.err
    with pytest.raises(UserError, match="isn't known"):
        read_weights("detectron2:nothing")
