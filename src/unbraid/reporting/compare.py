"""`unbraid compare RUN RUN ...`: what different settings give at which sparsity, seeds as intervals.

SAEs that differ in nothing but their seed are one point: the mean of each metric with a 95 % interval from Student's t,
which two or three seeds need. A comparison holds only at the same L0, so L0 is the horizontal axis of every panel.
The CE loss score is there for runs that `unbraid eval` has measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from unbraid.config import RunConfig
from unbraid.errors import EvaluationError, TrainingError
from unbraid.evaluation.evaluation_file import read_evaluation
from unbraid.json_files import is_number
from unbraid.owned_folders import written_folder
from unbraid.reporting.figures import COLOURS, DASHES, MARKERS, STYLE, WIDTH_INCHES, plain, save_figure
from unbraid.reporting.training_log import LARGEST
from unbraid.training.changes import read_changes
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
CHANGES_THAT_COUNT = ("training.tokens", "optimiser.lr")
"""Settings that make another SAE of a run that goes on with them."""


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


@dataclass(frozen=True)
class _Member:
    """One SAE of one run.

    Attributes:
        settings: everything that decided it, but the seeds and what else was trained beside it; with checksums of what
            the run read.
        seed: seed of the run and of the SAE.
        metrics: what was measured.
    """

    settings: dict[str, Any]
    seed: tuple[int, int]
    metrics: dict[str, float]


def frontier(runs: list[Path | str]) -> list[Point]:
    """The points of some finished runs, by site, then label.

    SAEs are one point if their runs have the same settings in everything but the seed, and read the same text, model or
    activations (files of one name may hold other text), to the same step, with the same changes on the way. Equal
    settings and an equal seed give the same SAE, so a run that is named twice, or that was copied, counts once.

    Raises:
        EvaluationError: no run was given.
        TrainingError: a folder holds no run, or one that is not complete.
    """
    if not runs:
        raise EvaluationError("no run to compare; expected at least one run folder")
    groups: dict[str, dict[tuple[int, int], _Member]] = {}
    for path in runs:
        for site, member in _members(RunFolder(path)):
            group = groups.setdefault(repr((site, sorted(member.settings.items()))), {})
            group.setdefault(member.seed, member)
    found = [list(group.values()) for group in groups.values()]
    differing = _differing([members[0].settings for members in found])
    points = [
        Point(
            site=members[0].settings["site"],
            label=", ".join(
                f"{key} {_shown(members[0].settings[key])}" for key in differing if key in members[0].settings
            )
            or "all alike",
            seeds=len(members),
            metrics={
                metric: _estimate([member.metrics[metric] for member in members])
                for metric in METRICS
                if all(metric in member.metrics for member in members)
            },
        )
        for members in found
    ]
    return sorted(points, key=lambda point: (point.site, point.label))


def _members(folder: RunFolder) -> Iterator[tuple[str, _Member]]:
    config, spliced = folder.recorded_config, _ce_loss_scores(folder.path)
    summary = folder.read_summary()
    planned = summary.get("steps", {}).get("planned", config.steps)
    if planned != config.steps:
        raise TrainingError(
            f"run {str(folder.path)!r} was measured after {planned:,} steps and goes on to {config.steps:,}; expected "
            f"one that has ended; finish it with `unbraid resume {folder.path}`"
        )
    measured, source = summary["saes"], summary.get("source", {})
    beyond = {f"checksum of {part}": checksum for part, checksum in source.items()} | _history(folder, summary)
    for name, (route, variant) in config.dictionaries.items():
        metrics = measured.get(name)
        if metrics is None:
            continue
        values = metrics | {"ce_loss_score": spliced.get(name)}
        yield (
            str(route),
            _Member(
                {"site": str(route)} | _settings(config, variant) | beyond,
                (config.seed, config.variant(variant).seed),
                {
                    metric: float(values[metric])
                    for metric in METRICS
                    if is_number(values.get(metric)) and abs(values[metric]) <= LARGEST
                },
            ),
        )


def _settings(config: RunConfig, variant: str) -> dict[str, Any]:
    """Every setting that decides one variant, flat, by its last name where it is the SAE's or the penalty's.

    Left out are the seeds, the recipe's name, and the sites and variants: what is trained beside an SAE changes nothing
    about it.
    """
    left_out = {"seed", "name", "variants", "sae", "decorrelation", "optimiser"}
    shared = _flat(config.model_dump(mode="json", exclude=left_out))
    own = _flat(config.variant(variant).model_dump(mode="json", exclude={"seed"}))
    own = {path.removeprefix("sae.").removeprefix("decorrelation."): value for path, value in own.items()}
    return {path: value for path, value in (shared | own).items() if path != "model.sites"}


def _history(folder: RunFolder, summary: dict[str, Any]) -> dict[str, Any]:
    """What no setting tells of a run: steps it did not come to make, and what was changed after how many of them."""
    steps = summary.get("steps", {})
    early = steps.get("executed") != steps.get("planned")
    turns = [
        f"{path} {value} after step {line.get('after_step')}"
        for line in read_changes(folder.path)
        for path, value in line["changes"].items()
        if path in CHANGES_THAT_COUNT
    ]
    return {"steps": steps["executed"] if early else "all", "changed": "; ".join(turns) or "nothing"}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": _plain(value)}
    return flat


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _ce_loss_scores(run: Path) -> dict[str, float]:
    """By SAE, from the run's evaluation.json, where there is one."""
    saes = read_evaluation(run / "evaluation.json").get("saes", {})
    spliced = {name: sae.get("core", {}).get("model_performance_preservation") for name, sae in saes.items()}
    return {
        name: float(found["ce_loss_score"]) for name, found in spliced.items() if _has_number(found, "ce_loss_score")
    }


