"""A run's `metrics.jsonl` as columns: one curve for each SAE and quantity.

A long run logs more lines than a figure has pixels, so curves are thinned to bin means; what is drawn still depends
on nothing but the file, and the same file gives the same figure, byte for byte.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unbraid.errors import TrainingError
from unbraid.json_files import is_count, is_number
from unbraid.training.json_lines import read_json_lines

PLACE = r"(?:[a-z_]+\.\d+|embed)"
NAME_PATTERN = re.compile(rf"^(?P<site>{PLACE}(?:--to--{PLACE})?)(?:_(?P<variant>.+))?$")

SAFE_NAME = r"[\w.+:-]{1,255}"
LARGEST = 1e100
"""Beyond this no training goes, and a figure's axes overflow."""


@dataclass(frozen=True)
class Curve:
    """One quantity of one SAE over the run.

    Attributes:
        step: `[n]` finished steps.
        value: `[n]`; NaN where the quantity was not measured.
    """

    step: np.ndarray
    value: np.ndarray

    @property
    def measured(self) -> bool:
        """Whether any value is there."""
        return bool(np.isfinite(self.value).any())

    @property
    def found(self) -> "Curve":
        """Only where the quantity was measured, so that lone points are joined."""
        there = np.isfinite(self.value)
        return Curve(self.step[there], self.value[there])

    def thinned(self, points: int) -> "Curve":
        """At most `points` bin means; the last point is kept as it is, so that a curve ends where the run ended."""
        n = len(self.step)
        if n <= points:
            return self
        bins = np.array_split(np.arange(n - 1), points - 1)
        return Curve(
            np.array([self.step[b].mean() for b in bins] + [self.step[-1]]),
            np.array([_mean(self.value[b]) for b in bins] + [self.value[-1]]),
        )


@dataclass(frozen=True)
class TrainingLog:
    """Every logged quantity of a run.

    Attributes:
        names: the SAEs, in the order of the run.
        step: `[n]` finished steps of the logged lines.
    """

    names: list[str]
    step: np.ndarray
    _records: list[dict[str, dict[str, Any]]]

    @classmethod
    def read(cls, path: Path) -> "TrainingLog":
        """Read a `metrics.jsonl`.

        Raises:
            TrainingError: it is missing, damaged, or has no line yet.
        """
        lines = read_json_lines(path)
        if not lines:
            raise TrainingError(f"{str(path)!r} has no line yet; expected at least one logged step; train first")
        for number, line in enumerate(lines, start=1):
            problem = _problem(line)
            if problem is not None:
                raise TrainingError(
                    f"{str(path)!r} is damaged: line {number} has {problem}; expected the metrics.jsonl of a training "
                    "run"
                )
        records = [line["saes"] for line in lines]
        return cls(list(records[0]), np.array([line["step"] for line in lines], dtype=float), records)

    def curve(self, name: str, quantity: str) -> Curve:
        """`quantity` (such as "loss" or "tau") of the SAE `name`.

        Raises:
            TrainingError: something logged under that name is no number.
        """
        values = [record.get(name, {}).get(quantity) for record in self._records]
        for value in values:
            if value is not None and not (is_number(value) and abs(value) <= LARGEST):
                raise TrainingError(
                    f"metrics.jsonl has {quantity} = {value!r} for {name}; expected a number or null; the log is "
                    "damaged"
                )
        return Curve(self.step, np.array([math.nan if value is None else float(value) for value in values]))


def split_name(name: str) -> tuple[str, str]:
    """`"resid_post.3_twin"` -> `("resid_post.3", "twin")`; a name of another form is a site of its own."""
    match = NAME_PATTERN.match(name)
    return (match["site"], match["variant"] or "") if match else (name, "")


def _problem(line: dict[str, Any]) -> str | None:
    """What about a line of the log nobody could have written; None for a good one."""
    if not is_count(line.get("step")):
        return f"step {line.get('step')!r}"
    saes = line.get("saes")
    if not isinstance(saes, dict) or not saes:
        return f"saes {saes!r}"
    for name, record in saes.items():
        if not re.fullmatch(SAFE_NAME, name):
            return f"an SAE named {name!r}"
        if not isinstance(record, dict):
            return f"{record!r} for {name}"
    return None


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan
