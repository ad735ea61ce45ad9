"""Hostile input by structure, 300 of each kind here; the long form: just fuzz --cases 10000

Whatever is read, the answer is one line or a result: see `oracle.judged`. What was found so far
stands in test_hostile_input.py by itself.
"""

import contextlib
import functools
import hashlib
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fuzzing
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from oracle import judged

from casc.checkpoints import format as checkpoint
from casc.checkpoints.model import load_trained
from casc.checkpoints.pickles import load_pickle, load_torch
from casc.checkpoints.read import read_weights
from casc.data.collate import collate
from casc.data.evaluation_plan import plan_evaluation
from casc.data.index import INDEX_NAME, parse_index, read_index
from casc.data.loader_config import TrainLoaderConfig
from casc.data.plan import plan_epoch
from casc.data.reader import read_shard
from casc.data.record import parse_record
from casc.data.sample import iter_tar, read_sample
from casc.data.stream import training_batches
from casc.distributed import ALONE
from casc.errors import UserError
from casc.evaluate.coco_results import read_results
from casc.evaluate.ground_truth import ground_truth_from_samples, read_coco
from casc.evaluate.metrics import evaluate, read_evaluation
from casc.report.history import newest_evaluation, read_history
from casc.report.page import report_page
from casc.train.derived import facts
from casc.train.loop import PICTURE, train
from casc.train.recipe_checks import check
from casc.train.start import resumed_state
from data_tools.check import check_shards
from data_tools.coco import read_annotations

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")


class Files(dict[str, bytes]):
    """Contents by name, which are too long to be shown."""

    def __repr__(self) -> str:
        return str({name: f"{len(data)} bytes" for name, data in self.items()})


@pytest.fixture
def fuzz(request, capsys) -> Callable[[st.SearchStrategy[Any], Callable[..., Any]], None]:
    """Gives a check as many values of a strategy as are asked for."""
    cases, seed = (request.config.getoption(f"--{name}") for name in ("cases", "seed"))

    def run(strategy: st.SearchStrategy[Any], check: Callable[..., Any]) -> None:
        outcomes: Counter[str] = Counter()

        @hypothesis.settings(
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            max_examples=cases,
            derandomize=not seed,
            suppress_health_check=tuple(hypothesis.HealthCheck),  # type: ignore[arg-type],
        )
        @hypothesis.given(strategy)
        def each(value: Any) -> None:
            for line in check(value):
                outcomes["taken" if line is None else "refused"] += 1

        (hypothesis.seed(seed)(each) if seed else each)()
        if cases > 300:
            with capsys.disabled():
                print(f"\n{request.node.name}: {cases} cases; of all readings {dict(outcomes)}")
        # What is always refused at the first check would be no test of the rest.
        assert min(outcomes["taken"], outcomes["refused"]) >= cases / 20, outcomes

    return run


