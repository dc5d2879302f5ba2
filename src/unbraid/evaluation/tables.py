"""Evaluation results as tables a person reads: one row an SAE or control, one column a number."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

COLUMNS: dict[str, tuple[str, ...]] = {
    "L0": ("core", "sparsity", "l0"),
    "R2": ("core", "reconstruction_quality", "r2"),
    "CE score": ("core", "model_performance_preservation", "ce_loss_score"),
    "KL score": ("core", "model_behavior_preservation", "kl_div_score"),
    "alive": ("core", "misc_metrics", "frac_alive"),
    "corr mean": ("correlation", "cosine", "mean"),
    "corr top": ("correlation", "cosine", "top"),
    "top reduced": ("correlation", "reduction", "cosine", "top"),
    "max cos": ("geometry", "mean_max_decoder_cosine"),
    "composed": ("geometry", "composition_rate"),
    "probe k=1": ("probing", "sae", "sae_top_1_test_accuracy"),
    "k=5": ("probing", "sae", "sae_top_5_test_accuracy"),
    "channel k=1": ("probing", "llm", "llm_top_1_test_accuracy"),
    "dense": ("probing", "llm", "llm_test_accuracy"),
    "absorbed": ("absorption", "mean", "mean_absorption_fraction_score"),
    "MCC": ("ground-truth", "mcc"),
    "F1": ("ground-truth", "f1"),
    "gap": ("ground-truth", "absorption_gap"),
}
GROUND_TRUTH_COLUMNS = {
    "L0": "l0",
    "R2": "r2",
    "F1": "f1",
    "precision": "precision",
    "recall": "recall",
    "MCC": "mcc",
    "unique": "uniqueness",
    "recovered": "recovered",
    "dead": "dead_fraction",
    "shrinkage": "shrinkage",
    "absorption gap": "absorption_gap",
    "hedging": "hedging",
    "composition": "composition",
}


def evaluation_table(report: Mapping[str, Any]) -> Table:
    """The main numbers of `evaluation.json`; columns nobody has are left out. Skipped suites are the caption."""
    rows = {**report["saes"], **report["controls"]}
    columns = {
        title: keys for title, keys in COLUMNS.items() if any(_at(row, keys) is not None for row in rows.values())
    }
    skipped = "\n".join(f"skipped {suite}: {reason}" for suite, reason in report["skipped"].items())
    return _table(
        list(columns), {name: [_at(row, keys) for keys in columns.values()] for name, row in rows.items()}, skipped
    )


def ground_truth_table(rows: Mapping[str, Mapping[str, Any]], caption: str = "") -> Table:
    """Ground-truth metrics by name; a value may be a number or a (mean, spread) pair."""
    return _table(
        list(GROUND_TRUTH_COLUMNS),
        {name: [row.get(key) for key in GROUND_TRUTH_COLUMNS.values()] for name, row in rows.items()},
        caption,
    )


def _table(titles: Sequence[str], rows: Mapping[str, Sequence[Any]], caption: str) -> Table:
    table = Table(caption=caption or None, caption_justify="left")
    table.add_column("", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right")
    for name, values in rows.items():
        table.add_row(name, *(_shown(value) for value in values))
    return table


def _at(row: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        row = row.get(key) if isinstance(row, Mapping) else None
    return row


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple | list):
        mean, spread = value
        return f"{mean:.3f} ±{spread:.3f}" if spread is not None else f"{mean:.3f}"
    return f"{value:.3g}" if abs(value) >= 100 else f"{value:.3f}"
