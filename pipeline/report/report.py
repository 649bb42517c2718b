"""A report as data, and the page that it becomes."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pipeline.errors import one_line
from pipeline.report import chart
from pipeline.report.chart import Chart
from pipeline.report.html import PAGE, environment, policy, style
from pipeline.report.pictures import Picture
from pipeline.storage.atomic import atomic_write

FILE = "report.html"
"""Name of the report in a run's folder."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Card:
    """A headline: a value with its unit, and a note below it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a report; what is empty is not shown.

    Attributes:
        facts: two columns.
        table: rows of equal length, the first of which is the header.
        examples: pictures beside each other, each with its caption.
        columns: pictures of equal height whose rows belong together.
        code: lines to paste, by title.
        folded: text that the reader opens, by title.
    """

    title: str
    lead: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    table: tuple[tuple[str, ...], ...] = ()
    charts: tuple[Chart, ...] = ()
    examples: tuple[Picture, ...] = ()
    columns: tuple[Picture, ...] = ()
    code: Mapping[str, str] = field(default_factory=dict)
    folded: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The report of one run; `kind` is the job in a word."""

    title: str
    kind: str
    run: str
    cards: tuple[Card, ...]
    sections: tuple[Section, ...]


def render(report: Report) -> str:
    """The whole page: it loads nothing, holds no script, and escapes every text."""
    template, created = environment().get_template("report.html"), datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    css = style(PAGE / "report.css")
    return template.render(report=report, css=css, policy=policy(), created=created, chart=chart)


def write_report(folder: Path, make: Callable[[], Report]) -> Path | None:
    """Write the report of a run into its folder; returns the file.

    Whatever fails is one warning, and None: the run has its results without a report.
    """
    try:
        page = render(make())
        with atomic_write(folder / FILE) as file:
            file.write(page.encode())
        return folder / FILE
    except Exception as error:  # noqa: BLE001  a page about a result must not cost the result
        log.warning("the run has no %s: %s", FILE, one_line(error))
        return None
