"""One self-contained HTML page out of sections of text, tables, plots, quotations and commands; no external request."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import jinja2


@dataclass
class Table:
    """Column names and rows of ready text; the first column is the row's name."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Section:
    """A part of the page. `plots` are (caption, SVG) pairs, `quotes` (who, text) pairs."""

    title: str
    text: str = ""
    table: Table | None = None
    plots: Sequence[tuple[str, str]] = field(default_factory=list)
    quotes: Sequence[tuple[str, str]] = field(default_factory=list)
    commands: Sequence[str] = field(default_factory=list)


def write_page(file: Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write the page; text is escaped, SVG is taken as it is."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    file.write_text(template.render(title=title, subtitle=subtitle, sections=sections), encoding="utf-8")
