"""Figure 1 of a run, drawn from its `metrics.jsonl`: tau, top correlation, L0 and R^2, loss; or the paper's panels.

Made for print: the text width of a one-column paper (5.5 in), nothing below 6.5 pt, and readable in grey, because a
site is told by lightness and marker as well as by colour, and a variant by its dashes. matplotlib is imported only when
something is drawn; figures are built without pyplot, so no display and no global state is touched. The same log gives
the same bytes.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unbraid.errors import TrainingError, UnbraidError
from unbraid.files import write_whole
from unbraid.reporting.training_log import Curve, TrainingLog, split_name
from unbraid.training.run_folder import is_run, refuse_links

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES, HEIGHT_INCHES = 5.5, 4.3
POINTS = 240
WIDE_RANGE = 4.0
"""A quantity that changes by more than this factor is drawn on a logarithmic axis."""
# Dark to light, so that grey prints keep the order of depth; distinguishable with the common colour deficiencies.
COLOURS = ("#1f2a6b", "#c0392b", "#e69f00", "#4c9f70", "#7f7f7f", "#6fb7e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Any, ...] = ("solid", (0, (3.2, 1.6)), (0, (1.0, 1.2)), (0, (5, 1.2, 1, 1.2)))
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "axes.labelsize": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "ytick.minor.size": 1.5,
    "ytick.minor.width": 0.4,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "lines.markersize": 2.6,
    "axes.prop_cycle": "cycler('color', ['black'])",
    "svg.hashsalt": "unbraid",
    "svg.fonttype": "path",
    "figure.dpi": 100,
    "savefig.dpi": 300,
}


def draw_training(run: Path | str, *, paper: bool = False) -> list[Path]:
    """Draw Figure 1 of the run in folder `run` into `figures/figure1.png` and `figures/figure1.svg`; returns the paths.

    Args:
        run: a run folder.
        paper: draw the four panels of the paper instead, into `figures/figure1-paper.png` and `.svg`.

    Raises:
        TrainingError: the run has no metrics, or they are damaged.
        UnbraidError: the figures cannot be written.
    """
    run = Path(run)
    refuse_links(run)
    metrics = run / "metrics.jsonl"
    if is_run(run) and not (metrics.is_file() and metrics.stat().st_size):
        raise TrainingError(
            f"run {str(run)!r} has logged no step yet (metrics.jsonl); expected one that has begun to train; go on "
            f"with it by `unbraid resume {run}`"
        )
    figure = training_figure(TrainingLog.read(metrics), paper=paper)
    return save_figure(figure, run / "figures" / ("figure1-paper" if paper else "figure1"))


def training_figure(log: TrainingLog, *, paper: bool = False) -> "Figure":
    """Figure 1 as a matplotlib figure, for notebooks and further editing.

    Args:
        log: of the run.
        paper: the panels of the paper: tau, mean and spread of the correlations, successful updates, loss. Otherwise
            what a reader asks of a run with a twin: tau, the top correlation, L0 and R^2, loss.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES))
        looks = _looks(log.names)
        grid = figure.add_gridspec(
            2, 2, left=0.085, right=0.975, bottom=0.095, top=0.845, wspace=0.26, hspace=0.52, height_ratios=(1, 1)
        )
        _threshold_panel(figure.add_subplot(grid[0, 0]), log, looks)
        if paper:
            _correlation_panel(figure, grid[0, 1], log, looks)
            _updates_panel(figure.add_subplot(grid[1, 0]), log, looks)
        else:
            _top_panel(figure.add_subplot(grid[0, 1]), log, looks)
            _sparsity_panel(figure, grid[1, 0], log, looks)
        _loss_panel(figure.add_subplot(grid[1, 1]), log, looks)
        _legend(figure, log, looks)
    return figure


