from pathlib import Path

import pytest

from casc.errors import UserError
from casc.report.charts import MOST_POINTS, accuracy_chart, training_charts
from casc.report.history import newest_evaluation, read_history


def points(history, name: str):
    chart = next(chart for key, _, chart in training_charts(history) if key == name)
    return chart["series"][0]["points"]


def test_a_run_that_goes_on(new_log):
    log = new_log()
    log.start()
    log.train(10, 3.0)
    log.train(20, 2.0)
    history = read_history(log.folder)
    assert (history.step, history.steps, history.ended) == (20, 100, "")
    assert points(history, "loss") == [(10, 3.0), (20, 2.0)]
    assert newest_evaluation(history) is None
    assert accuracy_chart(history) is None


def test_steps_that_were_taken_again_count_once(new_log):
    log = new_log()
    log.start()
    for step in (10, 20, 30, 40):
        log.train(step, 4.0)
    log.evaluate(25, 0.1)
    log.evaluate(40, 0.2)
    # Killed after step 40; the newest checkpoint was that of step 25.
    log.start(25)
    log.train(30, 2.0)
    history = read_history(log.folder)
    assert points(history, "loss") == [(10, 4.0), (20, 4.0), (30, 2.0)]
    assert [record["step"] for record in history.evaluations] == [25]
    found = newest_evaluation(history)
    assert found is not None
    assert found[0] == 25
    assert history.step == 30
    marks = training_charts(history)[0][2]["marks"]
    assert [mark["x"] for mark in marks] == [25]


def test_skipped_updates_leave_a_gap_and_a_mark(new_log):
    log = new_log()
    log.start()
    log.train(10, 3.0)
    log.train(20, "nan", skipped=10)
    log.train(30, 2.5, skipped=1)
    history = read_history(log.folder)
    assert history.skipped == 11
    assert points(history, "loss") == [(10, 3.0), (20, None), (30, 2.5)]
    marks = training_charts(history)[0][2]["marks"]
    assert [(mark["x"], mark["label"]) for mark in marks] == [
        (20, "10 updates skipped"),
        (30, "1 update skipped"),
    ]


@pytest.mark.parametrize("ended", ["results", "stopped", "error", "crash"])
def test_how_a_run_ended(new_log, ended: str):
    log = new_log()
    log.start()
    log.train(10)
    log.add(ended, text="the end", step=14)
    history = read_history(log.folder)
    assert history.ended == ended
    assert history.step == (14 if ended == "stopped" else 10)
    log.start(14)
    assert read_history(log.folder).ended == ""


def test_a_log_cut_short_in_a_line(new_log):
    log = new_log()
    log.start()
    log.train(10)
    with (log.folder / "log.jsonl").open("ab") as file:
        file.write(b'{"kind": "tra\n\xff\xfe\n[1, 2]\n{"kind": 4, "time": 1}\n')
    log.train(20)
    history = read_history(log.folder)
    assert history.damaged == 4
    assert [record["step"] for record in history.train] == [10, 20]


def test_long_runs_are_thinned_by_means(new_log):
    log = new_log(steps=2 * MOST_POINTS)
    log.start()
    for step in range(1, 2 * MOST_POINTS + 1):
        log.train(step, float(step % 2))
    found = points(read_history(log.folder), "loss")
    assert len(found) == MOST_POINTS
    assert {value for _, value in found} == {0.5}
    assert found[-1][0] == 2 * MOST_POINTS


def test_accuracy_is_by_epoch(new_log):
    log = new_log()
    log.start()
    log.evaluate(50, 0.25)
    log.evaluate(100, 0.5)
    chart = accuracy_chart(read_history(log.folder))
    assert chart is not None
    lines = {series["name"]: series["points"] for series in chart["series"]}
    assert lines["box AP"] == [(1, 0.25), (2, 0.5)]
    assert lines["mask AP"] == [(1, 0.125), (2, 0.25)]
    assert "mask AP50" not in lines  # there was no figure


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"log.jsonl: not found; is it the output folder"):
        read_history(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read_history(tmp_path / "nowhere")
