"""What test_fuzz.py and `just chaos` found, an example of each."""

import json
import pickle
import socket
import struct
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from fuzzing import COCO, RESULTS, record, reference_weights
from oracle import judged
from safetensors.torch import load_file, save_file

from casc.checkpoints import format as checkpoint
from casc.checkpoints.format import _FACTS
from casc.checkpoints.model import load_trained
from casc.checkpoints.pickles import load_pickle, load_torch
from casc.checkpoints.read import read_weights
from casc.data.collate import collate
from casc.data.connections import open_http
from casc.data.evaluation_plan import plan_evaluation
from casc.data.index import INDEX_NAME, Bucket, Shard, Split, read_index
from casc.data.record import parse_record
from casc.data.sample import read_sample
from casc.errors import UserError
from casc.evaluate.coco_results import read_results
from casc.evaluate.ground_truth import read_coco
from casc.evaluate.metrics import evaluate, read_evaluation
from casc.report.history import newest_evaluation, read_history
from casc.report.page import report_page
from casc.train.loop import train


def refused(call: Any, *words: object) -> None:
    line = judged(call)
    assert line is not None, "it was taken"
    for word in words:
        assert str(word) in line, line


def trained_on(**changes: Any) -> dict[str, Any]:
    """A record of one object, changed; a change to `...` leaves the field out."""
    entry = {**record()["annotations"][0], **changes}
    kept = {name: value for name, value in entry.items() if value is not ...}
    return record(annotations=[kept])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"segmentation": {"size": [8, 8], "counts": "1"}}, "expected polygons to train on"),
        ({"segmentation": [[1, 1, 5, 1, 5, 5, 1]]}, "expected pairs of numbers, got 7"),
        ({"segmentation": ..., "rings": [[1, 1, 5, 1, 5, 5]]}, "segmentation: expected"),
    ],
)
def test_records_that_no_edges_can_be_made_of(changes, said):
    refused(lambda: parse_record(json.dumps(trained_on(**changes))), said)


@pytest.mark.parametrize("counts", [[9, 10**9], [1, 2], "\x7f", "94k1000000", [-5, 69]])
def test_run_lengths_that_lead_out_of_the_mask(counts):
    """pycocotools writes as many pixels as they say."""
    from fuzzing import PICTURES

    rle = {"size": [8, 8], "counts": counts}
    data = trained_on(segmentation=rle, rings=[[1, 1, 5, 1, 5, 5]])
    sample = read_sample(PICTURES[0], json.dumps(data).encode())
    bucket = Bucket("all", 0.0, None, 8, 8, 1, 9, 1)
    refused(lambda: collate([sample], bucket, bitmaps=True), "image 1: segmentation: no mask")


def test_an_index_that_claims_more_samples_than_there_are_bytes(tiny_recipe):
    path = tiny_recipe.data / INDEX_NAME
    data = json.loads(path.read_text())
    split = data["splits"]["train"]
    more = 10**12 - split["shards"][0]["samples"]
    for entry, name in ((split["shards"][0], "samples"), (split, "samples")):
        entry[name] += more
    split["train_samples"] += more
    path.write_text(json.dumps(data))
    refused(lambda: read_index(tiny_recipe.data), path, "splits.train.shards[0].samples")
    # Even where the bytes are claimed too, an evaluation isn't planned before it is read.
    shard = Shard("a.tar", 0, True, 2**40, 2**52, "0" * 64)
    endless = Split(2**40, 2**40, (Bucket("all", 0.0, None, 8, 8, 1, 9, 1),), (shard,))
    assert judged(lambda: next(plan_evaluation(endless, batch=2, world=2, rank=1))) is None


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # the memo's place 2^31
        b"\x80\x04Np2147483647\n.",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b".",  # a text of a terabyte
        b"\x80\x04\x8e" + struct.pack("<Q", 2**33) + b".",
    ],
)
def test_pickles_that_claim_memory(tmp_path, program):
    path = tmp_path / "a.pkl"
    path.write_bytes(program)
    refused(lambda: load_pickle(path), path)
    refused(lambda: load_torch(path), path)


def test_a_pickle_with_a_large_memo_is_read(tmp_path):
    path = tmp_path / "a.pkl"
    value = {"model": {str(i): [i] for i in range(70_000)}}
    path.write_bytes(pickle.dumps(value, 2))  # LONG_BINPUT, one place after the other
    assert load_pickle(path) == value


@pytest.mark.parametrize("meta", [{"CLASSES": torch.zeros(2)}, {"config": "model = 3\n"}, 5])
def test_checkpoints_whose_parts_are_of_other_types(tmp_path, meta):
    torch.save({**reference_weights(), "meta": meta}, tmp_path / "a.pth")
    judged(lambda: read_weights(str(tmp_path / "a.pth")))


def changed(folder: Any, name: str, key: str, change: Any) -> None:
    """Change a JSON value in a file's metadata, and the hash with it."""
    import safetensors

    file = folder / name
    with safetensors.safe_open(file, "pt") as opened:
        said = opened.metadata()
    value = json.loads(said[key])
    change(value)
    save_file(load_file(file), file, {**said, key: json.dumps(value)})
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["files"][name] = {key: fact(file) for key, fact in _FACTS.items()}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


PHASES = [[], [5], [{}], [{"stop": 1, "world": 1, "batch": 2, "workers": 10**9, "window": 4}],
          [{"stop": 1, "world": 10**9, "batch": 2, "workers": 1, "window": 4}]]  # fmt: skip