def _has_number(found: Any, name: str) -> bool:
    return isinstance(found, dict) and is_number(found.get(name))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _differing(settings: list[dict[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if key != "site" and len({repr(each[key]) for each in settings if key in each}) > 1]


def _estimate(values: list[float]) -> Estimate:
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, mean, mean)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return Estimate(mean, mean - reach, mean + reach)


def write_comparison(points: list[Point], out: Path, *, overwrite: bool = False) -> list[Path]:
    """Draw every metric against L0 into frontier.png and frontier.svg of the folder `out`; returns the paths.

    Raises:
        UnbraidError: `out` cannot be written, or holds something; an earlier comparison only without `overwrite`.
    """
    import matplotlib

    with written_folder(out, "comparison", overwrite=overwrite) as partial, matplotlib.rc_context(STYLE):
        drawn = save_figure(frontier_figure(points), partial / "frontier")
    return [out / path.name for path in drawn]


def frontier_figure(points: list[Point]) -> "Figure":
    """The frontier as a matplotlib figure: colour and marker tell the settings, fill and dashes the site.

    Raises:
        EvaluationError: the points have no metric besides L0.
    """
    import matplotlib
    from matplotlib.figure import Figure

    shown = [metric for metric in METRICS if metric != "l0" and any(metric in point.metrics for point in points)]
    if not shown:
        raise EvaluationError(
            "the runs have no metric to draw; expected l0, r2 or correlations in their summary.json; compare runs that "
            "have ended"
        )
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
    """Colour and marker of a setting, no two alike: when both have gone round, the markers are numbers."""
    n = len(COLOURS)
    marker = MARKERS[(label + label // n) % len(MARKERS)] if label < n * len(MARKERS) else f"${label + 1}$"
    return {"color": COLOURS[label % n], "marker": marker, "markersize": 4.2}


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
        handles=handles,
        labels=[plain(label) for label in labels],
        loc="upper left",
        bbox_to_anchor=(0.03, 1.0),
        labelspacing=0.25,
        borderpad=0.2,
    )
