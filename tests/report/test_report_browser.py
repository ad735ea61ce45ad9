"""The page in a real browser: by keyboard, light and dark, wide and narrow, without network."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_run import EVIL, Log, a_look

from casc.report.history import newest_evaluation, read_history
from casc.report.page import report_page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

TABLE = "table.sortable"


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    log = Log(tmp_path_factory.mktemp("browser") / "run", name=f"{EVIL} a_very_{'long_' * 20}name")
    log.start()
    for step in range(1, 61):
        log.train(step, "nan" if step == 30 else 3 / step, skipped=int(step == 30))
        if step == 40:
            log.start(40)
    log.evaluate(50)
    log.add("warning", text=f"warning: {'/a/very/long/path' * 20}")
    history = read_history(log.folder)
    page = log.folder / "report.html"
    page.write_text(report_page(history, newest_evaluation(history), (50, a_look())))
    return page.as_uri()


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    # Chromium refuses to run as root in its sandbox, and containers' tests often are root.
    flags = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Any]:
    """Opens the page; in the end no error may have been logged and nothing asked for."""
    contexts, faults = [], []

    def ask(request: Any) -> None:
        if request.url != address and not request.url.startswith("data:"):
            faults.append(request.url)

    def open_page(width: int = 1000, scheme: str = "light") -> Any:
        contexts.append(
            browser.new_context(viewport={"width": width, "height": 700}, color_scheme=scheme)
        )
        page = contexts[-1].new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.on("request", ask)
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def first_column(page: Any) -> list[str]:
    return page.locator(f"{TABLE} tbody tr:visible th").all_text_contents()


@pytest.mark.parametrize("width", [320, 700, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_window_in_light_and_dark(opened, width: int, scheme: str):
    page = opened(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    charts = page.locator("figure.chart").all()
    assert len(charts) == 9
    for chart in charts:
        box = chart.locator("svg[role=slider]").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["width"] > 200
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = page.evaluate("getComputedStyle(document.body).color")
    dark, light = sorted([paper, ink], key=lambda c: sum(map(int, c[4:-1].split(","))))
    assert (paper, ink) == ((light, dark) if scheme == "light" else (dark, light))


def test_charts_follow_the_window(opened):
    page = opened(1200)
    chart = page.locator("figure.chart svg[role=slider]").first
    wide = chart.bounding_box()["width"]
    page.set_viewport_size({"width": 360, "height": 700})
    page.wait_for_function(
        "document.querySelector('figure.chart svg[role=slider]').clientWidth < 360"
    )
    assert chart.bounding_box()["width"] < wide
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_table_is_sorted_by_keyboard(opened):
    page = opened()
    names = ["zebra", "ant", EVIL, "cat"]
    assert first_column(page) == names
    page.get_by_label("Find a class").focus()
    press(page, "Tab", "Tab")  # the table's own scrolling, then its first header
    assert page.evaluate("document.activeElement.textContent") == "class"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    press(page, "Enter")
    assert first_column(page) == [EVIL, "ant", "cat", "zebra"]
    press(page, "Enter")
    assert first_column(page) == ["zebra", "cat", "ant", EVIL]
    press(page, "Tab", "Space")  # objects: the most first
    assert first_column(page) == ["ant", "cat", "zebra", EVIL]
    press(page, "Tab", "Space")  # box AP; a class without one comes last both ways
    assert first_column(page) == ["zebra", EVIL, "ant", "cat"]
    press(page, "Space")
    assert first_column(page) == ["ant", EVIL, "zebra", "cat"]
    order = page.locator(f"{TABLE} thead th").evaluate_all("all => all.map(th => th.ariaSort)")
    assert order == ["none", "none", "ascending", "none"]


def test_the_table_is_filtered_by_keyboard(opened):
    page = opened()
    field = page.get_by_label("Find a class")
    field.focus()
    page.keyboard.type("A")
    assert set(first_column(page)) == {"zebra", "ant", EVIL, "cat"}
    page.keyboard.type("nt")
    assert first_column(page) == ["ant"]
    assert page.get_by_text("1 of 4").is_visible()


def test_the_theme_is_toggled_by_keyboard_and_stays(opened):
    page = opened(scheme="light")
    shade = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(shade)
    button = page.get_by_role("button", name="Dark")
    assert button.get_attribute("aria-pressed") == "false"
    button.focus()
    press(page, "Enter")
    assert button.get_attribute("aria-pressed") == "true"
    dark = page.evaluate(shade)
    assert dark != light
    page.reload()
    assert page.evaluate(shade) == dark
    page.get_by_role("button", name="Dark").focus()
    press(page, "Space")
    assert page.evaluate(shade) == light


def test_the_first_tab_skips_to_the_content(opened):
    page = opened()
    press(page, "Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    press(page, "Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    press(page, "Tab")
    assert page.evaluate("document.activeElement.closest('section').id") == "training"


def test_a_charts_values_are_read_by_keyboard(opened):
    page = opened()
    figure = page.locator("figure.chart[data-chart=loss]")
    chart = figure.get_by_role("slider")
    chart.focus()
    press(page, "Home")
    assert chart.get_attribute("aria-valuetext") == "step 1, loss 3"
    assert figure.locator(".readout").is_visible()
    press(page, "ArrowRight")
    assert chart.get_attribute("aria-valuetext") == "step 2, loss 1.5"
    press(page, "End")
    assert chart.get_attribute("aria-valuetext") == "step 60, loss 0.05"
    press(page, "Home", *["ArrowRight"] * 29)
    expected = "step 30, loss no value, 1 update skipped"
    assert chart.get_attribute("aria-valuetext") == expected
    press(page, "Escape")
    assert not figure.locator(".readout").is_visible()
    # Nothing is drawn across the gap: the line is taken up anew.
    assert figure.locator("path.line").get_attribute("d").count("M") == 2


def test_a_charts_values_are_read_by_pointer(opened):
    page = opened()
    figure = page.locator("figure.chart[data-chart=loss_cls]")
    figure.scroll_into_view_if_needed()
    box = figure.get_by_role("slider").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 25, box["y"] + 60)
    readout = figure.locator(".readout")
    assert readout.inner_text().split("\n") == ["step 60", "stage 1 0.5", "stage 2 0.25"]
    page.mouse.move(2, 2)
    assert not readout.is_visible()


def test_the_curves_of_a_class_are_chosen_by_keyboard(opened):
    page = opened()
    chart = page.locator("figure.chart[data-chart=pr-bbox]").get_by_role("slider")
    chart.focus()
    press(page, "Home", "ArrowRight")
    # The mean over the three classes with objects: 0.99, 0.25, 0.99.
    assert chart.get_attribute("aria-valuetext").startswith("recall 1\u00a0%, IoU .50 74.3\u00a0%")
    page.get_by_label("Class", exact=True).focus()
    press(page, "ArrowDown", "ArrowDown")
    chart.focus()
    press(page, "Home")
    assert chart.get_attribute("aria-valuetext").startswith("recall 0\u00a0%, IoU .50 25\u00a0%")
    page.get_by_label("Class", exact=True).focus()
    press(page, "End")
    plot = page.locator("figure.chart[data-chart=pr-bbox] .plot")
    assert plot.inner_text() == "There is no finite value to draw."


def test_the_page_works_from_a_folder_that_is_moved(browser, address: str, tmp_path: Path):
    moved = tmp_path / "alone.html"
    moved.write_bytes(Path(address.removeprefix("file://")).read_bytes())
    page = browser.new_page()
    page.goto(moved.as_uri())
    loaded = page.locator("img").evaluate_all("all => all.every(i => i.naturalWidth > 0)")
    assert loaded
    page.close()
