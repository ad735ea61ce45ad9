"""`data_tools shard`: a data set with COCO annotations to tar shards and their index.

For each split: read the annotation file, read every image once to learn what it is, plan
the shards, write them. Everything but the reading and writing is a pure function, so the
output depends on the input and the settings alone, not on the number of workers nor on
interruptions.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from casc.data.index import INDEX_NAME, Index, Shard, Split
from casc.errors import UserError
from data_tools.capacities import make_bucket
from data_tools.folder import enter_index, lock_folder, old_index, remove_stale
from data_tools.images import Probe, file_digest, probe_image
from data_tools.journal import Journal
from data_tools.layouts import Part, choose_parts
from data_tools.leaks import Images, report_leaks
from data_tools.parallel import map_tasks
from data_tools.plan import (
    Item,
    PlannedShard,
    Settings,
    check_categories,
    check_settings,
    plan_items,
    plan_shards,
)
from data_tools.report import Finding, printable, summarise
from data_tools.source import (
    Source,
    count_unlisted,
    hold_out,
    plan_digest,
    read_source,
    source_digest,
)
from data_tools.tarball import TEMPORARY, Written, file_written
from data_tools.write import ShardResult, ShardTask, write_shard


class Run(NamedTuple):
    """How to work, which has no influence on what comes out."""

    workers: int = 1
    progress: bool = False
    say: Callable[[str], None] = print


def shard(
    coco: str | os.PathLike[str],
    out: str | os.PathLike[str] = "shards",
    splits: Sequence[str] | None = None,
    *,
    settings: Settings = Settings(),  # noqa: B008 - a tuple
    workers: int = 1,
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> Index:
    """Make shards of a data set with COCO annotations, as `data_tools shard` does.

    What is finished is kept: an interrupted call goes on where it was. With more than one
    worker the program's main module must be safe to import (`if __name__ == "__main__":`).

    Args:
        coco: the data set's folder.
        out: folder for the shards; splits that are there already stay.
        splits: which, by default all that are found.
        settings: what shapes the shards' contents.
        workers: processes.
        progress: show progress bars.
        say: is given a line for each thing that is done.

    Returns:
        What is in `out/index.json`; of each split `report` says what was dropped or repaired.

    Raises:
        UserError: on input that can't be understood, naming file and field.
        OSError: when the output can't be written.
    """
    return shard_dataset(Path(coco), Path(out), splits, settings, Run(workers, progress, say))


def shard_dataset(
    coco: Path,
    out: Path,
    splits: Sequence[str] | None,
    settings: Settings,
    run: Run,
    parts: Sequence[Part] | None = None,
) -> Index:
    """Make shards of a data set's splits, and enter them into the index.

    Args:
        coco: the data set's folder, in a layout that `find_parts` knows.
        out: folder for the shards; splits that are there already stay.
        splits: which, by default all that are found.
        settings: what shapes the output.
        run: how to get there.
        parts: annotation files and folders of images, in place of what `coco` holds.

    Raises:
        UserError: on input that can't be understood, naming file and field.
        OSError: when the output can't be written.
    """
    check_settings(settings)
    if not coco.is_dir():
        if coco.is_file() and coco.suffix in (".zip", ".tar", ".gz", ".tgz"):
            raise UserError(f"{coco}: is an archive; unpack it, and give the folder")
        if coco.is_file():
            raise UserError(
                f"{coco}: isn't a folder; a single annotation file goes to --annotations"
            )
        raise UserError(f"{coco}: no such folder")
    if splits is not None and not splits:
        raise UserError("--splits: names no split")
    parts = choose_parts(coco, splits, run.say) if parts is None else parts
    sources = [read_source(part, out, settings) for part in parts]
    if settings.val_share:
        if len(sources) != 1:
            names = ", ".join(source.split for source in sources)
            raise UserError(f"--val-share: the data set has parts already ({names}); name one of"
                            " them with --splits")  # fmt: skip
        sources = hold_out(sources[0], settings.val_share, settings.val_seed)
    splits = [source.split for source in sources]
    with contextlib.suppress(FileExistsError):
        out.mkdir(parents=True)
    if not out.is_dir():
        raise UserError(f"{out}: is not a folder; give another --out")
    with lock_folder(out):
        index = old_index(out, run.say)
        lists = {str(source.file): source.annotations.categories for source in sources}
        if index is not None and set(index.splits) - set(splits):
            lists = {str(out / INDEX_NAME): index.categories, **lists}
        check_categories(lists)
        categories = sources[0].annotations.categories
        # Other categories make other labels: then nothing that is there holds any more.
        fits = index is not None and index.categories == categories
        made = dict(index.splits) if index is not None and fits else {}
        if not fits:
            enter_index(out, Index(categories, made))
        current: dict[str, Images] = {}
        for source in sources:
            digests = (
                _unchanged(source, out, made[source.split], run) if source.split in made else None
            )
            if digests is not None:
                current[source.split] = Images(source, digests)
                shards = len(made[source.split].shards)
                run.say(f"{source.split}: nothing has changed, {shards} shards reused")
                Journal(out, source.split).remove()  # a run ended between its index and this
                remove_stale(out, source.split, made[source.split], run.say)
                continue
            if made.pop(source.split, None) is not None:
                # From here on the old entry isn't true any more.
                enter_index(out, Index(categories, made))
            made[source.split], digests = _make_split(source, sources, out, settings, run)
            current[source.split] = Images(source, digests)
            enter_index(out, Index(categories, made))
            Journal(out, source.split).remove()
            remove_stale(out, source.split, made[source.split], run.say)
        index = Index(categories, report_leaks(out, made, current))
        if index.splits != made:
            enter_index(out, index)
        return index


def _make_split(
    source: Source, sources: Sequence[Source], out: Path, settings: Settings, run: Run
) -> tuple[Split, list[str]]:
    for path in (out / source.split).glob(f"*{TEMPORARY}"):
        path.unlink()
    journal = Journal(out, source.split)
    try:
        probes = _probe_images(source, journal, settings.channels, run)
        items, findings = plan_items(
            source.annotations,
            probes,
            settings.max_size,
            settings.negatives,
            stretch=settings.stretch,
            channels=settings.channels,
        )
        names = {image.id: image.file_name for image in source.annotations.images}
        findings = [
            finding._replace(detail=finding.detail + source.hints.get(names[finding.id], ""))
            if finding.kind == "missing_file"
            else finding
            for finding in findings
        ]
        if not items:
            reason = printable(findings[0].detail)
            raise UserError(
                f"{source.images}: none of the {len(probes)} images that {source.file.name} "
                f"lists can be used (the first: {reason})"
            )
        buckets, planned = plan_shards(source.split, items, settings)
        results = _write_shards(source, planned, journal, out, settings, run)
    finally:
        journal.close()
    made = [
        make_bucket(i, bucket, planned, results, settings.channels)
        for i, bucket in enumerate(buckets)
    ]
    findings = [*source.annotations.findings, *findings]
    findings += [finding for _, found in made for finding in found]
    for result in results:
        findings += result.findings
    report = _report(source, sources, items, results, findings)
    digests = [probe.sha256 for probe in probes]
    split = Split(
        samples=len(items),
        train_samples=sum(item.train for item in items),
        buckets=tuple(bucket for bucket, _ in made),
        shards=tuple(
            Shard(
                name=shard.name,
                bucket=shard.bucket,
                train=shard.train,
                maskless=shard.maskless,
                samples=len(shard.items),
                bytes=result.bytes,
                sha256=result.sha256,
            )
            for shard, result in zip(planned, results, strict=True)
        ),
        report=report,
        source=source_digest(source, digests),
    )
    return split, digests


def _probe_images(source: Source, journal: Journal, channels: int, run: Run) -> list[Probe]:
    names = [image.file_name for image in source.annotations.images]
    paths = [os.path.join(source.images, name) for name in names]  # noqa: PTH118 - of each image
    stamps = [_stamp(path) for path in paths]
    probes = [
        journal.probe(name, stamp) if stamp else None
        for name, stamp in zip(names, stamps, strict=True)
    ]
    missing = [i for i, probe in enumerate(probes) if probe is None]
    if len(missing) < len(names):
        known = len(names) - len(missing)
        run.say(f"{source.split}: going on with an interrupted run, {known} images known")
    chunks = [missing[i : i + 16] for i in range(0, len(missing), 16)]
    found = map_tasks(
        partial(_probe_chunk, channels),
        [[paths[i] for i in chunk] for chunk in chunks],
        workers=run.workers,
        title=f"{source.split}: reading images",
        weights=[len(chunk) for chunk in chunks],
        progress=run.progress,
    )
    for chunk, chunk_probes in zip(chunks, found, strict=True):
        for i, probe in zip(chunk, chunk_probes, strict=True):
            probes[i] = probe
            if stamps[i]:
                journal.add_probe(names[i], stamps[i], probe)
        journal.flush()
    return [probe for probe in probes if probe is not None]


def _probe_chunk(channels: int, paths: Sequence[str]) -> list[Probe]:
    return [probe_image(path, channels) for path in paths]


def _write_shards(
    source: Source,
    planned: Sequence[PlannedShard],
    journal: Journal,
    out: Path,
    settings: Settings,
    run: Run,
) -> list[ShardResult]:
    labels = {category.id: i for i, category in enumerate(source.annotations.categories)}
    plans = [plan_digest(source, shard) for shard in planned]
    known = [journal.shard(shard.name, plan) for shard, plan in zip(planned, plans, strict=True)]
    done = [i for i, result in enumerate(known) if result is not None]
    present = map_tasks(
        file_written,
        [out / planned[i].name for i in done],
        workers=run.workers,
        title=f"{source.split}: checking shards",
        unit="shard",
        progress=run.progress,
    )
    for i, written in zip(done, present, strict=True):
        result = known[i]
        if result is not None and written != Written(result.bytes, result.sha256):
            known[i] = None
    todo = [i for i, result in enumerate(known) if result is None]
    if len(todo) < len(planned):
        run.say(f"{source.split}: {len(planned) - len(todo)} of {len(planned)} shards reused")
    written = map_tasks(
        write_shard,
        [
            ShardTask(out / planned[i].name, source.images, planned[i], labels, settings)
            for i in todo
        ],
        workers=run.workers,
        title=f"{source.split}: writing shards",
        weights=[len(planned[i].items) for i in todo],
        progress=run.progress,
    )
    for i, result in zip(todo, written, strict=True):
        known[i] = result
        journal.add_shard(planned[i].name, plans[i], result)
    return [result for result in known if result is not None]


def _report(
    source: Source,
    sources: Sequence[Source],
    items: Sequence[Item],
    results: Sequence[ShardResult],
    findings: Sequence[Finding],
) -> dict[str, Any]:
    kinds = summarise(findings)

    def count(*names: str) -> int:
        return sum(kinds[name]["count"] for name in names if name in kinds)

    annotations = source.annotations
    images = {
        "listed": annotations.listed_images,
        "stored": len(items),
        "trained": sum(item.train for item in items),
        "left_out": count(
            "missing_file", "unreadable", "broken_file", "size_mismatch", "duplicate_image"
        ),
        "unlisted_files": count_unlisted(source, sources),
    }
    objects = {
        "listed": annotations.listed_annotations,
        "stored": sum(result.annotations for result in results),
        "trained": sum(result.trained_annotations for result in results),
        "left_out": count(
            "image_left_out", "unknown_image", "duplicate_annotation", "invalid", "other_shape"
        ),
    }
    boxes = sum(result.trained_without_masks for result in results)
    if boxes != objects["trained"]:
        objects["trained_without_masks"] = boxes
    for total in (images, objects):
        # Whatever is listed must be in the shards or in the report.
        if total["listed"] != total["stored"] + total["left_out"]:
            raise RuntimeError(f"{source.file}: the account doesn't balance: {total}")
    return {"images": images, "annotations": objects, "findings": kinds}


def _unchanged(source: Source, out: Path, split: Split, run: Run) -> list[str] | None:
    """The images' digests if a split's shards are there, whole, and made of this very input."""
    if not split.source.startswith(source.digest[:32]):
        return None
    shards = [out / shard.name for shard in split.shards]
    written = map_tasks(
        file_written,
        shards,
        workers=run.workers,
        title=f"{source.split}: checking shards",
        unit="shard",
        progress=run.progress,
    )
    expected = [Written(shard.bytes, shard.sha256) for shard in split.shards]
    if list(written) != expected:
        run.say(f"{source.split}: shards are missing or damaged, and made again")
        return None
    paths = [source.images / image.file_name for image in source.annotations.images]
    chunks = [paths[i : i + 64] for i in range(0, len(paths), 64)]
    found = map_tasks(
        _digest_chunk,
        chunks,
        workers=run.workers,
        title=f"{source.split}: comparing images",
        weights=[len(chunk) for chunk in chunks],
        progress=run.progress,
    )
    digests = [digest for chunk in found for digest in chunk]
    return digests if source_digest(source, digests) == split.source else None


def _digest_chunk(paths: Sequence[Path]) -> list[str]:
    return [file_digest(path) for path in paths]


def _stamp(path: str) -> list[int]:
    try:
        about = os.stat(path)  # noqa: PTH116 - of each image
    except OSError:
        return []
    return [about.st_size, about.st_mtime_ns]
