import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from made_up_run import EVIL, a_look
from PIL import Image

from casc.cli import main as cli
from casc.data.index import Category
from casc.draw.html import document, picture
from casc.evaluate.errors import KINDS
from casc.report.charts import training_charts
from casc.report.history import newest_evaluation, read_history
from casc.report.page import report_page
from casc.train.loop import train


class Reader(HTMLParser):
    """What a browser makes of the page: its elements and its text, section by section."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: dict[str, str] = {}
        self.section, self.open = "", [""]
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] or ""

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if self.open[-1] not in ("script", "style"):
            self.texts[self.section] = self.texts.get(self.section, "") + data


def page_of(folder: Path, look=None) -> str:
    history = read_history(folder)
    return report_page(history, newest_evaluation(history), look, without="nobody asked.")


def test_a_run_that_goes_on_is_told_as_such(new_log):
    log = new_log()
    log.start()
    log.train(10)
    read = Reader(page_of(log.folder))
    assert "going on, or killed" in read.texts["summary"]
    assert "10 of 100" in read.texts["summary"]
    assert "not evaluated yet" in read.texts["summary"]
    assert "hasn't been evaluated yet" in read.texts["accuracy"]
    assert "Left out: nobody asked." in read.texts["images"]
    assert "no warnings and no errors" in read.texts["messages"]


def test_a_log_without_steps_still_gives_a_page(new_log):
    log = new_log()
    log.start()
    texts = Reader(page_of(log.folder)).texts
    assert "no figures of training yet" in texts["training"]
    assert "0 of 100" in texts["summary"]
    log.folder.joinpath("log.jsonl").write_text("")
    texts = Reader(page_of(log.folder)).texts
    assert "doesn't say where it ran" in texts["environment"]


def test_validation_losses_are_drawn_beside_those_of_training(new_log):
    log = new_log()
    log.start()
    log.train(10)
    log.evaluate(50)
    history = read_history(log.folder)
    assert [s["name"] for s in training_charts(history)[0][2]["series"]] == ["loss"]
    log.add("evaluation", step=100, figures={"box_ap": 0.5}, losses={"loss": 2.5, "s0.loss_cls": 1})
    name, title, chart = training_charts(read_history(log.folder))[0]
    assert (name, title) == ("loss", "Loss")
    assert [(s["name"], s["points"]) for s in chart["series"]] == [
        ("training", [(10, 1.5)]),
        ("validation", [(50, None), (100, 2.5)]),
    ]
    assert '"validation"' in page_of(log.folder)


def test_a_finished_run(new_log):
    log = new_log()
    log.start(environment={"python": "3.99.1"})
    log.train(50)
    log.evaluate(50, 0.6)
    log.train(100)
    log.evaluate(100, 0.4)
    log.add("results", text="a row")
    texts = Reader(page_of(log.folder, (100, a_look()))).texts
    assert "finished" in texts["summary"]
    assert re.search(r"Box AP40\.0\s%at step 100, best 60\.0\s% at step 50", texts["summary"])
    assert "n/a" in texts["accuracy"]  # the class without objects
    assert "3.99.1" in texts["environment"]
    assert "quality 25.0\u00a0%1 found, 2 missed, 3 wrong" in texts["images"]


def test_kinds_of_errors_and_sizes_are_shown(new_log):
    log = new_log()
    log.start()
    log.evaluate(50)
    names = ["dog", EVIL]
    look = a_look()
    classes = tuple(
        replace(c, more={"bbox": {"APs": None, "APm": 0.25}, "segm": {"APm": None}})
        for c in look.evaluation.classes[:2]
    )
    counts = dict(zip(KINDS, range(31, 37), strict=True))
    errors = {"count": counts, "lost": dict.fromkeys(KINDS, 0.125), "ap50": 0.5,
              "confusion": [[41, 42, 43], [44, 45, 46], [47, 48, 49]]}  # fmt: skip
    evaluation = replace(look.evaluation, classes=classes, errors={"bbox": errors})
    categories = [Category(i + 1, name) for i, name in enumerate(names)]
    page = page_of(log.folder, (60, look._replace(evaluation=evaluation, categories=categories)))
    texts = Reader(page).texts
    shown = re.sub(r"\s+", " ", texts["errors"])
    assert "missed3612.5" in shown.replace(" ", "")
    assert f"dog414243{EVIL}444546background474849" in shown
    assert "box APm" in texts["accuracy"]
    assert "box APs" not in texts["accuracy"]
    assert "25.0" in texts["accuracy"]
    assert "errors" not in Reader(page_of(log.folder, (60, look))).texts


def test_trouble_is_told(new_log):
    log = new_log()
    log.start()
    log.train(10, "nan", skipped=4)
    log.add("warning", text="warning: step 7: the loss is not finite")
    log.add("crash", text=f"ValueError: {EVIL}", step=12)
    with (log.folder / "log.jsonl").open("a") as file:
        file.write("{torn\n")
    page = page_of(log.folder)
    texts = Reader(page).texts
    assert "failed" in texts["summary"]
    assert "Updates skipped4" in texts["summary"]
    assert "1 lines of the log can't be read" in texts["summary"]
    assert f"ValueError: {EVIL}" in texts["messages"]
    assert "step 7: the loss is not finite" in texts["messages"]


def test_other_settings_before_a_stop_are_told(new_log):
    log = new_log()
    log.start(environment={"device": "old"})
    log.train(10)
    log.recipe = {**log.recipe, "batch": 7}
    (log.folder / "recipe.json").write_text(json.dumps(log.recipe))
    log.start(10, environment={"device": "new"})
    texts = Reader(page_of(log.folder)).texts
    assert "From step 0 on, until it was continued, the run had --batch 2." in texts["recipe"]
    assert "--batch72" in texts["recipe"].replace("\n", "")  # value and default
    assert "from step 0from step 10" in texts["environment"]
    assert "Continuedonce" in texts["summary"]


def test_names_are_text_and_never_markup(new_log):
    log = new_log(name=EVIL)
    log.start()
    log.train(10)
    log.evaluate(10)
    plain = Reader(page_of(harmless(log.folder), (10, a_look())))
    page = page_of(log.folder, (10, a_look()))
    read = Reader(page)
    assert EVIL not in page
    assert EVIL in read.texts["accuracy"]
    assert EVIL in read.texts["precision"]
    assert EVIL in read.texts["images"]
    # As many scripts as without such a name, and no attribute that runs anything.
    assert [t for t, _ in read.tags] == [t for t, _ in plain.tags]
    assert not [a for _, attributes in read.tags for a in attributes if a.startswith("on")]
    named = [attributes["alt"] for tag, attributes in read.tags if tag == "img"]
    assert all(EVIL in text for text in named)


def harmless(folder: Path) -> Path:
    """The same run with a name that is no markup."""
    copy = shutil.copytree(folder, folder.with_name("harmless"))
    for path in copy.rglob("*.json*"):
        path.write_text(path.read_text().replace("<script>", "[").replace("</script>", "]"))
    return copy


def test_data_cant_end_its_script():
    page = document("t", [], data={"x": "</script><!-- <script>\u2028&"})
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert text is not None
    assert json.loads(text.group(1)) == {"x": "</script><!-- <script>\\u2028&"}
    assert "<!--" not in page


def test_nothing_is_loaded_from_outside(new_log):
    log = new_log()
    log.start()
    page = page_of(log.folder, (10, a_look()))
    for tag, attributes in Reader(page).tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert not re.findall(r"@import|url\(", page)
    assert "default-src &#x27;none&#x27;" in page


def test_pictures_keep_their_pixels():
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, 30:] = (200, 30, 90)
    tag = picture(pixels, 'a "quoted" name')
    assert 'alt="a &quot;quoted&quot; name"' in tag
    coded = re.search(r"base64,([^\"]+)", tag)
    assert coded is not None
    with Image.open(io.BytesIO(base64.b64decode(coded.group(1)))) as image:
        assert image.format == "WEBP"
        np.testing.assert_allclose(np.asarray(image.convert("RGB"))[20, 45], (200, 30, 90), atol=9)


def colours() -> dict[str, list[np.ndarray]]:
    """The page's colours, light and dark, as RGB in [0, 1]."""
    style = files("casc.draw").joinpath("page.css").read_text()
    pairs = re.findall(r"--(\w+): light-dark\(#(\w{6}), #(\w{6})\)", style)
    return {
        name: [np.frombuffer(bytes.fromhex(c), np.uint8) / 255 for c in both]
        for name, *both in pairs
    }


