"""Pages out of sections of text, tables, plots and commands: self-contained HTML without any external request, and Markdown.

HTML works without JavaScript and follows the reader's light or dark setting: plots are inline SVG whose colours are the
page's. Markdown has what a model card needs, without plots.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import jinja2

from minitron_megatron.plain_text import escaped, one_line
from minitron_megatron.report.plots import CSS_COLOURS

# Cells of so many characters stay in one line.
_SHORT = 26
# Both kinds of page say so near their beginning.
MARK = "minitron_megatron report"
_NUMBER = re.compile(r"[−+-]?[\d,.]+(e[+-]?\d+)?( ± [\d.]+| %| ?×)?|–|")
_REFERENCE = re.compile(r'url\(#([^)]+)\)|href="#([^"]+)"')


@dataclass
class Table:
    """Column names and rows of ready text; the first column is the row's name."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Whether each column is one of numbers, which stand to the right."""
        return [i > 0 and all(_NUMBER.fullmatch(row[i]) for row in self.rows) for i in range(len(self.columns))]

    @property
    def classes(self) -> list[str]:
        """What each column is to the style sheet: number, short (never broken into lines) or long."""
        short = [all(len(row[i]) <= _SHORT for row in self.rows) for i in range(len(self.columns))]
        return ["number" if n else "short" if s else "long" for n, s in zip(self.numeric, short, strict=True)]


@dataclass
class Figure:
    """A plot: its caption, which also stands for it where it cannot be seen, and its SVG; `natural` ones are not scaled."""

    caption: str
    svg: str
    natural: bool = False


@dataclass
class Section:
    """A part of the page; of a model card too if `card`."""

    title: str
    text: str = ""
    tables: Sequence[Table] = field(default_factory=list)
    figures: Sequence[Figure] = field(default_factory=list)
    commands: Sequence[str] = field(default_factory=list)
    card: bool = False


def write_page(file: Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write the HTML page; text is escaped, SVG is taken as it is."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    numbered = iter(range(10**6))
    text = template.render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        mark=MARK,
        draw=lambda one: inline(one, f"p{next(numbered)}-"),
    )
    file.write_text(text, encoding="utf-8")


def _shown(value: object) -> object:
    """A value of the template: what no page may have, such as an escape sequence, is shown as what it is."""
    return value if not isinstance(value, str) or hasattr(value, "__html__") else escaped(value)


def inline(figure: Figure, prefix: str) -> str:
    """A figure's SVG as part of a page: ids that no other plot has, the page's colours, its caption as its name."""
    svg = re.sub(r"<style.*?</style>|<!--.*?-->|<defs>\s*</defs>", "", figure.svg, flags=re.DOTALL)
    used = {name for pair in _REFERENCE.findall(svg) for name in pair if name}
    svg = re.sub(r'\sid="([^"]+)"', lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else "", svg)
    svg = _REFERENCE.sub(lambda found: found[0].replace("#", f"#{prefix}"), svg)
    for colour, name in CSS_COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    head, _, rest = svg.partition(">")
    if not figure.natural:
        head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img"><title>{html.escape(escaped(figure.caption))}</title>{rest}'


def write_card(file: Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write the sections of a model card as Markdown."""
    lines = [f"<!-- {MARK} -->", f"# {one_line(title)}", "", subtitle]
    for section in (one for one in sections if one.card):
        lines += ["", f"## {one_line(section.title)}"]
        if section.text:
            lines += ["", section.text]
        for table in section.tables:
            lines += ["", *([table.caption, ""] if table.caption else []), *_markdown(table)]
        if section.commands:
            lines += ["", "```", *section.commands, "```"]
    file.write_text(escaped("\n".join(lines)) + "\n", encoding="utf-8")


def _markdown(table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = ["---:" if numeric else "---" for numeric in table.numeric]
    return [line(table.columns), "|" + "|".join(rule) + "|", *map(line, table.rows)]
