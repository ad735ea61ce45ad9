"""What a step asks of an NPU, counted on the emulated one, beside torchvision's Mask R-CNN."""

import json

import pytest

# torchvision's step, as measured; casc's is asserted exactly.
TORCHVISION_READS = 47
# The most that an eager step may launch on the small canvas; docs/npu.md has a large one's.
LAUNCHES = {"casc": 1449, "casc, bfloat16": 1491}


@pytest.fixture(scope="module")
def counts(emulator, run_ranks, tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("npu") / "counts.json"
    run_ranks("counts.py", path, environment=emulator)
    return json.loads(path.read_text())


def reads(step: dict) -> int:
    return sum(count for _, count in step["reads"])


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("casc", 0), ("casc, bfloat16", 0), ("casc, counted", 1), ("casc, inference", 0)],
)
def test_the_host_reads_no_more_than_documented(counts, name, allowed):
    for step in counts[name]["steps"]:
        assert reads(step) == allowed, step["reads"]
        assert not step["fallbacks"]
    if allowed:
        ((where, _),) = counts[name]["steps"][0]["reads"]
        assert "steps.py" in where


@pytest.mark.parametrize("name", ["casc", "casc, bfloat16", "casc, counted", "casc, inference"])
def test_only_the_batch_is_copied_and_without_waiting(counts, name):
    for step in counts[name]["steps"]:
        kinds, sizes, _ = zip(*step["copies"], strict=True)
        assert set(kinds) == {"copy from pinned memory"}
        assert sorted(sizes) == sorted(counts["batch"])


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_step_launches_no_more_than_its_budget(counts, name):
    """A real device pays for each; a step that launches fewer lowers the budget."""
    for step in counts[name]["steps"]:
        assert 0.95 * LAUNCHES[name] < step["launches"] <= LAUNCHES[name]


def test_shapes_do_not_depend_on_the_data(counts):
    for name in ("casc", "casc, inference"):
        assert [step["new_shapes"] for step in counts[name]["steps"]] == [0, 0, 0]
        assert len({step["launches"] for step in counts[name]["steps"]}) == 1
    # The counter can tell: detectors usually have new ones in every step.
    assert all(step["new_shapes"] > 50 for step in counts["torchvision"]["steps"])


def test_nothing_is_computed_in_float64(counts):
    """NPUs emulate it, slowly, or don't have it."""
    for name in ("casc", "casc, counted", "casc, inference"):
        assert not any(step["doubles"] for step in counts[name]["steps"])


def test_torchvision_beside_it(counts, capsys):
    """The counter finds the reads of a detector that was written without this in mind."""
    found = counts["torchvision"]["steps"]
    assert all(abs(reads(step) - TORCHVISION_READS) <= 10 for step in found)
    names = {name.partition(" at ")[0] for step in found for name, _ in step["fallbacks"]}
    assert "torchvision::nms" in names
    with capsys.disabled():
        print("\n" + "\n".join(table(counts)))


def table(counts: dict) -> list[str]:
    titles = ("host reads", "CPU fallbacks", "copies", "launches", "new shapes", "MB moved")
    lines = [f"{'per step':<18}" + "".join(f"{title:>15}" for title in titles)]
    for name, entry in counts.items():
        if name == "batch":
            continue
        step = entry["steps"][-1]
        fallbacks = sum(count for _, count in step["fallbacks"])
        values = (
            reads(step), fallbacks, len(step["copies"]), step["launches"], step["new_shapes"],
            round(step["bytes"] / 1e6),
        )  # fmt: skip
        lines.append(f"{name:<18}" + "".join(f"{value:>15,}" for value in values))
    return lines