def rewritten(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def test_shards(fuzz, tmp_path, write_shards):
    write_shards(tmp_path, {"train": [(0, 1, True)]})
    path, entry = tmp_path / "train/000000.tar", json.loads((tmp_path / INDEX_NAME).read_text())
    split, loading = entry["splits"]["train"], TrainLoaderConfig(workers=0)
    index = parse_index(json.dumps(entry))
    categories, bucket = index.categories, index.splits["train"].buckets[0]

    def read(bucket: Any) -> None:
        for _, image, text in iter_tar(path):
            with contextlib.suppress(UserError):
                collate([read_sample(image, text)], bucket, bitmaps=True)
            with contextlib.suppress(UserError):
                boxes = read_sample(image, text, masks=False, regions=True)
                collate([boxes], replace(bucket, regions=3), regions=True)
            with contextlib.suppress(UserError):
                evaluate(ground_truth_from_samples([parse_record(text)], categories), [])

    def each(drawn: tuple[bytes, int]) -> Iterator[str | None]:
        data, samples = drawn
        split["shards"][0] |= {"bytes": len(data) or 1, "sha256": rewritten(path, data)}
        split["shards"][0]["samples"] = split["samples"] = split["train_samples"] = samples
        (tmp_path / INDEX_NAME).write_text(json.dumps(entry))
        yield judged(lambda: read(bucket))
        yield judged(lambda: check_shards(tmp_path))
        with contextlib.suppress(UserError):
            stream = training_batches(
                tmp_path, read_index(tmp_path).splits["train"],
                seed=0, steps=range(1), batch=2, loading=loading,
            )  # fmt: skip
            yield judged(lambda: next(stream))

    fuzz(st.tuples(fuzzing.shards(), st.integers(1, 3)), each)


def test_indexes(fuzz, tiny_recipe):
    path = tiny_recipe.data / INDEX_NAME
    sound = json.loads(path.read_text())

    @st.composite
    def texts(draw: st.DrawFn) -> bytes:
        data = json.loads(draw(st.just(json.dumps(sound))))
        if draw(st.booleans()):  # what its sums don't give away
            for split in data["splits"].values():
                for shard in split["shards"]:
                    shard["samples"] = draw(st.sampled_from([1, 2, 10**6, 10**9, 2**39]))
                    shard["bytes"] = 4096 * shard["samples"]
                split["samples"] = sum(shard["samples"] for shard in split["shards"])
                trained = [shard["samples"] for shard in split["shards"] if shard["train"]]
                split["train_samples"] = sum(trained)
            return json.dumps(draw(fuzzing.damaged(data, 1))).encode("utf-8", "surrogatepass")
        return draw(fuzzing.json_text(data))

    def use(world: int) -> None:
        index = read_index(tiny_recipe.data)
        check(tiny_recipe, index, world)
        facts(tiny_recipe, index, world)
        for split in index.splits.values():
            plan = plan_epoch(split, seed=0, epoch=0, world=world, batch=2, workers=1)
            plan.buckets(plan.block_of(plan.steps))
            plan_evaluation(split, batch=2, world=world)

    def each(text: bytes) -> Iterator[str | None]:
        path.write_bytes(text)
        yield judged(lambda: read_index(tiny_recipe.data))
        yield judged(lambda: use(2))

    fuzz(texts(), each)


@pytest.fixture
def small_run(tiny_recipe):
    """A run with all its files, small enough to be hashed often."""
    model = tiny_recipe.model
    recipe = replace(
        tiny_recipe,
        max_steps=1,
        evaluate_every=1,
        model=replace(
            model,
            backbone=replace(model.backbone, width=8),
            fpn=replace(model.fpn, channels=8),
            rpn=replace(model.rpn, channels=8),
            box_head=replace(model.box_head, channels=8),
            mask_head=replace(model.mask_head, channels=8),
            stages=model.stages[:1],
        ),
    )
    train(recipe)
    return replace(recipe, max_steps=3)


def test_checkpoints(fuzz, small_run):
    recipe = small_run
    (folder,) = checkpoint.list_checkpoints(recipe.folder / "checkpoints")
    sound = {path.name: path.read_bytes() for path in folder.iterdir()}
    index = read_index(recipe.data)
    derived = facts(recipe, index, 1)
    json_files = (checkpoint.MANIFEST, checkpoint.METRICS)

    @st.composite
    def files(draw: st.DrawFn) -> dict[str, bytes]:
        name = draw(st.sampled_from([*json_files, *[checkpoint.WEIGHTS, checkpoint.STATE] * 3]))
        if name in json_files:
            return Files({name: draw(fuzzing.json_text(json.loads(sound[name])))})
        texts = ("position",) if name == checkpoint.STATE else ("recipe", "classes")
        made = Files({name: draw(fuzzing.weights(sound[name], texts))})
        if draw(st.integers(0, 4)):  # whoever writes the one can write the hash
            manifest = json.loads(sound[checkpoint.MANIFEST])
            digest = hashlib.sha256(made[name]).hexdigest()
            manifest["files"][name] = {"bytes": len(made[name]), "sha256": digest}
            made[checkpoint.MANIFEST] = json.dumps(manifest).encode()
        return made

    def resume() -> None:
        resumed_state(
            recipe, index, derived, ALONE, torch.device("cpu"), torch.contiguous_format
        )  # fmt: skip

    def each(changed: dict[str, bytes]) -> Iterator[str | None]:
        for name in sound:
            (folder / name).write_bytes(changed.get(name, sound[name]))
        yield judged(resume)
        yield judged(lambda: load_trained(str(folder)))
        yield judged(lambda: read_weights(str(folder / checkpoint.WEIGHTS)))
        yield judged(lambda: checkpoint.best(folder.parent, "mask_ap"))

    fuzz(files(), each)


def test_runs(fuzz, small_run):
    """What a report is made of."""
    folder = small_run.folder
    (folder / PICTURE).unlink()  # it takes most of the time
    sound = {
        path: path.read_bytes()
        for path in (folder / "log.jsonl", folder / "recipe.json", *folder.glob("evaluations/*"))
    }

    @st.composite
    def files(draw: st.DrawFn) -> tuple[Path, bytes]:
        path = draw(st.sampled_from(list(sound)))
        if path.suffix == ".json":
            return path, draw(fuzzing.json_text(json.loads(sound[path])))
        lines = sound[path].splitlines()
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(lines) - 1))
            lines[at] = draw(fuzzing.json_text(json.loads(sound[path].splitlines()[at])))
        return path, b"\n".join(lines)

    def report() -> None:
        history = read_history(folder)
        report_page(history, newest_evaluation(history), None, threshold=0.5, without="")

    def each(drawn: tuple[Path, bytes]) -> Iterator[str | None]:
        for path, data in sound.items():
            path.write_bytes(drawn[1] if path == drawn[0] else data)
        yield judged(report)
        for path in folder.glob("evaluations/*"):
            yield judged(functools.partial(read_evaluation, path))

    fuzz(files(), each)


