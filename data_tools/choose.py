"""Which samples of a split to show: at random, or by id, class, or what sharding found."""

import bisect
import difflib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from casc.data.index import Index
from casc.data.loader_config import DEFAULT_LOADING, RemoteConfig
from casc.data.reader import read_shard
from casc.data.record import SampleRecord, parse_record
from casc.errors import UserError
from data_tools.report import KINDS, parse_ids


@dataclass(frozen=True)
class Choice:
    """What is asked for; a sample must be all of it."""

    count: int = 16
    """At most so many."""
    seed: int = 0
    """Chooses among those that fit."""
    classes: tuple[str, ...] = ()
    """It has an object of one of these classes."""
    ids: tuple[int, ...] = ()
    """It is one of these images; all of them are wanted, whatever `count` says."""
    problems: tuple[str, ...] = ()
    """Sharding found one of these kinds in it; `all` means any of them."""


def choose_samples(
    folder: str, index: Index, split: str, choice: Choice, loading: RemoteConfig = DEFAULT_LOADING
) -> list[tuple[bytes, SampleRecord]]:
    """Find samples, in the order of the shards.

    Without conditions any sample is as likely as any other, and only the shards that have
    chosen ones are read. With conditions shards are read in random order until there are enough.

    Args:
        folder: of the shards, or their URL.
        index: of the shards.
        split: one of the index's.
        choice: which samples.
        loading: how shards are fetched that lie elsewhere.

    Returns:
        Encoded images and parsed JSONs.

    Raises:
        UserError: nothing fits, or there is no such class, image or kind of finding.
    """
    if choice.count < 1:
        raise UserError(f"--n: expected 1 or more, got {choice.count}")
    if choice.seed < 0:
        raise UserError(f"--seed: expected 0 or more, got {choice.seed}")
    if not index.splits[split].samples:
        raise UserError(f"{folder}: split {split!r} has no samples")
    tests = [test(index, split, choice) for test in (_of_class, _of_id, _with_problem)]
    if choice.classes or choice.ids or choice.problems:
        found = _search(
            folder, index, split, choice, lambda record: all(t(record) for t in tests), loading
        )
    else:
        found = _any(folder, index, split, choice, loading)
    missing = set(choice.ids) - {record["image_id"] for _, record in found}
    if missing:
        other = " that fits the other conditions" if choice.classes or choice.problems else ""
        raise UserError(f"--ids {min(missing)}: {split} of {folder} has no such image{other}")
    if not found:
        raise UserError(f"{folder}: no sample of {split} has what was asked for")
    return found


def _any(
    folder: str, index: Index, split: str, choice: Choice, loading: RemoteConfig
) -> list[tuple[bytes, SampleRecord]]:
    shards = index.splits[split].shards
    ends = list(itertools.accumulate(shard.samples for shard in shards))
    count = min(choice.count, ends[-1])
    chosen = np.random.default_rng(choice.seed).choice(ends[-1], count, replace=False)
    wanted: dict[int, set[int]] = {}
    for number in chosen.tolist():
        shard = bisect.bisect_right(ends, number)
        wanted.setdefault(shard, set()).add(number - (ends[shard] - shards[shard].samples))
    return [
        (image, parse_record(record, f"{shards[shard].name}: {key}"))
        for shard in sorted(wanted)
        for i, (key, image, record) in enumerate(read_shard(folder, shards[shard], loading))
        if i in wanted[shard]
    ]


def _search(
    folder: str,
    index: Index,
    split: str,
    choice: Choice,
    fits: Callable[[SampleRecord], bool],
    loading: RemoteConfig,
) -> list[tuple[bytes, SampleRecord]]:
    shards = index.splits[split].shards
    rng = np.random.default_rng(choice.seed)
    count = len(choice.ids) or choice.count
    found: list[tuple[int, int, bytes, SampleRecord]] = []
    for shard in rng.permutation(len(shards)).tolist():
        here = [
            (shard, i, image, record)
            for i, (key, image, data) in enumerate(read_shard(folder, shards[shard], loading))
            if fits(record := parse_record(data, f"{shards[shard].name}: {key}"))
        ]
        order = rng.permutation(len(here))[: count - len(found)].tolist()
        found += [here[i] for i in order]
        if len(found) >= count:
            break
    return [(image, record) for _, _, image, record in sorted(found, key=lambda entry: entry[:2])]


def _of_class(index: Index, split: str, choice: Choice) -> Callable[[SampleRecord], bool]:
    names = {category.name: category.id for category in index.categories}
    for name in choice.classes:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or list(names)[:10]
            raise UserError(f"--classes {name}: no such class; is it {' or '.join(near)}?")
    wanted = {names[name] for name in choice.classes}
    return lambda record: (
        not wanted or any(entry["category_id"] in wanted for entry in record["annotations"])
    )


def _of_id(index: Index, split: str, choice: Choice) -> Callable[[SampleRecord], bool]:
    wanted = set(choice.ids)
    return lambda record: not wanted or record["image_id"] in wanted


def _with_problem(index: Index, split: str, choice: Choice) -> Callable[[SampleRecord], bool]:
    report = index.splits[split].report.get("findings", {})
    shown = {
        kind: entry
        for kind, entry in report.items()
        if kind in KINDS and KINDS[kind].subject != "category" and KINDS[kind].outcome != "left out"
    }
    kinds = list(shown) if "all" in choice.problems else list(choice.problems)
    for kind in kinds:
        if kind not in shown:
            known = ", ".join(sorted(shown)) or "none that can be shown"
            what = "were left out of the shards" if kind in report else "none was found"
            raise UserError(f"--problems {kind}: {what}; {split} has {known}")
    ids: dict[str, set[int]] = {"image": set(), "annotation": set()}
    for kind in kinds:
        ids[KINDS[kind].subject].update(parse_ids(shown[kind]["ids"]))
    return lambda record: (
        not choice.problems
        or record["image_id"] in ids["image"]
        or any(entry["id"] in ids["annotation"] for entry in record["annotations"])
    )


def problems_of(index: Index, split: str, record: SampleRecord) -> list[str]:
    """What sharding found in a sample, for people."""
    report = index.splits[split].report.get("findings", {})
    texts = []
    for kind, about in KINDS.items():
        if kind not in report or about.subject == "category":
            continue
        found = set(parse_ids(report[kind]["ids"]))
        if about.subject == "image" and record["image_id"] in found:
            texts.append(f"{about.text}: {about.outcome}")
        for entry in record["annotations"]:
            if about.subject == "annotation" and entry["id"] in found:
                texts.append(f"annotation {entry['id']}: {about.text}: {about.outcome}")
    return texts
