import logging

import numpy as np
from PIL import Image

from pipeline.report.chart import Chart, Line
from pipeline.report.pictures import picture
from pipeline.report.report import Card, Report, Section, render, write_report
from tests.report.pages import Page

HOSTILE = '</code></pre><script>alert(1)</script><img src=x onerror="alert(1)">{{ 7*7 }}'


def everything(text):
    """A report that says `text` wherever it says anything."""
    shown = picture(Image.fromarray(np.zeros((8, 8, 3), np.uint8)), text, text)
    line = Line(text, ((0.0, 1.0), (1.0, 2.5)), ((0.0, 0.5, 1.5), (1.0, 2.0, 3.0)), last=text)
    section = Section(
        text,
        text,
        facts={text: text},
        table=((text, text), (text, text)),
        charts=(Chart(text, text, text, (line, Line("level", ((0.0, 2.0), (1.0, 2.0)), dashed=True)), text),),
        examples=(shown,),
        columns=(shown,),
        code={text: text},
        folded={text: text},
    )
    return Report(text, text, text, (Card(text, text, text),), (section, Section("nothing else")))


def test_a_page_stands_alone_and_whatever_is_in_it_is_text():
    page = Page(render(everything(HOSTILE)))
    page.check()
    assert len(page.elements["img"]) == 2
    assert page.text.count(HOSTILE) > 20
    assert page.points(HOSTILE) == [(0.0, 1.0), (1.0, 2.5)]


def test_what_is_empty_is_not_shown():
    page = Page(render(Report("a", "distillation", "b", (), (Section("only a title"),))))
    page.check()
    assert not {"table", "svg", "img", "pre", "details"} & page.elements.keys()


def test_it_is_dark_as_the_system_is_and_as_wide_as_a_phone():
    text = render(everything("a"))
    assert "prefers-color-scheme: dark" in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert '<meta name="color-scheme" content="light dark">' in text
    page = Page(text)
    assert all("width" not in svg for svg in page.elements["svg"])  # they take the width that there is


def test_a_report_that_cannot_be_made_or_written_is_one_warning(tmp_path, caplog):
    def fail():
        raise RuntimeError("no such\nfigure")

    with caplog.at_level(logging.WARNING):
        assert write_report(tmp_path, fail) is None
        assert write_report(tmp_path / "file" / "below", lambda: everything("a")) is not None
        (tmp_path / "taken").touch()
        assert write_report(tmp_path / "taken", lambda: everything("a")) is None
    assert [record.message.split(": ")[0] for record in caplog.records] == ["the run has no report.html"] * 2
    assert "no such figure" in caplog.text
    assert not (tmp_path / "report.html").exists()


def test_a_report_replaces_that_of_an_earlier_start(tmp_path):
    for text in ("earlier words", "later words"):
        file = write_report(tmp_path, lambda text=text: everything(text))
    assert file == tmp_path / "report.html"
    assert "later words" in file.read_text()
    assert "earlier words" not in file.read_text()
