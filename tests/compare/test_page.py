"""The page in a real browser: Debian's Chromium, headless, driven by Playwright."""

import re
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from pipeline.compare.comparison import Comparison
from pipeline.compare.html import render_page
from pipeline.compare.measures import measures_of
from tests.compare.experiments import HOSTILE, entry

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
BEST = "regla_s · hog + clip/ViT-B-32@openai"

CONTRAST = """names => {
  const luminance = text => {
    const canvas = document.createElement("canvas").getContext("2d");
    canvas.fillStyle = text;
    const value = parseInt(canvas.fillStyle.slice(1), 16);
    const parts = [value >> 16, (value >> 8) & 255, value & 255].map(part => part / 255)
      .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const style = getComputedStyle(document.documentElement);
  return names.map(pair => {
    const [low, high] = pair.map(name => luminance(style.getPropertyValue(name).trim())).sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  });
}"""
"""Contrast ratio of pairs of colours (WCAG 2.1, definition of contrast ratio)."""


@pytest.fixture(scope="module")
def file(comparison, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "comparison.html"
    path.write_text(render_page(comparison), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver, tempfile.TemporaryDirectory() as profile:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, f"--disk-cache-dir={profile}"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser, file) -> Iterator:
    """Open the page; at the end nothing may have gone wrong in it, nor been asked for from anywhere."""
    wrong, asked, pages = [], [], []

    def show(width=1280, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("#plot-cost .scatterlayer .point")
        pages.append(page)
        return page

    yield show
    for page in pages:
        page.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def column(page, table, name):
    """Texts of the visible cells under a header, from above."""
    return page.evaluate(
        """([table, name]) => {
          const { tHead, tBodies } = document.querySelector(table);
          const index = [...tHead.rows[0].cells].findIndex(cell => cell.textContent.startsWith(name));
          return [...tBodies[0].rows].filter(row => !row.hidden).map(row => row.cells[index].textContent.trim());
        }""",
        [table, name],
    )


def drawn(page, plot):
    """Names of the traces of a plot that stand for groups."""
    return page.evaluate(f"document.getElementById('{plot}').data.filter(t => t.meta.groups.length).map(t => t.name)")


def test_names_of_runs_are_text_and_nothing_else(show):
    page = show()
    assert page.title().endswith("13 runs compared")
    assert page.locator("img").count() == 0
    assert f"{HOSTILE}-distill" in column(page, "#table-runs", "run")
    assert page.locator("script").count() == 3


def test_a_header_sorts_by_mouse_and_keyboard_and_says_so(show):
    page = show()
    header = page.locator("#table-groups thead th").filter(has_text=re.compile(r"^kNN%"))
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    values = [float(text.split()[0]) for text in column(page, "#table-groups", "kNN%")]
    assert values == sorted(values, reverse=True)
    assert column(page, "#table-groups", "group")[0] == BEST
    header.get_by_role("button").press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    assert column(page, "#table-groups", "group")[-1] == BEST
    page.locator("#table-groups thead th").first.get_by_role("button").press("Enter")
    assert header.get_attribute("aria-sort") == "none"
    names = column(page, "#table-groups", "group")
    assert names == sorted(names)


def test_what_is_not_known_comes_last_in_either_order(show):
    page = show()
    header = page.locator("#table-runs thead th").filter(has_text=re.compile(r"^linear"))
    for _ in range(2):
        header.get_by_role("button").click()
        values = column(page, "#table-runs", "linear")
        assert values[:6] == sorted(values[:6], key=float, reverse=header.get_attribute("aria-sort") == "descending")
        assert values[6:] == [""] * 7


def test_the_filter_reaches_tables_and_plots(show):
    page = show()
    every = drawn(page, "plot-cost")
    assert len(every) == 6
    page.get_by_label("Filter").fill("REGLA_S dinov2")
    only = "regla_s · hog + dinov2/vits14"
    assert column(page, "#table-groups", "group") == column(page, "#table-changes", "group") == [only]
    assert column(page, "#table-runs", "run") == ["regla_s-din-0-distill", "regla_s-din-1-distill"]
    assert set(drawn(page, "plot-cost")) == set(drawn(page, "plot-curves")) == {only}
    assert page.locator("#count").text_content() == "2 of 13 runs"
    page.get_by_label("Filter").fill("failed")
    assert column(page, "#table-runs", "run") == ["broken-distill"]
    page.get_by_label("Filter").fill("")
    assert drawn(page, "plot-cost") == every
    assert len(column(page, "#table-runs", "run")) == 13


def test_a_point_tells_its_figures_when_it_is_hovered(show):
    page = show()
    number = drawn(page, "plot-cost").index(BEST)
    page.locator("#plot-cost .scatterlayer .trace .point").nth(number).hover(force=True)
    label = page.locator("#plot-cost .hoverlayer .hovertext")
    label.wait_for()
    told = label.text_content()
    for expected in (BEST, "kNN 28.", "parameters 6.10 M", "latency 5.1 ms", "2 seeds"):
        assert expected in told


def test_measures_weights_and_pairs_are_chosen(show):
    page = show()
    page.locator("#cost").select_option("latency")
    assert page.locator("#plot-cost .xtitle").text_content() == "latency, ms"
    page.locator("#accuracy").select_option("linear")
    assert page.locator("#plot-cost .ytitle").text_content() == "linear, %"
    page.locator("#weights").select_option("raw")
    assert page.evaluate("[...new Set(document.getElementById('plot-curves').data.map(t => t.meta.role))]") == ["raw"]
    assert "paired by seed, 2 seeds" in page.locator("#statement").text_content()
    page.locator("#pair-measure").select_option("linear")
    assert "Significance unknown: 1 and 1 seeds" in page.locator("#statement").text_content()
    page.locator("#pair-second").select_option(page.locator("#pair-first").input_value())
    assert page.locator("#statement").text_content() == "Choose two groups."


def test_one_set_of_held_out_images_is_shown_at_a_time(browser, tmp_path):
    rows = [entry("one", knn=20.0, parameters=2e6), entry("two", knn=30.0, parameters=3e6)]
    others = [entry("one", linear=50.0, parameters=2e6, held_out="others")]
    found = Comparison((*rows, *others), None, {}, measures_of([]), {}, "a", "sqlite:///a", "")
    (tmp_path / "page.html").write_text(render_page(found), encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_selector("#plot-cost .scatterlayer .point")
    assert column(page, "#table-groups", "group") == drawn(page, "plot-cost") == ["one", "two"]
    page.get_by_label("Held-out images").select_option("others")
    assert column(page, "#table-groups", "group") == drawn(page, "plot-cost") == ["one #2"]
    assert page.locator("#accuracy").input_value() == "linear"  # as there is no kNN on these
    assert page.locator("#count").text_content() == "1 of 3 runs"
    page.close()


PAIRS = [(text, ground) for text in ("--text", "--muted", "--accent") for ground in ("--panel", "--page", "--row")]
PAIRS += [("--accent", "--accent-soft"), ("--good", "--good-soft"), ("--bad", "--bad-soft"), ("--good", "--panel")]


def test_it_is_dark_or_light_as_the_system_is_until_the_reader_chooses(show):
    dark, light = show(scheme="dark"), show()
    grounds = [page.evaluate("getComputedStyle(document.body).backgroundColor") for page in (dark, light)]
    assert grounds == ["rgb(15, 18, 23)", "rgb(245, 246, 248)"]
    fonts = "document.getElementById('plot-cost').layout.font.color"
    assert dark.evaluate(fonts) != light.evaluate(fonts)
    toggle = light.get_by_role("button", name="Theme")
    toggle.click()
    toggle.click()
    assert toggle.text_content() == "Theme: dark"
    assert light.evaluate("getComputedStyle(document.body).backgroundColor") == grounds[0]
    assert light.evaluate(fonts) == dark.evaluate(fonts)
    for page in (dark, show()):
        assert min(page.evaluate(CONTRAST, PAIRS)) >= 4.5


def test_a_narrow_screen_is_not_left_sideways(show):
    page = show(width=360)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    wider = page.evaluate(
        """[...document.querySelectorAll("main *")]
          .filter(element => !element.closest(".scroll, svg") && element.getBoundingClientRect().right > 361)
          .map(element => element.outerHTML.slice(0, 99))"""
    )
    assert wider == []
    table = page.locator("#groups .scroll")
    assert table.evaluate("element => element.scrollWidth > element.clientWidth")
    assert page.locator("#plot-cost .main-svg").first.bounding_box()["width"] <= 360
