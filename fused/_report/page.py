"""A self-contained HTML page: what it consists of, and how it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fused._cli import require


@dataclass(frozen=True)
class Tile:
    """One large figure at the top of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 2  # columns aligned left; the others hold numbers


@dataclass(frozen=True)
class Picture:
    source: str  # a data URI, from `charts`
    caption: str


@dataclass(frozen=True)
class Listing:
    """Text in a fixed-width font, folded away."""

    title: str
    text: str


@dataclass
class Section:
    title: str
    text: str = ""
    blocks: list[Table | Picture | Listing] = field(default_factory=list)


@dataclass
class Page:
    title: str
    subtitle: str
    tiles: list[Tile]
    sections: list[Section]
    environment: list[tuple[str, str]]


def require_report_packages() -> None:
    """To be called before the work whose result the page shows."""
    require("jinja2", "matplotlib")


def write_page(path: Path, page: Page) -> None:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("fused._report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["instance_of"] = lambda block, name: type(block).__name__ == name
    html = environment.get_template("page.html.j2").render(page=page)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
