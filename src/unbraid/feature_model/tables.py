"""Results as tables: readable in a terminal and a notebook, and convertible to dicts, JSON and pandas.

What a notebook shows is HTML with inline style, no script and no network, every text escaped, and at most `HTML_LIMIT`
bytes: rows beyond it are counted, not shown.
"""

import html
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table as RichTable

from unbraid.errors import FeatureError
from unbraid.owned_files import json_text, write_owned_json

HTML_LIMIT = 100_000
TERMINAL_ROWS = 40
CELL = "padding:1px 8px;text-align:"
LONGEST_CELL = 400


class Result(ABC):
    """What every result can do; it looks like its table where it does not say otherwise."""

    @abstractmethod
    def to_table(self) -> "Table":
        """What is shown."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""

    def to_json(self, path: Path | str | None = None) -> str:
        """`to_dict` as JSON text, also written to `path` if there is one: a new file, or one that was written so.

        Raises:
            FeatureError: the file cannot be written, or holds something else.
        """
        if path is not None:
            return write_owned_json(Path(path), self.to_dict(), "features", error=FeatureError)
        return json_text(self.to_dict())

    def to_pandas(self) -> Any:
        """The table as a pandas DataFrame.

        Raises:
            FeatureError: pandas is not installed.
        """
        table = self.to_table()
        return needed("pandas").DataFrame(table.rows, columns=table.columns)

    def __rich__(self) -> Any:
        """For `rich.print` and the command line."""
        return self.to_table().__rich__()

    def __repr__(self) -> str:
        return as_text(self.__rich__())

    def _repr_html_(self) -> str:
        return self.to_table()._repr_html_()


@dataclass(frozen=True, repr=False)
class Table(Result):
    """Rows of named values.

    Attributes:
        columns: their names, in order.
        rows: one dict a row, with plain values under these names.
        caption: what the table says, in a line.
        notes: further lines below it.

    Example:
        >>> table = Table(["feature", "code"], [{"feature": "resid_post.5/3", "code": 1.5}])
        >>> table[0]["code"], len(table)
        (1.5, 1)
    """

    columns: list[str]
    rows: list[dict[str, Any]]
    caption: str = ""
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def column(self, name: str) -> list[Any]:
        """One column's values."""
        return [row[name] for row in self.rows]

    def to_table(self) -> "Table":
        """This one."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Caption and rows as plain values."""
        return {"caption": self.caption, "notes": list(self.notes), "rows": self.rows}

    def __rich__(self) -> RichTable:
        """For `rich.print` and the command line."""
        table = RichTable(box=None, padding=(0, 1, 0, 0), title=escape(self.caption) or None, title_justify="left")
        for name in self.columns:
            number = all(isinstance(row.get(name), int | float | None) for row in self.rows)
            table.add_column(escape(name), justify="right" if number else "left", overflow="fold")
        for row in self.rows[:TERMINAL_ROWS]:
            table.add_row(*(escape(visible(shown(row.get(name)))) for name in self.columns))
        left = len(self.rows) - TERMINAL_ROWS
        notes = [*self.notes, *([f"{left} more rows"] if left > 0 else [])]
        table.caption = "\n".join(escape(visible(note)) for note in notes) or None
        table.caption_justify = "left"
        return table

    def _repr_html_(self) -> str:
        return html_table(self.columns, self.rows, self.caption, self.notes)


def require_rows(k: int) -> None:
    """How many of something are asked for.

    Raises:
        FeatureError: fewer than one.
    """
    if k < 1:
        raise FeatureError(f"k is {k}; expected at least 1, the number of rows to show")


def shown(value: Any) -> str:
    """A cell's text: four significant digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " ".join(shown(one) for one in value)
    text = str(value)
    return text if len(text) <= LONGEST_CELL else text[:LONGEST_CELL] + "…"


def visible(text: str) -> str:
    """Text with control characters (a terminal would obey them) written out, and new lines as signs."""
    return "".join(
        {"\n": "⏎", "\t": "⇥"}.get(sign, sign if sign.isprintable() else f"\\x{ord(sign):02x}") for sign in text
    )


def html_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], caption: str, notes: Sequence[str]) -> str:
    """A table as HTML of at most `HTML_LIMIT` bytes."""
    head = "".join(f'<th style="{CELL}left">{html.escape(name)}</th>' for name in columns)
    lines: list[str] = []
    for row in rows:
        cells = ""
        for name in columns:
            value = row.get(name)
            side = "right" if isinstance(value, int | float) and not isinstance(value, bool) else "left"
            cells += f'<td style="{CELL}{side}">{html.escape(visible(shown(value)))}</td>'
        lines.append(f"<tr>{cells}</tr>")
    opening = f'<table style="border-collapse:collapse;font-size:90%"><caption style="{CELL}left">'
    opening += f"{html.escape(visible(shown(caption)))}</caption><thead><tr>{head}</tr></thead><tbody>"
    return limited(opening, lines, "</tbody></table>", [*map(shown, notes)], "row")


def limited(opening: str, lines: Sequence[str], closing: str, notes: Sequence[str], what: str) -> str:
    """Opening, as many lines as fit, closing and notes; what does not fit is counted."""
    below = "".join(f'<div style="font-size:85%">{html.escape(visible(note))}</div>' for note in notes)
    space = HTML_LIMIT - sum(len(part.encode()) for part in (opening, closing, below)) - 200
    taken, used = 0, 0
    for line in lines:
        used += len(line.encode())
        if used > space:
            break
        taken += 1
    left = len(lines) - taken
    more = f'<div style="font-size:85%">{left} more {what}{"s" if left > 1 else ""} not shown</div>' if left else ""
    return f"{opening}{''.join(lines[:taken])}{closing}{below}{more}"


def as_text(renderable: Any, width: int = 120) -> str:
    """What a terminal shows, without colour."""
    from rich.console import Console

    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().rstrip()


def needed(package: str) -> Any:
    """An optional package.

    Raises:
        FeatureError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise FeatureError(f"{package} is not installed; expected it for this; run `pip install {package}`") from None
