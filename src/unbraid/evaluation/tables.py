"""Evaluation results as tables a person reads: one table per suite, one row per SAE or control, at most 80 columns."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from unbraid.config.measuring import SUITES, suite_names
from unbraid.evaluation.suite import Column

CONTROL = "dim"

GROUND_TRUTH_TABLES: dict[str, dict[str, str]] = {
    "each latent as a detector of the feature it is most parallel to; the best one-to-one match": {
        "F1": "f1",
        "precision": "precision",
        "recall": "recall",
        "MCC": "mcc",
    },
    "sparsity and reconstruction; distinct features a latent, features found (cosine above 0.9), dead latents": {
        "L0": "l0",
        "R2": "r2",
        "unique": "uniqueness",
        "recovered": "recovered",
        "dead": "dead_fraction",
    },
    "failures: parents silent beside a child, other features mixed in, parents inside their children": {
        "shrinkage": "shrinkage",
        "absorption gap": "absorption_gap",
        "hedging": "hedging",
        "composition": "composition",
    },
}


def evaluation_tables(report: Mapping[str, Any]) -> Iterator[Table | str]:
    """The main numbers of `evaluation.json`, half the width of a 95 % interval beside those that have one, and the
    reasons why suites were skipped."""
    rows = {**report["saes"], **report["controls"]}
    for name in suite_names():
        suite = SUITES.readers()[name]
        judged = {subject: row[name] for subject, row in rows.items() if name in row}
        if judged:
            found = {
                title: [_at(row, keys) for row in judged.values()]
                for title, keys in suite.columns.items()
                if title not in suite.optional or any(_at(row, keys)[0] is not None for row in judged.values())
            }
            cells = zip(*([_shown(*cell) for cell in column] for column in found.values()), strict=True)
            added = [suite.optional[title] for title in found if title in suite.optional]
            yield "; ".join([f"\n{name}: {suite.caption}", *added])
            yield _table(list(found), dict(zip(judged, map(list, cells), strict=True)), set(report["controls"]))
    for suite, reason in report["skipped"].items():
        yield f"\nskipped {suite}: {reason}"


def ground_truth_tables(rows: Mapping[str, Mapping[str, Any]], controls: set[str]) -> Iterator[Table | str]:
    """Ground-truth metrics by name, each a (mean, spread) pair or None."""
    for meaning, columns in GROUND_TRUTH_TABLES.items():
        shown = {name: [_shown(*(row[key] or (None, None))) for key in columns.values()] for name, row in rows.items()}
        yield f"\n{meaning}"
        yield _table(list(columns), shown, controls)


def _table(titles: Sequence[str], rows: Mapping[str, Sequence[str]], controls: set[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("", overflow="fold")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for name, values in rows.items():
        table.add_row(name, *values, style=CONTROL if name in controls else None)
    return table


def _at(row: Any, keys: Column) -> tuple[Any, float | None]:
    """The number and half of its interval."""
    *groups, name = keys
    for group in groups:
        row = row.get(group, {})
    low, high = row.get(f"{name}_interval") or (None, None)
    return row.get(name), None if low is None or high is None else (high - low) / 2


def _shown(value: float | int | None, spread: float | None) -> str:
    if value is None:
        return "-"
    number = str(value) if isinstance(value, int) else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return number if spread is None else f"{number} ±{f'{spread:.3f}'.lstrip('0')}"