def test_a_header_that_its_reader_quotes_whole(tmp_path):
    header = json.dumps({"__metadata__": "tiny, " * 1000}).encode()
    (tmp_path / "weights.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(
        lambda: read_weights(str(tmp_path / "weights.safetensors")),
        tmp_path / "weights.safetensors", "not readable as safetensors", "[...]", "expected a map",
    )  # fmt: skip


def test_checkpoints_that_claim_otherwise(tiny_recipe):
    recipe = replace(tiny_recipe, max_steps=2, evaluate_every=1)
    train(recipe)
    more = replace(recipe, max_steps=3)
    (folder,) = checkpoint.list_checkpoints(recipe.folder / "checkpoints")
    sound = {path.name: path.read_bytes() for path in folder.iterdir()}

    def restored() -> None:
        for name, data in sound.items():
            (folder / name).write_bytes(data)

    for phases in PHASES:
        changed(folder, checkpoint.STATE, "position", lambda v, p=phases: v.update(phases=p))
        with pytest.raises(UserError, match=r"state\.safetensors: position: phases.*--out"):
            train(more)
        restored()
    for sizes in ({"classes": 10**9}, {"classes": -3}, {"stages": []}):
        changed(
            folder, checkpoint.WEIGHTS, "recipe", lambda v, s=sizes: v["model"].update(s)
        )  # fmt: skip
        refused(lambda: load_trained(str(folder)))
        restored()
    endless = [("rpn", "convs"), ("box_head", "convs"), ("box_head", "fcs"), ("mask_head", "convs")]
    for part, count in endless:
        changed(
            folder, checkpoint.WEIGHTS, "recipe",
            lambda v, p=part, c=count: v["model"][p].update({c: 10**9}),
        )  # fmt: skip
        refused(lambda: load_trained(str(folder)), "layers at least, the file has")
        restored()
    for classes in ([5], [{"id": "1", "name": "a"}], [{"id": 1, "name": 5}]):
        changed(folder, checkpoint.WEIGHTS, "classes", lambda v, c=classes: v.__setitem__(
            slice(None), c))  # fmt: skip
        refused(lambda: load_trained(str(folder)), "classes[0]")
        restored()
    long = {"format": "x" * 10**5, "version": 1}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(long))
    refused(lambda: checkpoint.verify(folder), "format is")
    restored()

    def report() -> None:
        history = read_history(recipe.folder)
        report_page(history, newest_evaluation(history), None, threshold=0.5, without="")

    assert judged(report) is None
    (figures,) = recipe.folder.glob("evaluations/*")
    good = json.loads(figures.read_text())
    for data in ({**good, "figures": 0}, {**good, "classes": [[]]}, {**good, "figures": {"x": {}}}):
        figures.write_text(json.dumps(data))
        refused(lambda: read_evaluation(figures), figures, "not an evaluation")
        refused(report, figures)
    figures.write_text(json.dumps(good))
    with (recipe.folder / "log.jsonl").open("a") as log:
        for entry in (
            {"kind": "train", "time": 1e300, "step": 1}, {"kind": "train", "time": 1, "step": "1"},
            {"kind": "run", "time": 1, "step": 1, "recipe": 3}, {"kind": 3, "time": 1}, [],
            {"kind": "train", "time": 1, "step": 1, "loss": 10**400, "x.loss_cls": 1},
            {"kind": "warning", "time": 1, "text": []},
        ):  # fmt: skip
            log.write(json.dumps(entry) + "\n")
    assert judged(report) is None
    assert read_history(recipe.folder).damaged == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": 10**400}, "score: expected a number"),
        ({"image_id": [1]}, "has no such image"),
        ({"category_id": {}}, "has no category {}"),
        ({"segmentation": {"size": [9, 8], "counts": "\ud800"}}, "expected compressed RLE"),
        ({"segmentation": {"size": [9, 8], "counts": "94kX"}}, "expected compressed RLE"),
    ],
)
def test_results_of_other_types(tmp_path, change, said):
    truth, found = tmp_path / "truth.json", tmp_path / "found.json"
    truth.write_text(json.dumps(COCO))
    found.write_text(json.dumps([{**RESULTS[0], **change}]))
    refused(lambda: evaluate(read_coco(truth), read_results(found)), said)
    annotations = [
        {**entry, "image_id": [], "bbox": [10**400] * 4} for entry in COCO["annotations"]
    ]
    truth.write_text(json.dumps({**COCO, "annotations": annotations}))
    assert judged(lambda: evaluate(read_coco(truth), RESULTS[:1])) is None


def test_what_comes_with_a_redirect_is_not_read():
    """It may be endless; and the connection isn't left open."""
    server = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    sent = []

    def serve() -> None:
        for answer in (b"302 Found\r\nLocation: /b", b"200 OK\r\nContent-Length: 3"):
            connection, _ = server.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(b"HTTP/1.1 " + answer + b"\r\n\r\n")
                try:
                    for _ in range(2**12 if b"302" in answer else 0):
                        connection.sendall(bytes(2**16))
                        sent.append(1)
                except OSError:
                    continue
                connection.sendall(b"abc")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    opened = open_http(f"{address}/a", 0, 20)
    assert opened.read(9) == b"abc"
    opened.close()
    thread.join()
    server.close()
    assert len(sent) < 2**12