def luminance(colour: np.ndarray) -> float:
    """WCAG 2.1's relative luminance."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_from_the_page(mode: int):
    found = {name: luminance(both[mode]) for name, both in colours().items()}
    # WCAG 2.1, level AA: 4.5 to 1 for text, 3 to 1 for lines.
    least = {"ink": 4.5, "soft": 4.5, "link": 4.5, "alarm": 3} | {f"s{i}": 3 for i in range(4)}
    for name, ratio in least.items():
        for ground in ("paper", "raised"):
            pair = sorted((found[name], found[ground]))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= ratio, (name, ground)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_lines_differ_for_colour_blind_eyes(mode: int):
    # Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB: protan and deutan.
    matrices = [
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.01182, 0.04294, 0.968881]],
    ]  # fmt: skip
    lines = np.stack([colours()[f"s{i}"][mode] for i in range(4)]) ** 2.2
    for matrix in matrices:
        seen = (lines @ np.array(matrix).T).clip(0, 1) ** (1 / 2.2) * 255
        distance = np.linalg.norm(seen[:, None] - seen[None], axis=2) + 999 * np.eye(4)
        assert distance.min() > 25


def test_the_command_looks_at_the_newest_checkpoint(tiny_recipe, capsys):
    recipe = replace(tiny_recipe, max_steps=1, evaluate_every=1)
    summary = train(recipe)
    assert summary.evaluation is not None
    arguments = ["report", str(recipe.folder), "--device", "cpu", "--loading.workers", "0"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--threshold", "0", "--count", "1", "--errors"])
    assert stop.value.code == 0
    assert "the report is in" in capsys.readouterr().out
    page = (recipe.folder / "report.html").read_text()
    read = Reader(page)
    assert "finished" in read.texts["summary"]
    assert "on all 5 images" in read.texts["precision"]
    pictures = [attributes for tag, attributes in read.tags if tag == "img"]
    assert len(pictures) == 1 + 2 * 2  # the first batch; the worst and the best, drawn twice
    # The same weights on the same images: the page's curves have the evaluation's mean.
    data = re.search(r'id="data">(.*?)</script>', page, re.S)
    assert data is not None
    curve = json.loads(data.group(1))["pr-bbox"]["choices"][0]
    objects = summary.evaluation.instances
    rows = re.findall(r"<tr>(.*?)</tr>", page.partition("Confusion matrix of boxes")[2], re.S)
    counts = [list(map(int, re.findall(r">(\d+)</td>", row))) for row in rows[1:3]]
    assert sum(map(sum, counts)) == objects
    expected = summary.evaluation.figures["bbox"]["AP"]
    assert np.mean(curve[2]) / 1000 == pytest.approx(expected, abs=6e-4)

    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--shards", "nowhere"])
    assert stop.value.code == 1
    assert "--no-images" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(recipe.folder), "--no-images"])
    assert stop.value.code == 0
    page = (recipe.folder / "report.html").read_text()
    assert "Left out: --no-images was given." in Reader(page).texts["images"]
