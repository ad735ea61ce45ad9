"""That reading for long takes no more memory than reading for a while."""

from pathlib import Path

import pytest

from casc.data.stream import TrainLoaderConfig, training_batches

SAMPLES, WARM_UP, BATCH, WORKERS = 20_000, 2_000, 4, 4


def memory(pids: list[int]) -> dict[str, int]:
    """Bytes that the processes take.

    Resident counts what they share once for each of them, proportional once in all, private not
    at all.
    """
    total = {"resident": 0, "proportional": 0, "private": 0}
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "Rss":
                total["resident"] += int(rest.split()[0]) * 1024
            elif name == "Pss":
                total["proportional"] += int(rest.split()[0]) * 1024
            elif name in ("Private_Clean", "Private_Dirty"):
                total["private"] += int(rest.split()[0]) * 1024
    return total


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_memory_of_workers_is_flat(tmp_path, write_shards):
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("the system doesn't say what processes take")
    shards = [(i % 2, 125, True) for i in range(16)]
    split = write_shards(tmp_path, {"train": shards}).splits["train"]
    stream = training_batches(
        tmp_path, split, seed=0, steps=range(SAMPLES // BATCH), batch=BATCH,
        loading=TrainLoaderConfig(workers=WORKERS),
    )  # fmt: skip
    seen, figures = 0, []
    for _, batch in stream:
        seen += len(batch.image_id)
        if seen % WARM_UP == 0:
            figures.append(memory(stream.pids))
            print(seen, {k: f"{v / 2**20:.1f} MiB" for k, v in figures[-1].items()})
        if seen >= SAMPLES - BATCH * WORKERS * 6:
            break  # afterwards the workers end
    figures.append(memory(stream.pids))
    print(seen, {k: f"{v / 2**20:.1f} MiB" for k, v in figures[-1].items()})
    stream.close()
    for kind in ("resident", "proportional"):
        assert figures[-1][kind] <= 1.05 * figures[0][kind]
    # What a worker writes to ceases to be its parent's too, page by page, be it a count of
    # references: that looks like growth (it levels off; 60,000 samples add no more than another
    # percent).
    half = figures[len(figures) // 2]
    assert figures[-1]["private"] <= 1.05 * half["private"]