def test_annotation_files(fuzz, tmp_path):
    truth, found = tmp_path / "truth.json", tmp_path / "found.json"

    def each(drawn: tuple[bytes, bytes]) -> Iterator[str | None]:
        truth.write_bytes(drawn[0])
        found.write_bytes(drawn[1])
        yield judged(lambda: dict(read_annotations(truth).by_image))
        yield judged(lambda: dict(read_annotations(truth, skip_invalid=True).by_image))
        yield judged(lambda: evaluate(read_coco(truth), fuzzing.RESULTS))
        yield judged(lambda: evaluate(read_coco(truth), read_results(found)))

    truths = st.one_of(fuzzing.json_text(fuzzing.COCO), st.just(json.dumps(fuzzing.COCO).encode()))
    fuzz(st.tuples(truths, fuzzing.json_text(fuzzing.RESULTS)), each)


def test_pickles(fuzz, tmp_path):
    plain, zipped = tmp_path / "a.pkl", tmp_path / "a.pth"

    def each(drawn: tuple[bytes, bytes]) -> Iterator[str | None]:
        plain.write_bytes(drawn[0])
        zipped.write_bytes(drawn[1])
        yield judged(lambda: load_pickle(plain))
        yield judged(lambda: read_weights(str(plain)))
        yield judged(lambda: load_torch(plain))
        yield judged(lambda: load_torch(zipped))
        yield judged(lambda: read_weights(str(zipped)))

    fuzz(st.tuples(fuzzing.pickles(), fuzzing.torch_files()), each)


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], str]]:
    """A server that sends what it is told, whatever it is asked."""
    told = [b""]
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                connection.recv(2**16)
                connection.sendall(told[0])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()

    def answer(data: bytes) -> str:
        told[0] = data
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield answer
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


def test_replies(fuzz, answering, tiny_recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    index = (tiny_recipe.data / INDEX_NAME).read_bytes()
    split = parse_index(index).splits["train"]
    shard = split.shards[2]
    loading = TrainLoaderConfig(retries=1, backoff=0, timeout=5, deadline=5)
    data = (tiny_recipe.data / shard.name).read_bytes()

    def each(drawn: tuple[bytes, bytes]) -> Iterator[str | None]:
        address = answering(drawn[0])
        yield judged(lambda: read_index(address, loading))
        address = answering(drawn[1])
        yield judged(lambda: list(read_shard(address, shard, loading, str)))

    fuzz(st.tuples(fuzzing.replies(index), fuzzing.replies(data)), each)