def save_figure(figure: "Figure", stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg, each whole or not at all and free of dates; returns the two paths."""
    import matplotlib

    paths: list[Path] = []
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                path = stem.with_name(f"{stem.name}.{kind}")
                write_whole(path, partial(figure.savefig, format=kind, metadata=metadata))
                paths.append(path)
    except OSError as error:
        raise UnbraidError(
            f"cannot write the figure {str(stem)!r}: {error.strerror}; expected a writable folder; make it writable"
        ) from error
    return paths


def _looks(names: list[str]) -> dict[str, dict[str, Any]]:
    """How each SAE is drawn: its site gives colour and marker, its variant the dashes."""
    sites = list(dict.fromkeys(split_name(name)[0] for name in names))
    variants = list(dict.fromkeys(split_name(name)[1] for name in names))
    looks: dict[str, dict[str, Any]] = {}
    for name in names:
        site, variant = split_name(name)
        at = sites.index(site)
        looks[name] = {
            "color": COLOURS[at % len(COLOURS)],
            "marker": MARKERS[at % len(MARKERS)],
            "linestyle": DASHES[variants.index(variant) % len(DASHES)],
        }
    return looks


def _line(axes: "Axes", curve: Curve, look: dict[str, Any], site: int) -> None:
    curve = curve.found.thinned(POINTS)
    n = len(curve.step)
    stride = max(1, n // 5)
    axes.plot(curve.step, curve.value, **look, markevery=(min(n - 1, (site * stride) // 3 + stride // 2), stride))


def _lines(axes: "Axes", log: TrainingLog, looks: dict[str, dict[str, Any]], quantity: str) -> bool:
    sites = list(dict.fromkeys(split_name(name)[0] for name in log.names))
    drawn = False
    for name in log.names:
        curve = log.curve(name, quantity)
        if curve.measured:
            _line(axes, curve, looks[name], sites.index(split_name(name)[0]))
            drawn = True
    axes.set_xlabel("step", labelpad=2)
    _limit_steps(axes, log)
    return drawn


def _limit_steps(axes: "Axes", log: TrainingLog) -> None:
    from matplotlib.ticker import MaxNLocator

    last = max(float(log.step[-1]), 2.0)
    axes.set_xlim(0, last)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def _not_measured(axes: "Axes") -> None:
    axes.text(0.5, 0.5, "not measured in this run", ha="center", va="center", transform=axes.transAxes, color="0.35")
    axes.set_yticks([])


def _threshold_panel(axes: "Axes", log: TrainingLog, looks: dict[str, dict[str, Any]]) -> None:
    axes.set_title(r"(a) adaptive threshold $\tau$")
    if _lines(axes, log, looks, "tau"):
        _logarithmic(axes, log, "tau")
    else:
        _not_measured(axes)


def _correlation_panel(figure: "Figure", place: Any, log: TrainingLog, looks: dict[str, dict[str, Any]]) -> None:
    """Mean and +-1 sd of the pairwise correlations, one narrow plot a site: overlaid, six bands hide each other."""
    sites = list(dict.fromkeys(split_name(name)[0] for name in log.names))
    cells = place.subgridspec(1, len(sites), wspace=0.14)
    first: Axes | None = None
    lowest, highest = 0.0, 0.0
    for column, site in enumerate(sites):
        axes = figure.add_subplot(cells[0, column], sharey=first)
        members = [name for name in log.names if split_name(name)[0] == site]
        drawn = False
        for position, name in enumerate(members):
            mean, std = (log.curve(name, f"correlation_{part}").found.thinned(POINTS) for part in ("mean", "std"))
            if not mean.measured:
                continue
            drawn = True
            look = looks[name]
            low, high = mean.value - std.value, mean.value + std.value
            lowest, highest = min(lowest, float(np.nanmin(low))), max(highest, float(np.nanmax(high)))
            if position == 0:
                axes.fill_between(mean.step, low, high, color=look["color"], alpha=0.22, linewidth=0)
            else:
                for edge in (low, high):
                    axes.plot(mean.step, edge, color=look["color"], linestyle=look["linestyle"], linewidth=0.6)
            axes.plot(mean.step, mean.value, color=look["color"], linestyle=look["linestyle"])
        if not drawn:
            _not_measured(axes)
        axes.text(0.5, 0.99, _site_label(site), transform=axes.transAxes, fontsize=6.5, ha="center", va="top")
        _limit_steps(axes, log)
        axes.set_xticks([0, float(log.step[-1])])
        axes.xaxis.get_majorticklabels()[0].set_horizontalalignment("left")
        axes.xaxis.get_majorticklabels()[-1].set_horizontalalignment("right")
        if column:
            axes.tick_params(labelleft=False)
        else:
            axes.set_title(r"(b) correlation of pairs: mean $\pm$ 1 sd")
        if column == len(sites) // 2:
            axes.set_xlabel("step", labelpad=2)
        first = first or axes
    if first is not None and highest > 0:
        first.set_ylim(lowest * 1.05, highest * 1.18)


def _top_panel(axes: "Axes", log: TrainingLog, looks: dict[str, dict[str, Any]]) -> None:
    axes.set_title("(b) top correlation of pairs")
    if _lines(axes, log, looks, "correlation_top"):
        _ticks_in_view(axes)
    else:
        _not_measured(axes)


def _ticks_in_view(axes: "Axes") -> None:
    """Only the ticks between the limits, and the limits as they are."""
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= high])
    axes.set_ylim(low, high)


def _sparsity_panel(figure: "Figure", place: Any, log: TrainingLog, looks: dict[str, dict[str, Any]]) -> None:
    """L0 and R^2 side by side: a penalty is judged at equal L0, by what it costs in R^2."""
    cells = place.subgridspec(1, 2, wspace=0.42)
    for column, (quantity, title) in enumerate((("l0", "(c) L0"), ("r2", r"$R^2$"))):
        axes = figure.add_subplot(cells[0, column])
        axes.set_title(title)
        if _lines(axes, log, looks, quantity):
            _ticks_in_view(axes)
        else:
            _not_measured(axes)
        axes.set_xticks([0, float(log.step[-1])])
        axes.xaxis.get_majorticklabels()[0].set_horizontalalignment("left")
        axes.xaxis.get_majorticklabels()[-1].set_horizontalalignment("right")


def _updates_panel(axes: "Axes", log: TrainingLog, looks: dict[str, dict[str, Any]]) -> None:
    axes.set_title("(c) successful updates, cumulative")
    curves = {name: log.curve(name, "updates") for name in log.names}
    reference = next(iter(curves.values()))
    if all(np.array_equal(curve.value, reference.value, equal_nan=True) for curve in curves.values()):
        thin = reference.thinned(POINTS)
        axes.plot(thin.step, thin.value, color="black")
        _limit_steps(axes, log)
        axes.set_xlabel("step", labelpad=2)
        what = "the SAE" if len(curves) == 1 else f"all {len(curves)} SAEs"
        text = f"{what}:\n{int(np.nan_to_num(reference.value[-1])):,} of {int(log.step[-1]):,} steps"
        axes.text(0.97, 0.07, text, transform=axes.transAxes, ha="right", va="bottom")
    else:
        _lines(axes, log, looks, "updates")
    axes.set_ylim(bottom=0)


def _loss_panel(axes: "Axes", log: TrainingLog, looks: dict[str, dict[str, Any]]) -> None:
    axes.set_title("(d) loss")
    _lines(axes, log, looks, "loss")
    _logarithmic(axes, log, "loss")


def _logarithmic(axes: "Axes", log: TrainingLog, quantity: str) -> None:
    """A logarithmic axis where the values allow and ask for one: what happens late in a run is small."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = np.concatenate([log.curve(name, quantity).value for name in log.names])
    if not np.isfinite(values).any():
        return
    lowest, highest = float(np.nanmin(values)), float(np.nanmax(values))
    if lowest > 0 and highest / lowest > WIDE_RANGE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _site_label(site: str) -> str:
    ends = [place.rpartition(".") for place in site.split("--to--")]
    return plain(" → ".join(f"{kind} {layer}" if kind else layer for kind, _, layer in ends))


def plain(text: str) -> str:
    """`text` as matplotlib shows it unchanged: a dollar sign is no mathematics."""
    return text.replace("$", r"\$")


def _legend(figure: "Figure", log: TrainingLog, looks: dict[str, dict[str, Any]]) -> None:
    """One row of sites and one of variants, above the panels, where they cover nothing."""
    from matplotlib.lines import Line2D

    sites: dict[str, Line2D] = {}
    variants: dict[str, Line2D] = {}
    for name, look in looks.items():
        site, variant = split_name(name)
        sites.setdefault(_site_label(site), Line2D([], [], color=look["color"], marker=look["marker"]))
        if variant:
            label = plain(variant) + ("" if log.curve(name, "lambda2").value[-1] else r" ($\lambda_2 = 0$)")
            variants.setdefault(label, Line2D([], [], color="black", linestyle=look["linestyle"]))
    for row, handles in enumerate((sites, variants)):
        if handles:
            figure.legend(
                handles=list(handles.values()),
                labels=list(handles),
                loc="upper left",
                bbox_to_anchor=(0.075, 1.0 - 0.045 * row),
                ncols=len(handles),
                handlelength=2.6,
                columnspacing=1.6,
                borderaxespad=0.2,
                borderpad=0.2,
            )
