"""The parts of a page but its charts: the document around them, tables, heads; all that comes in is escaped."""

from collections.abc import Collection, Iterable, Sequence
from html import escape
from importlib.resources import files

from xlscale import __version__


def whole_page(title: str, body: str, footer: str = "") -> str:
    """A document that needs nothing but itself: the browser may fetch nothing, style and script stand inside."""
    assets = files("xlscale")
    css, js = (assets.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)} - xlscale</title>"
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="data:,">'
        f"<style>\n{css}</style></head><body><main>{body}"
        f"<footer>xlscale {__version__}{footer}</footer></main>"
        f"<script>\n{js}</script></body></html>\n"
    )


def tiles(rows: Iterable[tuple[str, str, str]]) -> str:
    """The figures that one looks for first, as (name, value, note)."""
    cells = "".join(
        f"<div><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>"
        for name, value, note in rows
    )
    return f'<div class="tiles">{cells}</div>'


def head(title: str, text: str = "") -> str:
    """The head of a page's section; `text` is HTML."""
    name = title.partition(" ")[0].lower()
    return f'<h2 id="{name}">{title}</h2>' + (f"<p>{text}</p>" if text else "")


def absent(title: str, why: str) -> str:
    """A section that has nothing to show."""
    return head(title) + f'<p class="empty">{why}</p>'


def table(
    heads: Sequence[str],
    rows: Iterable[str],
    sums: Iterable[str] = (),
    *,
    sortable: bool = False,
    numbers: Collection[int] = (),
) -> str:
    """A table; `sums` are its last rows, where sorting leaves them; `numbers` its right-aligned columns."""

    def column(index: int, name: str) -> str:
        inner = f"<button>{escape(name)}</button>" if sortable else escape(name)
        return f"<th{' class=n' if index in numbers else ''}>{inner}</th>"

    top = "".join(column(index, name) for index, name in enumerate(heads))
    body = "".join(f"<tr>{row}</tr>" for row in rows) + "".join(f'<tr class="sum">{row}</tr>' for row in sums)
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="card"><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def cell(text: str, value: float | str | None = None, *, off: bool = False) -> str:
    """A table cell; one with a value to sort by is a number."""
    if value is None:
        return f"<td>{escape(text)}</td>"
    return f'<td class="n{" off" if off else ""}" data-value="{value}">{escape(text)}</td>'


def bar(share: float, style: str = "") -> str:
    """A horizontal bar of a table cell; `share` from 0 to 1 is its length."""
    return f'<i class="bar {escape(style)}" style="width:{100 * max(0.0, min(1.0, share)):.1f}%"></i>'
