"""`unbraid compare RUN RUN ...`: what different settings give at which sparsity, seeds as intervals.

SAEs that differ in nothing but their seed are one point: the mean of each metric with a 95 % interval from Student's t,
which two or three seeds need. A comparison holds only at the same L0, so L0 is the horizontal axis of every panel.
The CE loss score is there for runs that `unbraid eval` has measured.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from unbraid.config import VariantConfig
from unbraid.errors import EvaluationError
from unbraid.evaluation.evaluation_file import read_evaluation
from unbraid.json_files import is_number
from unbraid.reporting.figures import COLOURS, DASHES, MARKERS, STYLE, WIDTH_INCHES, save_figure
from unbraid.reporting.training_log import split_name
from unbraid.training.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = {
    "l0": "L0",
    "r2": r"$R^2$",
    "correlation_top": "top correlation",
    "correlation_mean": "mean correlation",
    "ce_loss_score": "CE loss score",
}
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; `low` and `high` bound its 95 % interval and equal the mean when there is one seed."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} ± {(self.high - self.low) / 2:.2g}"


@dataclass(frozen=True)
class Point:
    """SAEs alike in all but their seed.

    Attributes:
        site: where they read.
        label: the settings in which they differ from the other points.
        seeds: how many there are.
        metrics: name -> estimate, for what was measured.
    """

    site: str
    label: str
    seeds: int
    metrics: dict[str, Estimate]


def frontier(runs: list[Path | str]) -> list[Point]:
    """The points of some finished runs, by site, then label.

    Raises:
        EvaluationError: no run was given.
        TrainingError: a folder holds no run, or one that is not complete.
    """
    if not runs:
        raise EvaluationError("no run to compare; expected at least one run folder")
    groups: dict[str, list[tuple[str, dict[str, Any], dict[str, float]]]] = {}
    for path in runs:
        folder = RunFolder(path)
        config = folder.config
        shared = {"model": config.model.name, "text": config.text.source, "tokens": config.training.tokens}
        spliced = _ce_loss_scores(folder.path)
        for name, measured in folder.read_summary()["saes"].items():
            measured |= {"ce_loss_score": spliced.get(name)}
            site, variant = split_name(name)
            settings = shared | _flat(config.variant(variant))
            values = {metric: float(measured[metric]) for metric in METRICS if is_number(measured.get(metric))}
            groups.setdefault(repr((site, sorted(settings.items()))), []).append((site, settings, values))
    differing = _differing([members[0][1] for members in groups.values()])
    points = [
        Point(
            site=members[0][0],
            label=", ".join(f"{key} {members[0][1][key]}" for key in differing) or "all alike",
            seeds=len(members),
            metrics={
                metric: _estimate([values[metric] for _, _, values in members])
                for metric in METRICS
                if all(metric in values for _, _, values in members)
            },
        )
        for members in groups.values()
    ]
    return sorted(points, key=lambda point: (point.site, point.label))


def _ce_loss_scores(run: Path) -> dict[str, float]:
    """By SAE, from the run's evaluation.json, where there is one."""
    saes = read_evaluation(run / "evaluation.json").get("saes", {})
    spliced = {name: sae.get("core", {}).get("model_performance_preservation") for name, sae in saes.items()}
    return {name: found["ce_loss_score"] for name, found in spliced.items() if _has_number(found, "ce_loss_score")}


def _has_number(found: Any, name: str) -> bool:
    return isinstance(found, dict) and is_number(found.get(name))


def _flat(settings: VariantConfig) -> dict[str, Any]:
    """Every setting but the seed, by its last name where that is unambiguous."""
    groups = settings.model_dump(mode="json", exclude={"seed"})
    flat = {f"{group}.{name}": value for group, members in groups.items() for name, value in members.items()}
    return {path.removeprefix("sae.").removeprefix("decorrelation."): _plain(value) for path, value in flat.items()}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _differing(settings: list[dict[str, Any]]) -> list[str]:
    return [key for key in settings[0] if len({each[key] for each in settings}) > 1]


def _estimate(values: list[float]) -> Estimate:
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, mean, mean)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return Estimate(mean, mean - reach, mean + reach)


def draw_frontier(points: list[Point], stem: Path) -> list[Path]:
    """Draw every metric against L0 into `stem`.png and `stem`.svg; returns the paths.

    Raises:
        UnbraidError: the figures cannot be written.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return save_figure(frontier_figure(points), stem)


def frontier_figure(points: list[Point]) -> "Figure":
    """The frontier as a matplotlib figure: colour and marker tell the settings, fill and dashes the site."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = [metric for metric in METRICS if metric != "l0" and any(metric in point.metrics for point in points)]
    labels, sites = list(dict.fromkeys(p.label for p in points)), list(dict.fromkeys(p.site for p in points))
    columns = min(2, max(1, len(shown)))
    lines = -(-len(shown) // columns)
    legend_inches = 0.16 * (len(labels) + (len(sites) if len(sites) > 1 else 0)) + 0.1
    height = 1.9 * lines + legend_inches
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height))
        top, bottom = 1 - (legend_inches + 0.25) / height, 0.42 / height
        grid = figure.add_gridspec(
            lines, columns, left=0.1, right=0.975, bottom=bottom, top=top, wspace=0.28, hspace=0.55
        )
        for at, metric in enumerate(shown):
            axes = figure.add_subplot(grid[at // columns, at % columns])
            axes.set_title(METRICS[metric])
            axes.set_xlabel("L0", labelpad=2)
            for point in points:
                if metric in point.metrics and "l0" in point.metrics:
                    _cross(axes, point, metric, labels.index(point.label), sites.index(point.site))
        _name_points(figure, labels, sites)
    return figure


def _look(label: int) -> dict[str, Any]:
    return {"color": COLOURS[label % len(COLOURS)], "marker": MARKERS[label % len(MARKERS)], "markersize": 4.2}


def _fill(site: int) -> dict[str, Any]:
    return {} if site == 0 else {"markerfacecolor": "white"}


def _cross(axes: "Axes", point: Point, metric: str, label: int, site: int) -> None:
    """One point with its intervals."""
    x, y = point.metrics["l0"], point.metrics[metric]
    reach = {"xerr": [[x.mean - x.low], [x.high - x.mean]], "yerr": [[y.mean - y.low], [y.high - y.mean]]}
    bars = axes.errorbar(x.mean, y.mean, **reach, **_look(label), linewidth=0.8, capsize=1.6, **_fill(site))
    for bar in bars[2]:
        bar.set_linestyle(DASHES[site % len(DASHES)])


def _name_points(figure: "Figure", labels: list[str], sites: list[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linestyle="none", **_look(at)) for at in range(len(labels))]
    if len(sites) > 1:
        labels = [*labels, *sites]
        for at in range(len(sites)):
            dashes = DASHES[at % len(DASHES)]
            handles.append(Line2D([], [], color="0.3", marker="o", markersize=4.2, linestyle=dashes, **_fill(at)))
    figure.legend(
        handles=handles, labels=labels, loc="upper left", bbox_to_anchor=(0.03, 1.0), labelspacing=0.25, borderpad=0.2
    )
